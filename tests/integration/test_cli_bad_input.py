"""What a person may get wrong: one screen that says what to do, exit 64, and nothing started or written."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mamba_trainer import cli, launch
from trainer_harness import dataset, options, prepared, trained

#: Lines and columns of a small terminal.
SCREEN = 24


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: Any) -> None:
        pytest.fail("a launcher was started")

    monkeypatch.setattr(launch, "run", started)


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What stands on the screen after a command that must be refused."""

    def call(*words: object, command: Callable[[list[str]], Any] = cli.train_deepspeed) -> str:
        with pytest.raises(SystemExit) as ended:
            command([str(word) for word in words])
        shown = capfd.readouterr()
        assert ended.value.code == 64, shown
        assert shown.out.strip() == "", "a plan, or work that had begun"
        assert "Traceback" not in shown.err
        assert 0 < len(shown.err.splitlines()) <= SCREEN
        return shown.err

    return call


TINY = ("--preset", "tiny")

#: Words of the command line, and what the answer must name.
WRONG: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "unknown preset": (("--preset", "8b_mamba"), ("no preset '8b_mamba'", "Did you mean 7b_mamba?", "tiny")),
    "unknown option": ((*TINY, "--nmu_gpus", "2"), ("--nmu_gpus", "-h")),
    "option of another type": ((*TINY, "--num_gpus", "two"), ("--num_gpus", "integer")),
    "a stray word": ((*TINY, "data"), ("unexpected extra argument", "data")),
    "unknown key": ((*TINY, "--set", "model.d_modle=64"), ("model.d_modle: unknown option",)),
    "unknown group": ((*TINY, "--set", "modle.d_model=64"), ("modle: unknown option",)),
    "a key without a value": ((*TINY, "--set", "training.seed"), ("GROUP.OPTION=VALUE",)),
    "a value that is no YAML": ((*TINY, "--set", "training.seed=[1"), ("training.seed", "not a valid value")),
    "wrong type": ((*TINY, "--set", "training.learning_rate=fast"), ("training.learning_rate", "number", "'fast'")),
    "out of range": ((*TINY, "--set", "training.max_steps=0"), ("training.max_steps", "greater than or equal to 1")),
    "a batch that does not divide": ((*TINY, "--num_gpus", "3"), ("global_batch_size 8", "3 ranks", "use 6 or 9")),
    "ZeRO-0 with offload": (
        (*TINY, "--set", "parallelism.zero_stage=0", "--set", "parallelism.offload_optimizer=cpu"),
        ("offload_optimizer needs ZeRO stage 1, 2 or 3",),
    ),
    "parameters offloaded below ZeRO-3": (
        (*TINY, "--set", "parallelism.zero_stage=2", "--set", "parallelism.offload_parameters=cpu"),
        ("offload_parameters needs ZeRO stage 3",),
    ),
    "pipeline parallelism": ((*TINY, "--set", "pipeline_parallel_size=2"), ("pipeline", "not built yet", "ZeRO-3")),
    "tensor parallelism": (
        (*TINY, "--set", "parallelism.tensor_parallel_size=2"), ("tensor", "not built yet", "ZeRO-3"),
    ),
    "gradient compression": ((*TINY, "--set", "training.gradient_compression=true"), ("gradient compression", "1-bit")),
    "fp16 on a CPU": ((*TINY, "--set", "parallelism.precision=fp16"), ("fp16", "parallelism.precision", "fp32")),
    "a kernel for GPUs on a CPU": (
        (*TINY, "--data", "DATA", "--set", "training.scan_backend=mamba_ssm"), ("mamba_ssm", "CUDA", "torch"),
    ),
    "unknown kernel": ((*TINY, "--set", "training.scan_backend=tpu"), ("training.scan_backend", "'torch'", "'tpu'")),
    "no GPU and no preset": ((), ("no GPU", "--preset tiny", "--dry_run")),
    "a model that does not fit": (("--preset", "7b_mamba", "--data", "DATA"), ("do not fit", "GB", "smaller model")),
    "a card that does not exist": (("--dry_run", "--gpu", "RTX 4099"), ("RTX 4099", "RTX 4090")),
    "a card without a dry run": ((*TINY, "--gpu", "RTX 4090"), ("--dry_run",)),
    "missing configuration": (("--config", "nowhere.yaml"), ("nowhere.yaml", "No such file")),
    "missing DeepSpeed configuration": ((*TINY, "--deepspeed_config", "nowhere.json"), ("nowhere.json",)),
    "missing data": ((*TINY, "--data", "nowhere"), ("nowhere", "mamba-train prepare")),
    "missing checkpoint": ((*TINY, "--load_checkpoint", "nowhere"), ("no checkpoint nowhere",)),
    "missing initial weights": (
        (*TINY, "--data", "DATA", "--set", "checkpoint.initial_weights=nowhere"), ("nowhere", "model.safetensors"),
    ),
    "no data at all": ((*TINY, "--set", "data.builtin=null"), ("no data", "mamba-train prepare", "python-stdlib")),
    "a vocabulary smaller than the tokenizer's": (
        (*TINY, "--data", "DATA", "--set", "model.vocab_size=100"), ("tokenizer 'byte'", "257", "100"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_is_answered_on_one_screen(
    mistake: str, refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words, named = WRONG[mistake]
    answer = refused(*(str(dataset()) if word == "DATA" else word for word in words))
    for part in named:
        assert part in answer
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("model:\n  d_model: 64\n   n_layer: 2\n", ("is not valid YAML", "line 3")),
        ("model: {d_model: 64\n", ("is not valid YAML", "line 2")),
        ("- a list\n", ("must hold a mapping", "list")),
        ("", ("must hold a mapping",)),
        ("preset: tiny\nmodel: {n_layers: many}\n", ("model.n_layer", "'many'")),
        ("preset: tiny\nparallelism:\ntraining: 5\n", ("training", "dictionary", "5")),
        ("preset: tiny\nnum_gpus:\n", ("num_gpus",)),
        ("preset: [tiny]\n", ("preset", "string")),
        ("preset: 1b_mamba\n", ("--preset tiny contradicts preset: 1b_mamba",)),
    ],
)
def test_a_broken_configuration_is_named_with_its_line(
    text: str, named: tuple[str, ...], refused: Callable[..., str], tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    answer = refused("--config", path, *(TINY if "1b" in text else ()))
    assert str(path) in answer or "The configuration is not valid" in answer
    for part in named:
        assert part in answer


def test_data_without_the_named_split_or_too_short_for_a_sequence_are_refused(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    data = prepared(tmp_path, documents=3, words=20, validation_fraction=0)
    answer = refused(*options(tmp_path, data=data, training__sequence_length=100_000))
    assert "lower training.sequence_length" in answer and str(data) in answer
    answer = refused(*options(tmp_path, data=data, data__validation_path=data))
    assert "validation" in answer


def test_damaged_data_are_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    data = prepared(tmp_path, documents=20, words=50, validation_fraction=0)
    for file in data.iterdir():
        if file.stat().st_size > 2000:
            os.truncate(file, 1000)
    assert str(data) in refused(*options(tmp_path, data=data))


def test_a_checkpoint_folder_that_cannot_be_made_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    answer = refused(*options(tmp_path), "--checkpoint_dir", tmp_path / "file" / "checkpoints")
    assert "cannot be written" in answer and "--checkpoint_dir" in answer


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mounted = tmp_path / "disk"
    mounted.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "none", mounted], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield mounted
    subprocess.run(["umount", mounted], check=True)


def test_a_disk_without_room_for_one_checkpoint_is_refused(
    refused: Callable[..., str], tmp_path: Path, small_disk: Path
) -> None:
    answer = refused(*options(tmp_path), "--checkpoint_dir", small_disk / "checkpoints")
    assert "A checkpoint takes" in answer and "free" in answer


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    trained(folder, steps=4)
    return folder


OTHER_RUNS: dict[str, tuple[dict[str, Any], str]] = {
    "another world size": ({"parallelism__num_gpus": 1}, "saved by 2 ranks and this run has 1"),
    "another ZeRO stage": ({"zero_stage": 3}, "parallelism.zero_stage to 2"),
    "another shape": ({"model__d_model": 48}, "another configuration"),
    "another learning rate": ({"training__learning_rate": 0.1}, "another configuration"),
}


@pytest.mark.parametrize("difference", OTHER_RUNS)
def test_a_checkpoint_of_another_run_is_refused_before_anything_is_started(
    difference: str, two_ranks: Path, refused: Callable[..., str]
) -> None:
    settings, named = OTHER_RUNS[difference]
    before = sorted((two_ranks / "checkpoints").iterdir())
    answer = refused(*options(two_ranks, steps=4, **settings))
    assert named in answer and "checkpoints/final" in answer
    assert sorted((two_ranks / "checkpoints").iterdir()) == before


def test_initial_weights_of_another_shape_are_refused(
    two_ranks: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    from mamba_trainer import convert

    convert.export(two_ranks / "checkpoints/final", tmp_path / "weights", "ours")
    answer = refused(*options(tmp_path, model__d_model=48, checkpoint__initial_weights=tmp_path / "weights"))
    assert "backbone.embedding.weight" in answer and "48" in answer


def test_more_gpus_than_the_machine_has_are_refused() -> None:
    from mamba_trainer.contract import UserError
    from mamba_trainer.plan.cards import named
    from mamba_trainer.resolve import Request, resolve

    with pytest.raises(UserError, match=r"4 GPUs are asked for, but there are 2 .*--num_gpus 2"):
        resolve(Request(preset="1b_mamba", num_gpus=4, hardware=named("RTX 4090", 2)))


def test_other_commands_refuse_bad_input_alike(refused: Callable[..., str], tmp_path: Path) -> None:
    cases: list[tuple[list[object], str]] = [
        (["verify", tmp_path / "nowhere"], "There is no checkpoint in"),
        (["export", tmp_path / "nowhere", tmp_path / "out"], "There is no folder"),
        (["import", tmp_path, tmp_path / "out"], "config.json"),
        (["generate", tmp_path / "nowhere"], "nowhere"),
        (["prepare", tmp_path / "nowhere.txt", tmp_path / "out"], "nowhere.txt"),
        (["prepare", __file__, tmp_path / "out", "--tokenizer", "bpe"], "bpe"),
        (["train"], "No such command 'train'"),
    ]
    for words, named in cases:
        assert named in refused(*words, command=cli.main)
    assert list(tmp_path.iterdir()) == []


def test_a_usage_error_has_its_exit_code_in_a_real_process_too() -> None:
    command = [Path(sys.executable).with_name("mamba-train"), "run", "--frobnicate"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 64
    assert "--frobnicate" in ended.stderr
