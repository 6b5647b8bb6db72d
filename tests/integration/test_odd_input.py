"""What a user may do that nobody planned for: the run goes on, or the answer says what to do."""

from __future__ import annotations

import os
import signal
import struct
import threading
from pathlib import Path

import numpy as np
import pytest

from mamba_trainer import cli, convert
from mamba_trainer.contract import UserError
from trainer_harness import Training, checkpoints, last_step, options, paced, trained


def _killed_once(rank: int, attempt: int) -> None:
    paced(rank, attempt)
    if rank == 1 and attempt == 0:
        threading.Timer(0.6, os.kill, (os.getpid(), signal.SIGKILL)).start()


def test_a_run_that_was_restarted_and_then_stopped_resumes_when_it_is_started_again(tmp_path: Path) -> None:
    words = options(tmp_path, steps=60, checkpoint__interval=5)
    first = Training(tmp_path, words, before=_killed_once)
    first.reaches(40)
    first.interrupt()
    assert first.wait() == 75, first.text()
    assert "attempt 1 in" in first.text()

    again = Training(tmp_path, words)
    assert again.wait() == 0, again.text()
    assert "final" in checkpoints(tmp_path)
    assert "resumed from" in again.text().rpartition("stopped on request")[2]


def _megatron_files(stem: Path, documents: int = 50, length: int = 200) -> Path:
    tokens = np.random.default_rng(0).integers(0, 257, documents * length).astype("<u2")
    stem.with_suffix(".bin").write_bytes(tokens.tobytes())
    stem.with_suffix(".idx").write_bytes(
        b"MMIDIDX\0\0"
        + struct.pack("<QBQQ", 1, 8, documents, documents + 1)
        + np.full(documents, length, "<i4").tobytes()
        + (np.arange(documents) * length * 2).astype("<i8").tobytes()
        + np.arange(documents + 1).astype("<i8").tobytes()
    )
    return stem


def test_a_run_on_megatron_files_ends_well_without_a_sample(tmp_path: Path) -> None:
    run = trained(tmp_path, steps=3, data=_megatron_files(tmp_path / "megatron"))
    assert "mamba-train export" in run.text() and "continues" not in run.text()


@pytest.mark.parametrize("leftover", [{"RANK": "1"}, {"RANK": "0", "WORLD_SIZE": "4"}, {"LOCAL_RANK": "3"}])
def test_what_another_launcher_left_in_the_shell_changes_nothing(leftover: dict[str, str], tmp_path: Path) -> None:
    run = Training(tmp_path, options(tmp_path, steps=2), environ=leftover)
    assert run.wait() == 0, run.text()
    assert last_step(tmp_path) == 2


def test_a_mistake_is_told_whatever_rank_the_shell_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        cli.main(["verify", str(tmp_path / "nowhere")])
    assert "nowhere" in capfd.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["--prompt", "a\udcffb"], ["--temperature", "-1"], ["--top_k", "-1"], ["--top_p", "2"],
        ["--seed", str(2**70)], ["--max_new_tokens", "-1"], ["--data", "/tmp"],
    ],
)  # fmt: skip
def test_a_wrong_option_of_generate_is_a_user_error(
    words: list[str], one_checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["generate", str(one_checkpoint), *words])
    assert ended.value.code == 64
    assert "Traceback" not in capfd.readouterr().err


@pytest.fixture(scope="module")
def one_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    trained(folder, steps=1, training__warmup_steps=1)
    return folder / "checkpoints/final"


def test_export_names_a_checkpoint_of_a_folder_and_a_place_that_cannot_be_written(
    one_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"name one of them, for example .*/checkpoints/final"):
        convert.export(one_checkpoint.parent, tmp_path / "out", "hf")
    with pytest.raises(UserError, match=r"Cannot write to .*Name another folder"):
        convert.export(one_checkpoint, Path("/proc/out"), "hf")


def _refused(words: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.train_deepspeed(words)
    shown = capfd.readouterr()
    assert ended.value.code == 64 and shown.out == "", shown
    return shown.err


def test_a_checkpoint_of_another_model_is_refused_with_the_difference(
    one_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [*options(tmp_path, model__d_model=48, model__n_layer=3), "--load_checkpoint", str(one_checkpoint)]
    answer = _refused(words, capfd)
    assert "d_model: 32, here 48" in answer and "n_layer: 2, here 3" in answer


def test_a_folder_of_checkpoints_or_any_other_is_not_taken_for_one(
    one_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for folder, said in ((one_checkpoint.parent, str(one_checkpoint)), (tmp_path, "name a folder step_N or final")):
        assert said in _refused([*options(tmp_path), "--load_checkpoint", str(folder)], capfd)


@pytest.mark.parametrize("data", ["", "."])
def test_data_without_a_name_are_refused(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "mamba-train prepare" in _refused([*options(tmp_path), "--data", data], capfd)


def test_a_wrong_value_is_named_by_its_option_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    answer = _refused(options(tmp_path, training__recompute="some", parallelism__precision="int8"), capfd)
    assert "training.recompute: Input should be 'auto', 'none' or 'all' (given: 'some')" in answer
    assert "parallelism.precision: Input should be 'bf16', 'fp16' or 'fp32' (given: 'int8')" in answer
