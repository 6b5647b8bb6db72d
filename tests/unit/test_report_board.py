"""Ranks report through shared memory: what one process writes, another reads whole."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mamba_trainer.contract import Env, Phase
from mamba_trainer.report import RankRecord, RankReporter, ReportBoard


@pytest.fixture
def board(tmp_path: Path) -> Iterator[ReportBoard]:
    board = ReportBoard.create(tmp_path / "board", ranks=2, first_rank=6)
    yield board
    board.close()


def reporter(board: ReportBoard, local_rank: int = 0) -> RankReporter:
    return RankReporter.from_env(
        {"RANK": str(6 + local_rank), "LOCAL_RANK": str(local_rank), Env.REPORT_BOARD: str(board.path)}
    )


def test_a_fresh_board_knows_its_ranks_and_nothing_else(board: ReportBoard) -> None:
    assert board.read_all() == [RankRecord(rank=6, local_rank=0), RankRecord(rank=7, local_rank=1)]


def test_every_field_comes_back_as_it_was_reported(board: ReportBoard) -> None:
    said = {
        "phase": Phase.EVALUATING,
        "step": 7,
        "max_steps": 100,
        "resumed_from_step": 0,
        "loss": 2.5,
        "learning_rate": 1e-4,
        "gradient_norm": 0.75,
        "tokens_total": 10**15,
        "tokens_per_second": 1234.5,
        "mfu": 0.41,
        "skipped_steps": 0,
        "eval_loss": 2.25,
        "eval_bits_per_byte": 1.5,
        "last_checkpoint_step": 5,
        "checkpoint_save_seconds": 3.5,
        "quarantined_checkpoints": 1,
        "peak_memory_bytes": 80 * 2**30,
        "error_reason": "OutOfMemory",
        "error_message": "das Gerät ist voll",
    }
    with reporter(board, 1) as rank:
        rank.update(**said)
    record = board.read(1)
    assert {name: getattr(record, name) for name in said} == said
    assert (record.rank, record.local_rank, record.pid) == (7, 1, os.getpid())
    assert record.heartbeat == record.last_step_time == pytest.approx(time.time(), abs=5)
    assert board.read(0) == RankRecord(rank=6, local_rank=0)


def test_what_is_not_known_yet_is_none_and_so_is_a_loss_that_is_no_number(board: ReportBoard) -> None:
    with reporter(board) as rank:
        rank.update(loss=math.nan, eval_loss=None, last_checkpoint_step=None)
    record = board.read(0)
    assert (record.loss, record.eval_loss, record.last_checkpoint_step) == (None, None, None)


def test_a_long_error_keeps_its_end(board: ReportBoard) -> None:
    with reporter(board) as rank:
        rank.fail("x" * 100, "ä" * 3000 + "the cause")
    record = board.read(0)
    assert record.error_reason == "x" * 64
    assert record.error_message.endswith("ää" + "the cause")
    assert len(record.error_message.encode()) in (2047, 2048)


def test_a_rank_has_stepped_only_beyond_where_it_resumed(board: ReportBoard) -> None:
    with reporter(board) as rank:
        rank.update(step=500, resumed_from_step=500)
        assert not board.read(0).has_stepped
        rank.update(step=501)
        assert board.read(0).has_stepped


def test_the_heart_beats_while_the_rank_is_busy_elsewhere(board: ReportBoard) -> None:
    with reporter(board):
        first = board.read(0).heartbeat
        time.sleep(1.5)
        assert first is not None
        assert (board.read(0).heartbeat or 0) > first


def test_without_a_launcher_reporting_does_nothing() -> None:
    with RankReporter.from_env({}) as rank:
        rank.update(step=1)
        rank.fail("UserError", "no")


def test_an_unknown_field_is_an_error_also_without_a_launcher() -> None:
    with pytest.raises(TypeError, match="los"):
        RankReporter.from_env({}).update(los=1.0)


WRITER = """
from mamba_trainer.report import RankReporter
rank = RankReporter.from_env()
step = 0
while True:
    step += 1
    rank.update(step=step, tokens_total=step, error_message=str(step) * 300)
"""


def test_a_reader_never_sees_a_torn_record_nor_loses_the_last_one_to_a_kill(board: ReportBoard) -> None:
    environ = {**os.environ, "RANK": "6", "LOCAL_RANK": "0", Env.REPORT_BOARD: str(board.path)}
    with subprocess.Popen([sys.executable, "-c", WRITER], env=environ) as writer:
        try:
            steps = []
            deadline = time.monotonic() + 20
            while (len(steps) < 20000 or steps[-1] < 2000) and time.monotonic() < deadline:
                record = board.read(0)
                if record.step:
                    assert record.tokens_total == record.step
                    assert record.error_message == str(record.step) * 300
                    steps.append(record.step)
        finally:
            writer.send_signal(signal.SIGKILL)
    assert steps == sorted(steps)
    assert steps[-1] >= 2000
    assert board.read(0).step >= steps[-1]


def test_a_copy_torn_by_a_kill_falls_back_to_the_one_before(board: ReportBoard) -> None:
    with reporter(board) as rank:
        rank.update(step=1)
        rank.update(step=2)
        rank.close()
        time.sleep(0.1)
        before = board.path.read_bytes()
        rank.update(step=3)
        after = board.path.read_bytes()
    # Only the first half of the last write arrived.
    changed = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    middle = changed[len(changed) // 2]
    with board.path.open("r+b") as file:
        file.write(after[:middle] + before[middle:])
    assert board.read(0).step == 2


def test_a_reset_board_forgets_the_attempt_before(board: ReportBoard) -> None:
    with reporter(board) as rank:
        rank.update(step=9)
    board.reset()
    assert board.read(0) == RankRecord(rank=6, local_rank=0)
