"""On one machine the launcher restarts what fails: the right restart for each cause, and an end to it."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from launcher_harness import Launch, eventually, stub

AT_ONCE = {"first_delay_seconds": 0.01}


def supervised(tmp_path: Path, delay: float = 0.01, **behaviour: object) -> Launch:
    command = stub(tmp_path, **{"step_seconds": 0.02, **behaviour})
    return Launch(tmp_path, command, supervise=True, restart_policy={"first_delay_seconds": delay})


def attempts(tmp_path: Path) -> int:
    return len(list(tmp_path.glob("ready.*.0")))


@pytest.mark.parametrize("trouble", ["exit:1", "exit:76", "signal:9", "signal:11"])
def test_a_failure_resumes_from_the_last_checkpoint_and_trains_to_the_end(trouble: str, tmp_path: Path) -> None:
    trouble_once = {"trouble": trouble, "rank": 1, "at_step": 5, "attempts": 1, "stuck_without_it": True}
    launch = supervised(tmp_path, steps=6, save_every=2, **trouble_once)
    assert launch.wait() == 0
    assert attempts(tmp_path) == 2
    assert "Next start: step 4." in launch.text()
    assert launch.message()["resumedFromStep"] == 4
    assert launch.message()["reason"] == "Done"


@pytest.mark.parametrize("code", [64, 71, 72, 93])
def test_what_no_retry_helps_is_not_retried(code: int, tmp_path: Path) -> None:
    launch = supervised(tmp_path, trouble=f"exit:{code}", rank=1)
    assert launch.wait() == code
    assert attempts(tmp_path) == 1


def test_a_hang_is_restarted(tmp_path: Path) -> None:
    command = stub(tmp_path, steps=60, save_every=30, trouble="hang", at_step=40, attempts=1, stuck_without_it=True)
    limits = {"step_floor": 1.0, "step_factor": 2.0}
    launch = Launch(tmp_path, command, limits=limits, supervise=True, restart_policy=AT_ONCE)
    assert launch.wait() == 0
    assert "Hang: attempt 1 in 0.01 s. Next start: step 30." in launch.text()


def test_out_of_memory_starts_again_with_the_smaller_plan_until_there_is_none(tmp_path: Path) -> None:
    plans = [stub(tmp_path, trouble="fail:70", steps=100), stub(tmp_path, trouble="fail:70", steps=101)]
    launch = Launch(tmp_path, stub(tmp_path, trouble="fail:70"), supervise=True, smaller_plans=plans)
    assert launch.wait() == 70
    assert attempts(tmp_path) == 3
    assert launch.text().count("with a smaller plan") == 2
    assert "no smaller plan exists" in launch.text()


def test_out_of_memory_with_a_plan_that_fits_trains_to_the_end(tmp_path: Path) -> None:
    launch = Launch(
        tmp_path, stub(tmp_path, trouble="fail:70"), supervise=True, smaller_plans=[stub(tmp_path, steps=2)]
    )
    assert launch.wait() == 0


def test_three_attempts_without_a_newer_checkpoint_end_with_the_diagnosis(tmp_path: Path) -> None:
    launch = supervised(tmp_path, steps=100, save_every=2, trouble="exit:9", rank=-1, at_step=3)
    assert launch.wait() == 9
    # The first saved step 2; those after it resumed there, and failed there.
    assert attempts(tmp_path) == 4
    assert "NoProgress: 3 attempts in a row started from step 2" in launch.text()


def test_a_stop_seen_by_a_rank_alone_is_resumed_without_budget(tmp_path: Path) -> None:
    launch = supervised(tmp_path, steps=200)
    pid = launch.rank_pid(1)
    next(process for process in launch.family() if process.pid == pid).terminate()
    eventually(lambda: list(tmp_path.glob("step.*")) != [], "the ranks save")
    (tmp_path / "stop").unlink()
    assert launch.wait() == 0
    assert "SavedAndStopped: attempt" in launch.text()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_asked_of_the_launcher_ends_supervision_with_75(signum: signal.Signals, tmp_path: Path) -> None:
    launch = supervised(tmp_path, steps=10_000)
    launch.ranks_train()
    launch.send(signum)
    assert launch.wait() == 75
    assert attempts(tmp_path) == 1


def test_a_stop_during_the_delay_ends_at_once(tmp_path: Path) -> None:
    launch = supervised(tmp_path, delay=100, trouble="exit:1")
    eventually(lambda: "attempt 1 in 100 s" in launch.text(), "the launcher waits")
    launch.send(signal.SIGTERM)
    started = time.monotonic()
    assert launch.wait() == 75
    assert time.monotonic() - started < 3
    assert attempts(tmp_path) == 1


def test_in_a_pod_nothing_is_restarted(tmp_path: Path) -> None:
    launch = Launch(tmp_path, stub(tmp_path, trouble="exit:1"), supervise=False)
    assert launch.wait() == 1
    assert attempts(tmp_path) == 1
