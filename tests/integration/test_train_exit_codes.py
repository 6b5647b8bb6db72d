"""How a run ends when something is wrong, and what follows: real ranks under the real supervisor."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mamba_trainer import convert
from mamba_trainer.convert.weights import write_safetensors
from mamba_trainer.engine import Engine
from trainer_harness import Training, checkpoints, options, paced, steps, trained


def out_of_memory_above(micro_batch: int) -> Callable[[int, int], None]:
    """A `before`: on rank 1, a micro-batch of more than `micro_batch` sequences does not fit the device."""

    def before(rank: int, attempt: int) -> None:
        micro_step = Engine.micro_step

        def limited(engine: Engine, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            if rank == 1 and len(tokens) > micro_batch:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return micro_step(engine, tokens, targets)

        Engine.micro_step = limited  # type: ignore[method-assign]

    return before


def test_out_of_device_memory_is_answered_with_a_smaller_plan_until_it_fits(tmp_path: Path) -> None:
    run = trained(tmp_path, before=out_of_memory_above(1))
    assert "rank 1 ended with 70 (OUT_OF_MEMORY)" in run.text()
    assert "with a smaller plan" in run.text()
    plans = [json.loads(path.read_text())["plan"] for path in sorted((tmp_path / "checkpoints").glob("run*.json"))]
    assert {plan["micro_batch_size"] * plan["accumulation_steps"] for plan in plans} == {2}
    assert min(plan["micro_batch_size"] for plan in plans) == 1
    assert [row["step"] for row in steps(tmp_path)] == list(range(1, 13))


def test_out_of_device_memory_without_a_smaller_plan_ends_with_70_and_settings_to_try(tmp_path: Path) -> None:
    arguments = options(tmp_path, training__micro_batch_size=1, training__recompute="all")
    run = Training(tmp_path, arguments, before=out_of_memory_above(0))
    assert run.wait() == 70, run.text()
    message = run.message()
    assert (message["reason"], message["exitCode"], message["rank"]) == ("OutOfMemory", 70, 1)
    assert "Tried to allocate 2.00 GiB" in message["message"]
    assert "more GPUs, a higher stage or offload" in message["message"]
    assert "no smaller plan exists" in run.text()
    assert "Traceback" not in run.text()


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("done")
    trained(folder)
    return folder / "checkpoints" / "final"


@pytest.mark.parametrize(("zero_stage", "precision"), [(0, "fp32"), (2, "fp32"), (3, "bf16")])
def test_steps_that_stay_non_finite_end_with_71_and_say_so(
    zero_stage: int, precision: str, done: Path, tmp_path: Path
) -> None:
    poisoned = tmp_path / "poisoned"
    convert.export(done, poisoned, "ours")
    _, weights = convert.open_model(poisoned)
    tensors = {name: weights.read(name).clone() for name in weights.shapes}
    tensors["backbone.norm_f.weight"][0] = float("nan")
    write_safetensors(poisoned, replace(weights, read=tensors.__getitem__), torch.float32)
    arguments = options(
        tmp_path, zero_stage=zero_stage, parallelism__precision=precision, checkpoint__initial_weights=poisoned,
        training__max_nonfinite_steps=3,
    )  # fmt: skip
    run = Training(tmp_path, arguments)
    assert run.wait() == 71, run.text()
    message = run.message()
    assert (message["reason"], message["exitCode"], message["step"]) == ("NumericalInstability", 71, 3)
    assert "learning_rate" in message["message"]
    assert run.text().count("SKIPPED (gradients not finite)") == 3
    assert [(row["loss"], row["applied"]) for row in steps(tmp_path)] == [(None, False)] * 3
    assert checkpoints(tmp_path) == []
    assert "Next start: from the beginning." in run.text()
    assert "attempt 1" not in run.text() and "Traceback" not in run.text()


def truncate(checkpoint: Path) -> None:
    shard = next(checkpoint.glob("*optim_states.pt"))
    os.truncate(shard, shard.stat().st_size // 2)


def test_with_only_damaged_checkpoints_it_ends_with_72_and_never_from_the_beginning(tmp_path: Path) -> None:
    run = Training(tmp_path, options(tmp_path, checkpoint__save_final=False))
    assert run.wait() == 0
    for name in checkpoints(tmp_path):
        truncate(tmp_path / "checkpoints" / name)
    again = Training(tmp_path, options(tmp_path, checkpoint__save_final=False))
    assert again.wait() == 72, again.text()
    message = again.message()
    assert (message["reason"], message["exitCode"]) == ("NoValidCheckpoint", 72)
    assert "2 in quarantine" in message["message"]
    assert checkpoints(tmp_path) == ["step_4.quarantine", "step_8.quarantine"]
    assert len(steps(tmp_path)) == 12
    assert "Traceback" not in again.text()


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used(tmp_path: Path) -> None:
    trained(tmp_path, checkpoint__save_final=False)
    truncate(tmp_path / "checkpoints/step_8")
    again = trained(tmp_path, checkpoint__save_final=False)
    assert "checkpoint step_8 does not verify" in again.text()
    assert "at step 4\n" in again.text()
    assert checkpoints(tmp_path) == ["step_4", "step_8", "step_8.quarantine"]


def test_a_second_run_on_the_same_folder_ends_the_first_with_93(tmp_path: Path) -> None:
    first = Training(tmp_path / "first", slow := options(tmp_path, steps=60), before=paced)
    first.reaches(2, tmp_path)
    second = Training(tmp_path / "second", slow)
    assert first.wait() == 93, first.text()
    assert first.message()["reason"] == "Fenced"
    assert "now belongs to a run that was started later" in first.text()
    assert second.wait() == 0, second.text()


def test_an_error_of_ours_ends_with_1_and_its_traceback_after_three_attempts(tmp_path: Path) -> None:
    def before(rank: int, attempt: int) -> None:
        def broken(*_: Any) -> None:
            raise ZeroDivisionError("a defect")

        Engine.micro_step = broken  # type: ignore[assignment,method-assign]

    run = Training(tmp_path, options(tmp_path), before=before)
    assert run.wait() == 1, run.text()
    assert run.message()["message"].rstrip().endswith("ZeroDivisionError: a defect")
    assert "attempt 2 in" in run.text() and "attempt 3 in" not in run.text()
