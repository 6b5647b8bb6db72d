"""Which end of a rank explains an attempt, and how long the other ranks may outlive it. Pure."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..contract import ExitCode, TerminationMessage
from ..report import RankRecord
from ..restart import Cause
from .spec import Limits

#: Ends that are no failure.
GOOD = (ExitCode.DONE, ExitCode.SAVED_AND_STOPPED)
INTERRUPTED = 128 + signal.SIGINT
KILLED = 128 + signal.SIGKILL
TERMINATED = 128 + signal.SIGTERM


@dataclass(frozen=True)
class End:
    """A rank that ended, or what the launcher itself found: a hang, or a lost peer (no local rank)."""

    code: int
    at: float
    local_rank: int | None = None
    #: The launcher killed it, so its code says nothing.
    killed: bool = False
    #: The sentence of a launcher that found out something itself.
    finding: str = ""


def exit_code_of(returncode: int) -> int:
    """A shell's code for what `subprocess` reports: death by signal n is 128+n."""
    return returncode if returncode >= 0 else 128 - returncode


def name_of(code: int) -> str:
    """`137 (SIGKILL)`, `70 (OUT_OF_MEMORY)`, `3`."""
    try:
        name = signal.Signals(code - 128).name if code > 128 else ExitCode(code).name
    except ValueError:
        return str(code)
    return f"{code} ({name})"


def root_cause(ends: Sequence[End]) -> End:
    """The first failure of its own; else 75 if any rank stopped (it may be the peer that others lost); else a lost
    peer; else 0."""
    own = [end for end in ends if not end.killed]
    failures = [end for end in own if end.code not in GOOD]
    first_hand = [end for end in failures if end.code != ExitCode.PEER_LOST]
    stopped = [end for end in own if end.code == ExitCode.SAVED_AND_STOPPED]
    done = [end for end in own if end.code == ExitCode.DONE]
    for candidates in (first_hand, stopped, failures, done, ends):
        if candidates:
            return min(candidates, key=_precedence)
    raise ValueError("no rank has ended")


def _precedence(end: End) -> tuple[float, bool, int]:
    # Of ranks found dead at the same moment, one with a named cause or a signal explains a bare 1: losing
    # it is what broke the other's collective.
    return end.at, end.code == ExitCode.FAILURE, end.local_rank or 0


def grace_after(code: int, limits: Limits) -> float:
    """How long the ranks still alive may take to end once one has ended with this code."""
    if code in GOOD:
        return limits.finish_grace
    return limits.peer_lost_grace if code == ExitCode.PEER_LOST else limits.failure_grace


def explain(root: End, cause: Cause, records: Sequence[RankRecord], last_lines: str) -> TerminationMessage:
    """The termination message: what the rank said of its error, else the last lines that it printed."""
    own = records[root.local_rank or 0]
    said = own.error_reason if root.local_rank is not None and not root.finding else ""
    return TerminationMessage(
        reason=said or ("Interrupted" if root.code == INTERRUPTED else cause),
        exit_code=root.code,
        rank=None if root.local_rank is None else own.rank,
        step=own.step,
        resumed_from_step=_newest(record.resumed_from_step for record in records),
        last_checkpoint_step=_newest(record.last_checkpoint_step for record in records),
        peak_memory_bytes=max(record.peak_memory_bytes for record in records),
        message=_message(root, own, last_lines),
    )


def _message(root: End, own: RankRecord, last_lines: str) -> str:
    if root.finding:
        # The sentence last: a message that is too long loses its beginning.
        return f"{last_lines}\n{root.finding}".strip()
    if root.code in GOOD or root.local_rank is None:
        return ""
    return own.error_message or last_lines


def _newest(steps: Iterable[int | None]) -> int | None:
    return max((step for step in steps if step is not None), default=None)
