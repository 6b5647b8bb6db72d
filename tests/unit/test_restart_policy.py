"""What the one restart policy answers: a table of cases, then properties over all sequences of attempts."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_trainer.contract import ExitCode
from mamba_trainer.restart import (
    AttemptRecord,
    Cause,
    Decision,
    Outcome,
    Restart,
    RestartPolicy,
    Stop,
    decide,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)


def ended(
    code: int, start: int | None = 0, saved: int | None = None, cause: Cause | None = None, **more: bool
) -> Outcome:
    return Outcome(code, cause or Cause.of(code), resumed_from_step=start, last_checkpoint_step=saved, **more)


def history(*outcomes: Outcome, every: timedelta = HOUR, until: datetime = NOW) -> list[AttemptRecord]:
    count = len(outcomes)
    return [AttemptRecord(o, until - every * (count - i)) for i, o in enumerate(outcomes)]


def progressing(code: int, attempts: int) -> list[Outcome]:
    """Failures of which each resumed from where the one before had saved."""
    return [ended(code, start=100 * i, saved=100 * (i + 1)) for i in range(attempts)]


def stop_reason(decision: Decision) -> str:
    assert isinstance(decision, Stop), decision
    return decision.reason


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (0, "Done"),
        (64, "UserError"),
        (71, "NumericalInstability"),
        (72, "NoValidCheckpoint"),
        (93, "DoNotRequeue"),
    ],
)
def test_these_ends_are_final_and_keep_their_exit_code(code: int, reason: str) -> None:
    decision = decide([], ended(code), NOW)
    assert isinstance(decision, Stop)
    assert (decision.exit_code, decision.reason) == (code, reason)
    assert decision.message


@pytest.mark.parametrize("code", [1, 2, 73, 76, 134, 137, 139, 143, 255])
def test_a_first_failure_of_the_infrastructure_restarts_after_a_short_delay(code: int) -> None:
    decision = decide([], ended(code), NOW)
    assert decision == Restart(delay_seconds=5.0, replan=False, reason=Cause.of(code))


def test_a_saved_and_stopped_attempt_goes_on_at_once_and_costs_no_budget() -> None:
    for attempts in (0, 5, 50):
        past = history(*progressing(75, attempts))
        latest = ended(75, start=100 * attempts, saved=100 * attempts + 50)
        assert decide(past, latest, NOW) == Restart(0.0, replan=False, reason="SavedAndStopped")


def test_a_stop_that_the_user_asked_for_ends_with_75() -> None:
    decision = decide([], ended(75, stop_requested=True), NOW)
    assert isinstance(decision, Stop)
    assert decision.exit_code == 75


def test_out_of_memory_is_replanned_as_long_as_a_smaller_plan_exists() -> None:
    replanned = [ended(70, can_adapt=True)] * 6
    assert decide(history(*replanned), ended(70, can_adapt=True), NOW) == Restart(0.0, True, "OutOfMemory")
    assert stop_reason(decide(history(*replanned), ended(70), NOW)) == "OutOfMemory"


def test_a_host_out_of_memory_gets_one_retry_with_more_memory_or_none() -> None:
    oom = ended(137, cause=Cause.HOST_OUT_OF_MEMORY, can_adapt=True)
    assert decide([], oom, NOW) == Restart(5.0, replan=True, reason="HostOutOfMemory")
    assert stop_reason(decide(history(oom), oom, NOW)) == "BackoffLimitExceeded"
    assert stop_reason(decide([], replace(oom, can_adapt=False), NOW)) == "HostOutOfMemory"


def test_the_delay_doubles_up_to_five_minutes() -> None:
    delays = []
    for attempts in range(10):
        latest = ended(1, start=100 * attempts, saved=100 * attempts + 1)
        decision = decide(history(*progressing(1, attempts)), latest, NOW)
        assert isinstance(decision, Restart)
        delays.append(decision.delay_seconds)
    assert delays == [5, 10, 20, 40, 80, 160, 300, 300, 300, 300]


@pytest.mark.parametrize(("code", "budget"), [(1, 10), (137, 10), (76, 10), (73, 3)])
def test_a_budget_ends_also_while_training_moves_on(code: int, budget: int) -> None:
    def after(failures: int) -> Decision:
        return decide(history(*progressing(code, failures)), ended(code, start=100 * failures, saved=9999), NOW)

    assert isinstance(after(budget - 1), Restart)
    assert stop_reason(after(budget)) == "BackoffLimitExceeded"


def test_a_budget_refills_after_a_day_of_progress() -> None:
    past = progressing(1, 30)
    latest = ended(1, start=3000, saved=3001)
    assert stop_reason(decide(history(*past, every=HOUR), latest, NOW)) == "BackoffLimitExceeded"
    assert decide(history(*past, every=25 * HOUR), latest, NOW) == Restart(5.0, False, "Infrastructure")


def test_a_budget_does_not_refill_without_progress() -> None:
    policy = RestartPolicy(max_attempts_without_progress=1000)
    past = history(*[ended(1, start=100)] * 10, every=100 * HOUR)
    assert stop_reason(decide(past, ended(1, start=100), NOW, policy)) == "BackoffLimitExceeded"


def test_budgets_are_counted_by_cause() -> None:
    past = history(*[o for pair in zip(progressing(1, 2), progressing(73, 2), strict=True) for o in pair])
    assert decide(past, ended(73, start=900, saved=901), NOW) == Restart(20.0, False, "Hang")


def test_three_attempts_from_the_same_step_stop_with_a_diagnosis() -> None:
    decision = decide(history(ended(1, 500), ended(137, 500)), ended(73, 500), NOW)
    assert isinstance(decision, Stop)
    assert (decision.exit_code, decision.reason) == (73, "NoProgress")
    assert "step 500" in decision.message
    assert "1 (Infrastructure), 137 (Infrastructure), 73 (Hang)" in decision.message


def test_attempts_that_end_before_they_know_their_step_are_no_progress() -> None:
    assert stop_reason(decide(history(ended(1, None), ended(1, None)), ended(1, None), NOW)) == "NoProgress"
    assert stop_reason(decide(history(ended(1, 500), ended(1, None)), ended(1, None), NOW)) == "NoProgress"


@pytest.mark.parametrize(
    "attempts",
    [
        pytest.param([ended(1, 500), ended(1, 500)], id="only two"),
        pytest.param([ended(1, 500), ended(1, 500), ended(1, 500, saved=600)], id="the last saved a newer one"),
        pytest.param([ended(1, 400, saved=500), ended(1, 500), ended(1, 500)], id="the second moved on"),
        pytest.param([ended(1, 500, saved=600), ended(1, None), ended(1, None)], id="its save may be good"),
        pytest.param([ended(1, 500), ended(75, 500, stop_requested=True), ended(1, 500)], id="stopped by hand"),
        pytest.param([ended(70, 500, can_adapt=True)] * 2 + [ended(1, 500)], id="under other plans"),
    ],
)
def test_this_is_not_yet_a_lack_of_progress(attempts: list[Outcome]) -> None:
    assert isinstance(decide(history(*attempts[:-1]), attempts[-1], NOW), Restart)


def test_a_checkpoint_that_turns_out_bad_each_time_is_no_progress() -> None:
    """Each attempt saves step 200, stops on request of the cluster, and the next resumes from 100 again."""
    livelock = ended(75, start=100, saved=200)
    assert stop_reason(decide(history(livelock, livelock), livelock, NOW)) == "NoProgress"


codes = st.sampled_from([*(int(code) for code in ExitCode), 2, 134, 137, 139, 143])
steps = st.none() | st.integers(0, 1000)
outcomes = codes.flatmap(
    lambda code: st.builds(
        Outcome,
        exit_code=st.just(code),
        cause=st.just(Cause.of(code)) if code != 137 else st.sampled_from([Cause.of(137), Cause.HOST_OUT_OF_MEMORY]),
        resumed_from_step=steps,
        last_checkpoint_step=steps,
        stop_requested=st.booleans(),
        can_adapt=st.booleans(),
    )
)
records = st.builds(
    AttemptRecord,
    outcomes,
    st.datetimes(datetime(2025, 1, 1), datetime(2025, 12, 31), timezones=st.just(UTC)),
)
histories = st.lists(records, max_size=20).map(lambda r: sorted(r, key=lambda record: record.ended_at))


@given(histories, outcomes)
def test_every_history_gets_an_answer_that_can_be_acted_on(past: list[AttemptRecord], latest: Outcome) -> None:
    decision = decide(past, latest, NOW)
    if isinstance(decision, Stop):
        assert decision.exit_code == latest.exit_code
        assert decision.reason and decision.message
    else:
        assert 0 <= decision.delay_seconds <= 300
        assert latest.exit_code not in (0, 64, 71, 72, 93)
        assert decision.replan <= latest.can_adapt


@given(histories, outcomes, st.integers(1, 5))
def test_more_of_the_same_failure_never_brings_a_restart_back_or_nearer(
    past: list[AttemptRecord], latest: Outcome, again: int
) -> None:
    before = decide(past, latest, NOW)
    after = decide([*past, *[AttemptRecord(latest, NOW)] * again], latest, NOW)
    if isinstance(before, Stop):
        assert isinstance(after, Stop)
    elif isinstance(after, Restart):
        assert after.delay_seconds >= before.delay_seconds


@settings(max_examples=300)
@given(st.data())
def test_any_endless_sequence_of_failures_without_progress_stops(data: st.DataObject) -> None:
    """No attempt resumes from beyond step 100, whatever it claims to have saved and however long it took."""
    plans_left = data.draw(st.integers(0, 3))
    unproven = st.integers(0, 5).map(lambda i: 100 + i)
    past: list[AttemptRecord] = []
    now = NOW
    for _ in range(200):
        outcome = data.draw(outcomes)
        smaller = outcome.cause in (Cause.OUT_OF_MEMORY, Cause.HOST_OUT_OF_MEMORY) and plans_left > 0
        plans_left -= smaller
        outcome = replace(
            outcome,
            resumed_from_step=data.draw(st.sampled_from([None, 100])),
            last_checkpoint_step=data.draw(st.none() | unproven),
            can_adapt=smaller,
            stop_requested=False,
        )
        now += timedelta(hours=data.draw(st.sampled_from([0, 1, 30, 1000])))
        if isinstance(decide(past, outcome, now), Stop):
            return
        past.append(AttemptRecord(outcome, now))
    pytest.fail("still restarting after 200 attempts")
