"""Signals to the launcher and to its ranks, and hangs: who saves, who ends, with which code."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher_harness import Launch, all_gone, eventually, stub

LONG_SAVE_SECONDS = 31.0
STOPS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


@pytest.fixture(scope="module", autouse=True)
def long_save(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    """Started before all tests of this module, so that they run while it saves."""
    folder = tmp_path_factory.mktemp("long_save")
    launch = Launch(folder, stub(folder, steps=10_000, save_seconds=LONG_SAVE_SECONDS), limits={"other_phase": 1.0})
    launch.ranks_train()
    launch.send(signal.SIGTERM)
    yield launch
    launch.process.kill()


def training(tmp_path: Path, **behaviour: object) -> Launch:
    launch = Launch(tmp_path, stub(tmp_path, steps=10_000, **behaviour))
    launch.ranks_train()
    return launch


def saving(launch: Launch) -> None:
    eventually(lambda: (launch.folder / "stop").exists(), "the ranks learn of the stop")
    time.sleep(0.3)


@pytest.mark.parametrize("signum", STOPS)
def test_a_stop_signal_to_the_launcher_saves_and_ends_all_with_75(signum: signal.Signals, tmp_path: Path) -> None:
    launch = training(tmp_path)
    launch.send(signum)
    assert launch.wait() == 75
    assert list(tmp_path.glob("step.*"))
    message = launch.message()
    assert (message["reason"], message["exitCode"], message["message"]) == ("SavedAndStopped", 75, "")
    assert message["lastCheckpointStep"] == message["step"] > 0


@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_to_any_rank_saves_and_ends_all_with_75(rank: int, tmp_path: Path) -> None:
    launch = training(tmp_path)
    family = launch.family()
    next(process for process in family if process.pid == launch.rank_pid(rank)).terminate()
    assert launch.wait() == 75
    assert all_gone(family)


def test_a_second_sigterm_changes_nothing_and_each_rank_sees_one(tmp_path: Path) -> None:
    launch = training(tmp_path, save_seconds=1.5)
    launch.send(signal.SIGTERM)
    saving(launch)
    launch.send(signal.SIGTERM)
    launch.send(signal.SIGTERM)
    assert launch.wait() == 75
    assert [(tmp_path / f"sigterms.{rank}").read_text() for rank in (0, 1)] == ["x", "x"]


def test_a_second_ctrl_c_ends_all_at_once_with_130(tmp_path: Path) -> None:
    launch = training(tmp_path, save_seconds=60)
    family = launch.family()
    launch.send(signal.SIGINT)
    saving(launch)
    launch.send(signal.SIGINT)
    assert launch.wait(5) == 130
    assert all_gone(family)
    assert launch.message()["reason"] == "Interrupted"
    assert not list(tmp_path.glob("step.*"))


def test_one_ctrl_c_after_sigterm_does_not_break_the_save_off(tmp_path: Path) -> None:
    launch = training(tmp_path, save_seconds=1.5)
    launch.send(signal.SIGTERM)
    saving(launch)
    launch.send(signal.SIGINT)
    assert launch.wait() == 75


def test_ranks_that_were_not_up_yet_had_nothing_to_save_and_it_is_a_stop_all_the_same(tmp_path: Path) -> None:
    launch = Launch(tmp_path, ["sh", "-c", f"touch {tmp_path}/up.$RANK; exec sleep 100"])
    eventually(lambda: len(list(tmp_path.glob("up.*"))) == 2, "both ranks start")
    launch.send(signal.SIGTERM)
    assert launch.wait() == 75


def test_a_rank_that_fails_while_it_saves_ends_all_with_its_code(tmp_path: Path) -> None:
    launch = training(tmp_path, save_seconds=20)
    family = launch.family()
    launch.send(signal.SIGTERM)
    saving(launch)
    next(process for process in family if process.pid == launch.rank_pid(1)).kill()
    assert launch.wait(10) == 137
    assert all_gone(family)


def test_a_stopped_launcher_that_wakes_up_takes_nobody_for_hung(tmp_path: Path) -> None:
    launch = Launch(tmp_path, stub(tmp_path, steps=80), limits={"step_floor": 1.0, "heartbeat": 2.0})
    launch.ranks_train()
    launch.send(signal.SIGSTOP)
    time.sleep(3)
    launch.send(signal.SIGCONT)
    assert launch.wait() == 0


def test_a_hang_is_found_its_stack_is_kept_and_all_end_with_73(tmp_path: Path) -> None:
    command = stub(tmp_path, steps=1000, trouble="hang", rank=1, at_step=40, stuck_without_it=True)
    launch = Launch(tmp_path, command, limits={"step_floor": 1.0, "step_factor": 2.0})
    assert launch.wait() == 73
    message = launch.message()
    assert (message["reason"], message["step"]) == ("Hang", 40)
    assert "wait_for_ever" in message["message"]
    assert "beats but has been Training at step 40" in message["message"]


def test_a_stopped_rank_beats_no_more_and_all_end_with_73(tmp_path: Path) -> None:
    launch = Launch(tmp_path, stub(tmp_path, steps=1000, trouble="signal:19", rank=1), limits={"heartbeat": 2.0})
    assert launch.wait() == 73
    assert launch.message()["rank"] == 1
    assert "has not beaten" in launch.message()["message"]


def test_a_save_of_more_than_30_seconds_survives_sigterm(long_save: Launch) -> None:
    assert long_save.wait(60) == 75
    assert list(long_save.folder.glob("step.*"))
    assert long_save.message()["lastCheckpointStep"] == long_save.message()["step"]
