"""Preparing a dataset: the same bytes however it is done, nothing left behind when it fails."""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from mamba_trainer.contract import UserError
from mamba_trainer.data.output import require_space
from mamba_trainer.data.prepare import Progress, prepare
from mamba_trainer.data.tokenfile import open_stream
from mamba_trainer.data.tokenizer import open_tokenizer

WORDS = ["def", "return", "yield", "self", "naïve", "(x)", "\n    ", "=", "日本", '"text"', "\r\n"]


@pytest.fixture
def corpus(tmp_path) -> Path:
    """A few megabytes of text in folders, the same on every machine, with two files that are no text."""
    folder = tmp_path / "corpus"
    dice = random.Random(0)
    for i in range(400):
        path = folder / f"package_{i % 7}" / f"module_{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(" ".join(dice.choices(WORDS, k=dice.randrange(3_000))).encode())
    (folder / "latin.txt").write_bytes("é".encode("latin-1"))
    (folder / "image.bin").write_bytes(b"GIF\0\0")
    return folder


def content(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:600"])
def test_the_number_of_workers_changes_no_byte(corpus, tmp_path, tokenizer):
    alone = prepare(corpus, tmp_path / "one", tokenizer=tokenizer, workers=1)
    together = prepare(corpus, tmp_path / "three", tokenizer=tokenizer, workers=3)
    assert alone == together
    assert content(tmp_path / "one") == content(tmp_path / "three")
    assert alone.skipped_documents == 2
    texts = [path.stat().st_size for path in corpus.rglob("*.py")]
    assert alone.source_bytes == sum(texts)
    assert alone.documents == sum(size > 0 for size in texts)


def test_every_document_comes_back_from_the_dataset_alone(corpus, tmp_path):
    prepare(corpus, tmp_path / "out", tokenizer="bpe:600", validation_fraction=0.1, workers=2)
    expected = sorted(text for path in corpus.rglob("*.py") if (text := path.read_bytes().decode()))
    shutil.rmtree(corpus)
    found = []
    for split in ("train", "validation"):
        meta, stream = open_stream(tmp_path / "out", split)
        tokenizer = open_tokenizer(tmp_path / "out", meta.tokenizer)
        bounds = zip(stream.document_offsets[:-1], stream.document_offsets[1:], strict=True)
        documents = [tokenizer.decode(stream.tokens[start:stop]) for start, stop in bounds]
        assert sum(len(text.encode()) for text in documents) == meta.splits[split].source_bytes
        found += documents
    assert sorted(found) == expected


def test_copies_of_a_document_never_stand_in_both_splits(tmp_path):
    records = [json.dumps({"text": f"document {i % 100}"}) for i in range(1_000)]
    (tmp_path / "lines.jsonl").write_text("\n".join(records))
    prepare(tmp_path / "lines.jsonl", tmp_path / "out", validation_fraction=0.3)
    documents = {}
    for split in ("train", "validation"):
        _, stream = open_stream(tmp_path / "out", split)
        parts = np.split(stream.tokens.astype("u1"), stream.document_offsets[:-1])
        documents[split] = {bytes(part) for part in parts[1:]}
    assert len(documents["train"]) + len(documents["validation"]) == 100
    assert not documents["train"] & documents["validation"]


def test_the_standard_library_can_be_prepared_and_progress_ends_at_all_of_it(tmp_path):
    seen: list[Progress] = []
    meta = prepare("python-stdlib", tmp_path / "out", progress=seen.append)
    assert meta.source_bytes > 10e6
    assert meta.splits["validation"].source_bytes > 50e3
    assert seen[-1].done == seen[-1].total > 0
    assert [each.done for each in seen] == sorted(each.done for each in seen)


def test_preparing_again_returns_at_once_even_where_nothing_can_be_written(corpus, tmp_path):
    out = tmp_path / "out"
    first = prepare(corpus, out, tokenizer="bpe:600")
    before = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    out.chmod(0o500)
    seen: list[Progress] = []
    assert prepare(corpus, out, tokenizer="bpe:600", progress=seen.append) == first
    assert seen == []
    assert {file.name: file.stat().st_mtime_ns for file in out.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda corpus: {"tokenizer": "bpe:600"}, r"tokenizer: byte \(asked for: bpe:600\)"),
        (lambda corpus: {"validation_fraction": 0.5}, r"validation_fraction: 0.01 \(asked for: 0.5\)"),
        (lambda corpus: {"include": ["*.py"]}, "include"),
        (lambda corpus: (corpus / "new.py").write_text("x") and {}, "source: .* as it was then, not .* as it is now"),
    ],
)
def test_a_dataset_of_other_parameters_is_kept_and_the_difference_named(corpus, tmp_path, change, message):
    out = tmp_path / "out"
    prepare(corpus, out)
    before = content(out)
    with pytest.raises(UserError, match=message) as refusal:
        prepare(corpus, out, **change(corpus))
    assert f"rm -r {out}" in str(refusal.value)
    assert content(out) == before


