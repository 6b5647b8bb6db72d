"""A run that was killed or stopped, and started again, is the run that was never interrupted."""

from __future__ import annotations

import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mamba_trainer.data.dataset import TokenDataset
from trainer_harness import (
    GLOBAL_BATCH,
    SEQUENCE,
    Training,
    checkpoints,
    options,
    paced,
    prepared,
    same_weights,
    steps,
    trained,
)

STEPS = 30


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Path]]:
    done: dict[int, Path] = {}

    def run(zero_stage: int) -> Path:
        if zero_stage not in done:
            done[zero_stage] = tmp_path_factory.mktemp(f"zero-{zero_stage}")
            trained(done[zero_stage], zero_stage=zero_stage, steps=STEPS)
        return done[zero_stage]

    yield run


def numbers(folder: Path) -> dict[int, set[tuple[Any, ...]]]:
    """By step, all that was ever logged of it, but for times: one row, or a step that was repeated differed."""
    logged: dict[int, set[tuple[Any, ...]]] = {}
    for row in steps(folder):
        values = tuple(row[name] for name in ("loss", "learning_rate", "gradient_norm", "applied", "samples"))
        logged.setdefault(row["step"], set()).add(values)
    return logged


def assert_as_if_never_stopped(folder: Path, whole: Path) -> None:
    assert numbers(folder) == numbers(whole)
    assert sorted(numbers(folder)) == list(range(1, STEPS + 1))
    assert same_weights(folder / "checkpoints/final", whole / "checkpoints/final")


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_killed_rank_is_started_again_from_the_newest_checkpoint_to_the_same_bits(
    zero_stage: int, uninterrupted: Callable[[int], Path], tmp_path: Path
) -> None:
    run = Training(tmp_path, options(tmp_path, zero_stage=zero_stage, steps=STEPS), before=paced)
    run.reaches(random.Random(zero_stage).randint(5, 20))
    run.ranks()[zero_stage % 2].kill()
    assert run.wait() == 0, run.text()
    text = run.text()
    assert "137 (SIGKILL)" in text and "attempt 1 in" in text
    resumed = int(text.partition("resumed from ")[2].partition("at step ")[2].split()[0])
    assert resumed % 4 == 0 and resumed >= 4
    assert run.message()["resumedFromStep"] == resumed
    assert_as_if_never_stopped(tmp_path, uninterrupted(zero_stage))


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_killed_altogether_and_started_again_it_says_from_which_step_it_goes_on(
    zero_stage: int, uninterrupted: Callable[[int], Path], tmp_path: Path
) -> None:
    arguments = options(tmp_path, zero_stage=zero_stage, steps=STEPS)
    run = Training(tmp_path, arguments, before=paced)
    run.reaches(9)
    ranks = run.ranks()
    run.send(signal.SIGKILL)
    assert run.wait() == 137
    for rank in ranks:
        rank.wait(5)  # the guard leaves none behind
    newest = max(int(name.removeprefix("step_")) for name in checkpoints(tmp_path) if "." not in name)
    again = Training(tmp_path, arguments)
    assert again.wait() == 0, again.text()
    assert f"resumed from {tmp_path}/checkpoints/step_{newest} at step {newest}\n" in again.text()
    assert_as_if_never_stopped(tmp_path, uninterrupted(zero_stage))


def test_a_run_that_is_complete_says_so_and_changes_nothing(tmp_path: Path) -> None:
    trained(tmp_path)
    before = [(path, path.stat().st_mtime_ns) for path in sorted((tmp_path / "checkpoints/final").iterdir())]
    again = trained(tmp_path)
    assert "final is complete and verified (step 12): there is nothing left to train" in again.text()
    assert [(path, path.stat().st_mtime_ns) for path in sorted((tmp_path / "checkpoints/final").iterdir())] == before
    assert len(steps(tmp_path)) == 12


def record_samples(folder: Path) -> Callable[[int, int], None]:
    """A `before` that notes which samples each rank reads for training."""

    def before(rank: int, attempt: int) -> None:
        paced()
        batch = TokenDataset.batch

        def noting(dataset: TokenDataset, ids: Any) -> Any:
            with (folder / f"samples.{rank}").open("a") as file:
                file.writelines(f"{number}\n" for number in ids)
            return batch(dataset, ids)

        TokenDataset.batch = noting  # type: ignore[method-assign]

    return before


def test_every_sample_is_read_once_an_epoch_across_a_stop_at_a_random_step(tmp_path: Path) -> None:
    data = prepared(tmp_path, documents=12, words=60, validation_fraction=0)
    epoch = len(TokenDataset.open(data, "train", SEQUENCE))
    count = 2 * epoch // GLOBAL_BATCH
    assert count > 15
    arguments = options(tmp_path, steps=count, data=data)
    run = Training(tmp_path, arguments, before=record_samples(tmp_path))
    run.reaches(random.randint(2, 10))
    run.send(signal.SIGTERM)
    assert run.wait() == 75, run.text()
    again = Training(tmp_path, arguments, before=record_samples(tmp_path))
    assert again.wait() == 0, again.text()
    assert "resumed from" in again.text()
    per_rank = [(tmp_path / f"samples.{rank}").read_text().split() for rank in range(2)]
    read = Counter(per_rank[0] + per_rank[1])
    assert read.total() == count * GLOBAL_BATCH
    assert set(read) == {str(number) for number in range(epoch)}
    assert sum(2 - times for times in read.values()) == 2 * epoch - count * GLOBAL_BATCH < GLOBAL_BATCH
    assert max(read.values()) == 2
    assert [row["samples"] for row in steps(tmp_path)] == [GLOBAL_BATCH * step for step in range(1, count + 1)]
