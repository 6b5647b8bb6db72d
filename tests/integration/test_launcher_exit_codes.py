"""Real processes: each way in which a rank can end gives the launcher's exit code and termination message."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import pytest

from launcher_harness import Launch, all_gone, eventually, running, stub
from mamba_trainer.launch import LaunchSpec, Limits, run

QUICK = Limits(poll=0.1, failure_grace=0.2, peer_lost_grace=0.5, finish_grace=0.5)


def shell(script: str, tmp_path: Path, ranks: int = 2, limits: Limits = QUICK) -> int:
    """Ranks that need no Python, so that a whole table of ends is quick."""
    return run(
        LaunchSpec(
            ["sh", "-c", script],
            nproc_per_node=ranks,
            limits=limits,
            termination_log=tmp_path / "termination",
        )
    )


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("code", [1, 2, 64, 70, 71, 72, 73, 93, 255])
def test_a_failure_of_any_rank_ends_all_with_its_code(code: int, rank: int, tmp_path: Path) -> None:
    assert shell(f'[ "$RANK" = {rank} ] && exit {code}; exec sleep 100', tmp_path) == code
    assert f'"exitCode":{code},"rank":{rank}' in (tmp_path / "termination").read_text()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGINT, signal.SIGTERM])
def test_a_rank_that_dies_by_a_signal_ends_all_with_128_and_its_number(
    signum: signal.Signals, rank: int, tmp_path: Path
) -> None:
    assert shell(f'[ "$RANK" = {rank} ] && kill -{signum.value} $$; exec sleep 100', tmp_path) == 128 + signum


@pytest.mark.parametrize(("codes", "expected"), [("0 0", 0), ("75 75", 75), ("0 75", 75), ("75 1", 1)])
def test_ranks_that_end_by_themselves(codes: str, expected: int, tmp_path: Path) -> None:
    assert shell(f'set -- {codes}; [ "$RANK" = 1 ] && shift; exit $1', tmp_path) == expected


@pytest.mark.parametrize("rank", [0, 1])
def test_a_lost_peer_is_never_the_root_cause(rank: int, tmp_path: Path) -> None:
    assert shell(f'[ "$RANK" = {rank} ] && exit 76; sleep 0.3; exit 70', tmp_path) == 70


def test_a_lost_peer_alone_is_76(tmp_path: Path) -> None:
    assert shell('[ "$RANK" = 0 ] && exit 76; exec sleep 100', tmp_path) == 76


def test_a_rank_that_does_not_leave_after_the_others_are_done_is_killed_and_the_run_is_done(
    tmp_path: Path,
) -> None:
    assert shell('[ "$RANK" = 0 ] && exit 0; exec sleep 100', tmp_path) == 0


def test_all_are_gone_also_if_a_rank_ignores_sigterm_and_another_is_stopped(tmp_path: Path) -> None:
    script = 'trap "" TERM; case $RANK in 0) sleep 0.3; exit 3;; 1) kill -STOP $$;; esac; sleep 99; sleep 99'
    started = time.monotonic()
    assert shell(script, tmp_path, ranks=3) == 3
    assert time.monotonic() - started < 10


def test_what_ranks_have_started_ends_with_them(tmp_path: Path) -> None:
    script = f'sleep 100 & echo $! > {tmp_path}/child.$RANK; [ "$RANK" = 1 ] && exit 0; sleep 0.3; exit 9'
    assert shell(script, tmp_path) == 9
    for rank in (0, 1):
        pid = int((tmp_path / f"child.{rank}").read_text())
        eventually(lambda pid=pid: not running(pid), "the child is gone")  # type: ignore[misc]


def test_the_last_lines_of_the_failing_rank_are_its_message(tmp_path: Path) -> None:
    launch = Launch(tmp_path, stub(tmp_path, trouble="exit:3", rank=1, at_step=2, save_every=1, stuck_without_it=True))
    assert launch.wait() == 3
    message = launch.message()
    assert message["message"] == "last words of rank 1"
    assert (message["reason"], message["exitCode"], message["rank"]) == ("Infrastructure", 3, 1)
    assert (message["step"], message["resumedFromStep"], message["lastCheckpointStep"]) == (2, 0, 1)
    assert "[rank 1] last words of rank 1" in launch.text()
    assert "rank 1 ended with 3 at step 2: last words of rank 1" in launch.text()


def test_what_a_rank_reported_of_its_error_is_its_message(tmp_path: Path) -> None:
    launch = Launch(tmp_path, stub(tmp_path, trouble="fail:70", rank=1, stuck_without_it=True))
    assert launch.wait() == 70
    assert launch.message()["reason"] == "OutOfMemory"
    assert launch.message()["message"] == "the device is full; use a smaller micro-batch"


def test_a_long_output_ends_in_a_message_of_at_most_4_kib(tmp_path: Path) -> None:
    script = 'i=0; while [ $i -lt 300 ]; do echo "line $i of many words" >&2; i=$((i+1)); done; exit 5'
    assert shell(script, tmp_path, ranks=1) == 5
    raw = (tmp_path / "termination").read_bytes()
    assert len(raw) <= 4096
    assert b"line 299 of many words" in raw


def test_the_stdout_of_rank_0_passes_unchanged_and_that_of_others_is_marked(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert shell('printf "one\\rtwo $RANK\\n"; echo err >&2', tmp_path) == 0
    out, err = capfd.readouterr()
    assert out == "one\rtwo 0\n"
    assert "[rank 1] one\rtwo 1\n" in err
    assert "[rank 1] err\n" in err
    assert err.count("err\n") == 2


def test_a_rank_that_dies_never_leaves_one_that_waits_for_it(tmp_path: Path) -> None:
    command = stub(tmp_path, trouble="signal:9", rank=1, stuck_without_it=True, ignore_sigterm=True, child=True)
    launch = Launch(tmp_path, command)
    launch.ranks_train()
    family = launch.family()
    assert launch.wait() == 137
    assert all_gone(family)


def test_nothing_is_left_when_the_launcher_itself_is_killed(tmp_path: Path) -> None:
    launch = Launch(tmp_path, stub(tmp_path, steps=10_000, ignore_sigterm=True, child=True))
    launch.ranks_train()
    family = launch.family()
    assert len(family) == 5, "two ranks, a child of each, the guard"
    launch.send(signal.SIGKILL)
    launch.wait()
    assert all_gone(family)


def test_a_command_that_does_not_exist_is_a_user_error(tmp_path: Path) -> None:
    launch = Launch(tmp_path, ["/no/such/trainer"])
    assert launch.wait() == 64
    assert "Cannot start /no/such/trainer: No such file or directory." in launch.text()
    assert launch.message()["reason"] == "UserError"


def test_an_unwritable_termination_log_costs_a_warning_only(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spec = LaunchSpec([sys.executable, "-c", ""], termination_log=tmp_path / "no" / "folder", limits=QUICK)
    assert run(spec) == 0
    assert "cannot write the termination message" in capfd.readouterr().err