def test_tokens_inside_their_own_source_are_not_read_as_text(corpus, tmp_path):
    written = prepare(corpus, corpus / "tokens")
    assert prepare(corpus, corpus / "tokens") == written
    assert prepare(corpus, tmp_path / "elsewhere").splits == written.splits


def test_a_source_is_not_its_own_output(corpus):
    before = sorted(corpus.iterdir())
    with pytest.raises(UserError, match="is the source itself: name another directory"):
        prepare(corpus, corpus)
    assert sorted(corpus.iterdir()) == before


def test_token_files_of_another_program_are_not_overwritten(corpus, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train.bin").write_bytes(b"precious")
    with pytest.raises(UserError, match=r"holds train.bin.*name another directory"):
        prepare(corpus, tmp_path / "out")
    assert content(tmp_path / "out") == {"train.bin": b"precious"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_fraction": 1.5}, "at least 0 and below 1"),
        ({"workers": 0}, "at least one worker"),
        ({"tokenizer": "bpe:200"}, "from 257 to"),
        ({"tokenizer": "nowhere"}, "no tokenizer at"),
        ({"eot_token": "<eos>"}, "byte has an end-of-text token of its own"),
        ({"tokenizer": "bpe:300", "eot_token": "<eos>"}, "bpe:300 has an end-of-text token of its own"),
        ({"include": ["*.rs"]}, r"holds no text in files that match \*.rs"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_written(corpus, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        prepare(corpus, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("raw", "fraction", "message"),
    [
        (
            b"one document",
            0.01,
            "none of the 1 documents .* the validation split .*: hold none out with --validation-fraction 0",
        ),
        ("à la carte".encode("latin-1"), 0, r"holds no UTF-8 text \(documents skipped: 1\)"),
    ],
)
def test_a_split_without_a_document_is_refused_and_leaves_no_dataset(tmp_path, raw, fraction, message):
    (tmp_path / "text.txt").write_bytes(raw)
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / "text.txt", tmp_path / "out", validation_fraction=fraction)
    assert set(content(tmp_path / "out")) == {".prepare.lock"}


def test_without_a_validation_fraction_there_is_no_validation_split(tmp_path):
    (tmp_path / "text.txt").write_text("one document")
    assert prepare(tmp_path / "text.txt", tmp_path / "out", validation_fraction=0).documents == 1
    with pytest.raises(UserError, match="no validation split"):
        open_stream(tmp_path / "out", "validation")


def test_a_record_that_cannot_be_read_ends_a_parallel_preparation_with_its_place(tmp_path):
    lines = ['{"text": "%s"}' % ("x" * 1000)] * 4_000
    lines[3_000] = '{"text": '
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"lines.jsonl, byte 3,039,000: not a JSON record"):
        prepare(tmp_path / "lines.jsonl", tmp_path / "out", workers=2)
    assert set(content(tmp_path / "out")) == {".prepare.lock"}


def test_an_output_that_cannot_be_a_folder_is_refused(corpus, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to .*file/out: Not a directory"):
        prepare(corpus, tmp_path / "file" / "out")


def test_too_little_space_is_refused_with_both_numbers(tmp_path):
    with pytest.raises(UserError, match=r"need about 1152921504\.6 GB, but .* has [\d.]+ GB free"):
        require_space(tmp_path, 1 << 60)


SLOW_PREPARATION = """
import sys, time
from pathlib import Path
from mamba_trainer.data.prepare import prepare

def slowly(progress):
    print(progress.activity, progress.done, flush=True)
    time.sleep(float(sys.argv[3]))

if __name__ == "__main__":
    prepare(sys.argv[1], Path(sys.argv[2]), workers=2, progress=slowly)
"""


@contextlib.contextmanager
def slow_preparation(source: Path | str, out: Path, seconds: float = 0.5) -> Iterator[subprocess.Popen[str]]:
    """A preparation in a process group of its own, that has begun to write."""
    script = out.parent / "slow_preparation.py"
    script.write_text(SLOW_PREPARATION)
    command = [sys.executable, script, source, out, str(seconds)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("preparing tokens")
            yield process
        finally:
            process.kill()


def assert_all_end(processes: list[psutil.Process]) -> None:
    deadline = time.monotonic() + 20
    while alive := [each for each in processes if _runs(each)]:
        assert time.monotonic() < deadline, f"left behind: {alive}"
        time.sleep(0.05)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_ctrl_c_leaves_neither_workers_nor_half_a_dataset(corpus, tmp_path):
    with slow_preparation(corpus, tmp_path / "out") as process:
        workers = psutil.Process(process.pid).children(recursive=True)
        assert len(workers) >= 2
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to parent and workers alike
        _, errors = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert errors.count("Traceback") == 1  # the parent's own: workers end in silence
    assert_all_end(workers)
    assert set(content(tmp_path / "out")) == {".prepare.lock"}


def test_a_killed_preparation_leaves_no_workers_and_the_next_one_completes(corpus, tmp_path):
    with slow_preparation(corpus, tmp_path / "out") as process:
        workers = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        assert_all_end(workers)
    assert "train.bin.partial" in content(tmp_path / "out")
    prepare(corpus, tmp_path / "out", workers=2)
    prepare(corpus, tmp_path / "undisturbed", workers=2)
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")


def test_a_worker_killed_from_outside_ends_the_preparation_with_the_likely_cause(tmp_path):
    with slow_preparation("python-stdlib", tmp_path / "out") as process:
        workers = psutil.Process(process.pid).children(recursive=True)
        next(worker for worker in workers if "spawn_main" in " ".join(worker.cmdline())).kill()
        _, errors = process.communicate(timeout=30)
    assert "lack of memory: run again with fewer --workers" in errors
    assert_all_end(workers)


def test_two_preparations_of_one_directory_wait_for_each_other(corpus, tmp_path):
    with slow_preparation(corpus, tmp_path / "out", seconds=0.2) as process:
        drain = threading.Thread(target=process.communicate, daemon=True)
        drain.start()
        seen: list[Progress] = []
        meta = prepare(corpus, tmp_path / "out", workers=1, progress=seen.append)
        drain.join(timeout=30)
    assert process.returncode == 0
    assert [each.activity for each in seen] == ["waiting for another process"]
    assert open_stream(tmp_path / "out", "train")[0] == meta


def test_a_disk_that_fills_up_is_reported_and_cleaned(corpus, tmp_path):
    script = tmp_path / "slow_preparation.py"
    script.write_text(SLOW_PREPARATION)
    done = subprocess.run(
        [sys.executable, script, corpus, tmp_path / "out", "0"],
        capture_output=True,
        text=True,
        # A limit on file size stands in for a full disk: the write fails the same way.
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000)),
    )
    assert "no space left while writing to" in done.stderr
    assert set(content(tmp_path / "out")) == {".prepare.lock"}
