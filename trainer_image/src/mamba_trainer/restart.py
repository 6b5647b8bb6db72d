"""The one restart policy, used by the launcher on one machine and by the operator in a cluster.

It exists so that both answer a failure alike. Pure: no clock, no I/O, nothing remembered; the caller hands
in the history, the latest outcome and the time, and acts on the answer.

An endless sequence of failures without progress always stops: the budgets refill only when a later attempt
has *resumed* from a newer checkpoint (what an attempt claims to have saved is no proof, it may turn out
bad), and three attempts in a row that resumed from the same step end it earlier.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from types import MappingProxyType

from .contract import ExitCode


class Cause(StrEnum):
    """Why an attempt ended, as one word for conditions, metrics and termination messages."""

    DONE = "Done"
    SAVED_AND_STOPPED = "SavedAndStopped"
    USER_ERROR = "UserError"
    OUT_OF_MEMORY = "OutOfMemory"
    HOST_OUT_OF_MEMORY = "HostOutOfMemory"
    NUMERICAL_INSTABILITY = "NumericalInstability"
    NO_VALID_CHECKPOINT = "NoValidCheckpoint"
    HANG = "Hang"
    PEER_LOST = "PeerLost"
    DO_NOT_REQUEUE = "DoNotRequeue"
    INFRASTRUCTURE = "Infrastructure"

    @classmethod
    def of(cls, exit_code: int) -> Cause:
        """What the exit code alone says; an out-of-memory kill looks like any other 137."""
        return _CAUSES.get(exit_code, cls.INFRASTRUCTURE)


_CAUSES: dict[int, Cause] = {
    ExitCode.DONE: Cause.DONE,
    ExitCode.USER_ERROR: Cause.USER_ERROR,
    ExitCode.OUT_OF_MEMORY: Cause.OUT_OF_MEMORY,
    ExitCode.NUMERICAL_INSTABILITY: Cause.NUMERICAL_INSTABILITY,
    ExitCode.NO_VALID_CHECKPOINT: Cause.NO_VALID_CHECKPOINT,
    ExitCode.HANG: Cause.HANG,
    ExitCode.SAVED_AND_STOPPED: Cause.SAVED_AND_STOPPED,
    ExitCode.PEER_LOST: Cause.PEER_LOST,
    ExitCode.DO_NOT_REQUEUE: Cause.DO_NOT_REQUEUE,
}


@dataclass(frozen=True)
class Outcome:
    """How one attempt ended."""

    exit_code: int
    cause: Cause
    #: 0 is a fresh start; None means that the attempt ended before it knew.
    resumed_from_step: int | None = None
    last_checkpoint_step: int | None = None
    #: The user (or the operator on their behalf) asked this attempt to end.
    stop_requested: bool = False
    #: The caller can start the next attempt with a smaller plan (device memory) or a higher request (host
    #: memory).
    can_adapt: bool = False

    @property
    def replanned(self) -> bool:
        return self.can_adapt and self.cause in (Cause.OUT_OF_MEMORY, Cause.HOST_OUT_OF_MEMORY)


@dataclass(frozen=True)
class AttemptRecord:
    outcome: Outcome
    ended_at: datetime


@dataclass(frozen=True)
class RestartPolicy:
    budgets: Mapping[Cause, int] = field(
        default_factory=lambda: MappingProxyType(
            {
                Cause.INFRASTRUCTURE: 10,
                Cause.PEER_LOST: 10,
                Cause.HANG: 3,
                Cause.HOST_OUT_OF_MEMORY: 1,
            }
        )
    )
    refill_after: timedelta = timedelta(hours=24)
    max_attempts_without_progress: int = 3
    first_delay_seconds: float = 5.0
    max_delay_seconds: float = 300.0


@dataclass(frozen=True)
class Restart:
    delay_seconds: float
    replan: bool
    reason: str


@dataclass(frozen=True)
class Stop:
    exit_code: int
    reason: str
    message: str


Decision = Restart | Stop


@dataclass(frozen=True)
class _Case:
    history: Sequence[AttemptRecord]
    outcome: Outcome
    now: datetime
    policy: RestartPolicy


def decide(
    history: Sequence[AttemptRecord],
    outcome: Outcome,
    now: datetime,
    policy: RestartPolicy | None = None,
) -> Decision:
    """What follows `outcome`, given the attempts before it (oldest first)."""
    case = _Case(history, outcome, now, policy or RestartPolicy())
    for check in _CHECKS:
        if (decision := check(case)) is not None:
            return decision
    return _within_budget(case)


def _done(case: _Case) -> Decision | None:
    if case.outcome.cause is not Cause.DONE:
        return None
    return Stop(case.outcome.exit_code, Cause.DONE, "Training is complete.")


def _stop_requested(case: _Case) -> Decision | None:
    if not case.outcome.stop_requested:
        return None
    return Stop(case.outcome.exit_code, case.outcome.cause, "Stopped on request.")


def _no_retry_helps(case: _Case) -> Decision | None:
    if (message := _FINAL.get(case.outcome.cause)) is None:
        return None
    return Stop(case.outcome.exit_code, case.outcome.cause, message)


def _device_out_of_memory(case: _Case) -> Decision | None:
    if case.outcome.cause is not Cause.OUT_OF_MEMORY:
        return None
    if case.outcome.can_adapt:
        return Restart(delay_seconds=0.0, replan=True, reason=case.outcome.cause)
    return Stop(
        case.outcome.exit_code,
        case.outcome.cause,
        "The device ran out of memory and no smaller plan exists: use more or larger GPUs, a higher ZeRO "
        "stage, offload, a shorter sequence or a smaller model.",
    )


def _host_out_of_memory(case: _Case) -> Decision | None:
    """Without a change the same memory runs out again, so a plain retry is not worth its time."""
    if case.outcome.cause is not Cause.HOST_OUT_OF_MEMORY or case.outcome.can_adapt:
        return None
    return Stop(
        case.outcome.exit_code,
        case.outcome.cause,
        "The kernel killed a rank because the host ran out of memory: give it more memory, use fewer ranks "
        "on this host, or less CPU offload.",
    )


def _no_progress(case: _Case) -> Decision | None:
    streak = _attempts_without_progress(case)
    if len(streak) < case.policy.max_attempts_without_progress:
        return None
    codes = ", ".join(f"{a.exit_code} ({a.cause})" for a in streak)
    step = max(a.resumed_from_step or 0 for a in streak)
    return Stop(
        case.outcome.exit_code,
        "NoProgress",
        f"{len(streak)} attempts in a row started from step {step} and none left a newer checkpoint; "
        f"exit codes, oldest first: {codes}. Read the last error, or save more often.",
    )


def _saved_and_stopped(case: _Case) -> Decision | None:
    if case.outcome.cause is not Cause.SAVED_AND_STOPPED:
        return None
    return Restart(delay_seconds=0.0, replan=False, reason=case.outcome.cause)


#: The first check with an opinion decides; what none of them claims is a failure with a budget.
_CHECKS: tuple[Callable[[_Case], Decision | None], ...] = (
    _done,
    _stop_requested,
    _no_retry_helps,
    _device_out_of_memory,
    _host_out_of_memory,
    _no_progress,
    _saved_and_stopped,
)

_FINAL = {
    Cause.USER_ERROR: "The configuration cannot work as it is: correct it and start again.",
    Cause.NUMERICAL_INSTABILITY: "Non-finite steps persist: lower the learning rate or look at the data.",
    Cause.NO_VALID_CHECKPOINT: "There are checkpoints but none of them verifies: training does not start "
    "afresh over them. Restore one, or choose another directory.",
    Cause.DO_NOT_REQUEUE: "The attempt asked not to be started again.",
}


def _within_budget(case: _Case) -> Decision:
    cause = case.outcome.cause
    budget = case.policy.budgets[cause]
    spent = sum(record.outcome.cause is cause for record in _unforgiven(case))
    if spent >= budget:
        return Stop(
            case.outcome.exit_code,
            "BackoffLimitExceeded",
            f"{budget} restarts for {cause} are used up and this is failure {spent + 1}. They refill after "
            f"{case.policy.refill_after.total_seconds() / 3600:g} hours of progress.",
        )
    return Restart(_delay(spent, case.policy), replan=cause is Cause.HOST_OUT_OF_MEMORY, reason=cause)


def _delay(spent: int, policy: RestartPolicy) -> float:
    # A bounded exponent, as 2.0**1024 overflows.
    return min(policy.first_delay_seconds * 2.0 ** min(spent, 60), policy.max_delay_seconds)


def _unforgiven(case: _Case) -> list[AttemptRecord]:
    """The past attempts that still count: one is forgiven once it is old *and* training has moved on."""
    return [
        record
        for index, record in enumerate(case.history)
        if case.now - record.ended_at < case.policy.refill_after
        or _newest_start(case, after=index) <= (record.outcome.resumed_from_step or 0)
    ]


def _newest_start(case: _Case, after: int) -> int:
    later = [record.outcome for record in case.history[after + 1 :]]
    return max(outcome.resumed_from_step or 0 for outcome in [*later, case.outcome])


def _attempts_without_progress(case: _Case) -> list[Outcome]:
    streak = _attempts_from_the_same_step(case)
    known_starts = [index for index, attempt in enumerate(streak) if attempt.resumed_from_step is not None]
    # The claim of the last attempt that knew its start stands until a later one starts from an older step.
    judged = known_starts[-1] + 1 if known_starts else 0
    return streak[judged:] if _claims_new_checkpoint(streak[:judged]) else streak


def _attempts_from_the_same_step(case: _Case) -> list[Outcome]:
    """The latest attempts, oldest first, that ended by themselves and started from one step.

    An attempt that ended before it knew its step is no sign of progress. A replan starts a new streak: with
    another plan the same step is another experiment.
    """
    step: int | None = None
    streak: list[Outcome] = []
    for outcome in [case.outcome, *(record.outcome for record in reversed(case.history))]:
        if outcome.stop_requested:
            continue
        if streak and outcome.replanned:
            break
        if step is not None and outcome.resumed_from_step not in (None, step):
            break
        step = step if outcome.resumed_from_step is None else outcome.resumed_from_step
        streak.append(outcome)
    return streak[::-1]


def _claims_new_checkpoint(attempts: Sequence[Outcome]) -> bool:
    """Whether the latest saved beyond where they all started and beyond what the earlier ones had claimed.

    A checkpoint that was claimed once, and from which the next attempt did not resume, was bad.
    """
    if not attempts:
        return False
    *earlier, latest = attempts
    known = [a.resumed_from_step or 0 for a in attempts] + [a.last_checkpoint_step or 0 for a in earlier]
    return (latest.last_checkpoint_step or 0) > max(known)
