"""However a stop arrives, all ranks agree on it within a step and leave one complete checkpoint."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from launcher_harness import eventually
from mamba_trainer import session
from mamba_trainer.checkpoint.verify import verify
from trainer_harness import Training, checkpoints, last_step, options, paced

Stop = Callable[[Training], object]

TO_ALL: dict[str, Stop] = {
    "SIGTERM to the launcher": lambda run: run.send(signal.SIGTERM),
    "a closed terminal": lambda run: run.send(signal.SIGHUP),
    "Ctrl-C": lambda run: run.interrupt(),
}
TO_ONE: dict[str, Stop] = {
    "SIGTERM to rank 0": lambda run: run.ranks()[0].send_signal(signal.SIGTERM),
    "SIGTERM to rank 1": lambda run: run.ranks()[1].send_signal(signal.SIGTERM),
    "SIGINT to rank 1": lambda run: run.ranks()[1].send_signal(signal.SIGINT),
}


def stopped_at(run: Training, stop: Stop) -> int:
    """The step at which all ranks saved one checkpoint, soon after `stop`."""
    run.reaches(3)
    stop(run)
    noticed = last_step(run.folder)
    eventually(lambda: bool(committed(run)), f"a checkpoint\n{run.text()}")
    (name,) = committed(run)
    saved = verify(run.folder / "checkpoints" / name).step
    assert 3 <= saved <= noticed + 2
    return saved


def committed(run: Training) -> list[str]:
    return [name for name in checkpoints(run.folder) if "." not in name]


@pytest.mark.parametrize("stop", TO_ALL)
def test_a_stop_is_agreed_within_a_step_saved_once_and_ends_with_75(stop: str, tmp_path: Path) -> None:
    run = Training(tmp_path, options(tmp_path, steps=1000, checkpoint__interval=0), before=paced)
    saved = stopped_at(run, TO_ALL[stop])
    assert run.wait(20) == 75, run.text()
    assert last_step(tmp_path) == saved
    message = run.message()
    assert (message["reason"], message["exitCode"], message["message"]) == ("SavedAndStopped", 75, "")
    assert (message["step"], message["lastCheckpointStep"]) == (saved, saved)
    assert f"Next start: step {saved}." in run.text()
    assert "Traceback" not in run.text()


@pytest.mark.parametrize("stop", TO_ONE)
def test_a_stop_that_one_rank_saw_is_agreed_by_all_and_supervision_goes_on_from_there(
    stop: str, tmp_path: Path
) -> None:
    run = Training(tmp_path, options(tmp_path, steps=1000, checkpoint__interval=0), before=paced)
    saved = stopped_at(run, TO_ONE[stop])
    run.reaches(saved + 2)
    run.send(signal.SIGTERM)
    assert run.wait(20) == 75
    assert f"SavedAndStopped: attempt 1 in 0 s. Next start: step {saved}." in run.text()
    assert f"at step {saved}\n" in run.text().partition("resumed from")[2]
    assert run.message()["resumedFromStep"] == saved


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    run = Training(tmp_path, options(tmp_path, steps=1000), before=lambda *_: paced(seconds=3))
    run.reaches(1)
    ranks = run.ranks()
    run.interrupt()
    time.sleep(0.3)
    started = time.monotonic()
    run.interrupt()
    assert run.wait(5) == 130
    assert time.monotonic() - started < 2
    assert not psutil.wait_procs(ranks, timeout=2)[1]
    assert run.message()["reason"] == "Interrupted"


def never_ready(rank: int, attempt: int) -> None:
    """A `before`: at the first attempt, building the model takes an hour."""
    if attempt == 0:
        session.train = lambda *_: time.sleep(3600)


def start_up(run: Training) -> None:
    eventually(lambda: len(run.ranks()) == 2, "two ranks")
    time.sleep(0.5)


@pytest.mark.parametrize("stop", TO_ALL)
def test_a_stop_before_the_first_step_ends_soon_with_nothing_to_save(stop: str, tmp_path: Path) -> None:
    run = Training(tmp_path, options(tmp_path), before=never_ready)
    start_up(run)
    TO_ALL[stop](run)
    assert run.wait(5) == 75, run.text()
    assert checkpoints(tmp_path) == []
    assert run.message()["reason"] == "SavedAndStopped"
    assert "before the first step: there is nothing to save" in run.text()
    assert "Next start: from the newest checkpoint, if there is one." in run.text()
    assert "Traceback" not in run.text()


@pytest.mark.parametrize("stop", TO_ONE)
def test_a_stop_that_one_rank_saw_before_the_first_step_starts_all_again(stop: str, tmp_path: Path) -> None:
    run = Training(tmp_path, options(tmp_path), before=never_ready)
    start_up(run)
    TO_ONE[stop](run)
    assert run.wait(20) == 0, run.text()
    assert "SavedAndStopped: attempt 1 in 0 s" in run.text()
