"""When a rank counts as hung: the detector fed with records and a clock, second by second."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mamba_trainer.contract import Phase
from mamba_trainer.launch.hang import Hang, HangDetector
from mamba_trainer.launch.spec import Limits
from mamba_trainer.report import RankRecord

LIMITS = Limits(heartbeat=60, step_floor=60, step_factor=10, first_steps=1800, other_phase=7200)
Life = Callable[[int], RankRecord]


def record(now: int, step: int = 0, phase: Phase = Phase.TRAINING, rank: int = 0, beats: bool = True) -> RankRecord:
    return RankRecord(rank, rank, phase=phase, step=step, heartbeat=float(now) if beats else 1.0)


def first_hang(*lives: Life, until: int = 20_000, stopping: bool = False) -> tuple[int, Hang] | None:
    detector = HangDetector(LIMITS)
    for now in range(until):
        if (hang := detector.observe([life(now) for life in lives], float(now), stopping)) is not None:
            return now, hang
    return None


def steps_every(seconds: int, until: int, rank: int = 0) -> Life:
    return lambda now: record(now, step=min(now, until) // seconds, rank=rank)


def test_a_rank_that_steps_for_ever_never_hangs() -> None:
    assert first_hang(steps_every(50, until=10**9)) is None


@pytest.mark.parametrize(("pace", "limit"), [(1, 60), (5, 60), (20, 200), (100, 1000)])
def test_a_rank_that_stops_stepping_hangs_after_ten_slowest_steps_but_a_minute_at_least(pace: int, limit: int) -> None:
    stops_at = pace * 20
    found = first_hang(steps_every(pace, until=stops_at))
    assert found is not None
    assert found[0] == stops_at + limit + 1
    assert f"limit {limit} s" in found[1].message


def test_a_slow_first_step_that_compiles_teaches_nothing() -> None:
    def life(now: int) -> RankRecord:
        return record(now, step=0 if now < 900 else 1 + min(now - 900, 50))

    found = first_hang(life)
    assert found is not None
    assert found[0] == 950 + 61


def test_before_a_pace_is_known_half_an_hour_is_allowed() -> None:
    found = first_hang(lambda now: record(now, step=min(now, 2)))
    assert found is not None
    assert found[0] == 2 + 1801


def test_a_rank_that_never_comes_up_is_given_half_an_hour() -> None:
    found = first_hang(lambda now: RankRecord(0, 0))
    assert found is not None
    assert found[0] == 1801


def test_a_rank_that_does_not_beat_hangs_after_a_minute_in_any_phase() -> None:
    def life(now: int) -> RankRecord:
        return record(min(now, 100), phase=Phase.SAVING)

    found = first_hang(life)
    assert found is not None
    assert found[0] == 161
    assert "has not beaten" in found[1].message


def test_the_silent_rank_is_blamed_and_not_the_one_that_waits_for_it() -> None:
    waiting = steps_every(1, until=100)
    silent: Life = lambda now: record(min(now, 100), step=min(now, 100), rank=1)  # noqa: E731
    found = first_hang(waiting, silent)
    assert found is not None
    assert found[1].local_rank == 1


def test_the_rank_furthest_behind_is_blamed() -> None:
    found = first_hang(steps_every(1, until=101), steps_every(1, until=100, rank=1))
    assert found is not None
    assert found[1].local_rank == 1


def test_a_long_save_is_no_hang_and_its_time_is_not_learned_as_a_pace() -> None:
    def life(now: int) -> RankRecord:
        if 100 <= now < 4100:
            return record(now, step=100, phase=Phase.SAVING)
        return record(now, step=min(now, 100) + max(0, min(now, 4200) - 4100))

    found = first_hang(life)
    assert found is not None
    assert found[0] == 4200 + 61


def test_a_save_without_end_hangs_but_never_after_a_requested_stop() -> None:
    def life(now: int) -> RankRecord:
        return record(now, step=5, phase=Phase.SAVING)

    found = first_hang(life)
    assert found is not None
    assert found[0] == 7201
    assert first_hang(life, stopping=True) is None


def test_a_clock_of_the_rank_that_jumps_is_no_hang() -> None:
    def life(now: int) -> RankRecord:
        return RankRecord(0, 0, phase=Phase.TRAINING, step=now, heartbeat=now - 36_000.0 * (now > 500))

    assert first_hang(life) is None
