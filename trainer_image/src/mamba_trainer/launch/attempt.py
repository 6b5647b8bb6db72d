"""One attempt: from the start of the ranks to the last of them gone.

The loop only collects facts (ends, signals, what the board and the other launchers say); `verdict` and `hang`
judge them. Whatever happens, it ends: every end of a rank sets the time at which the others are killed.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ..contract import ExitCode, Phase, TerminationMessage
from ..report import STACK_DUMP_SIGNAL, ReportBoard
from ..restart import Cause
from .hang import HangDetector
from .inbox import SignalInbox
from .machine import out_of_memory_kills
from .output import say
from .peers import Peers
from .ranks import Gang, Guard, rank_environment
from .spec import LaunchSpec
from .verdict import INTERRUPTED, KILLED, TERMINATED, End, exit_code_of, explain, grace_after, root_cause

_JOIN_POLL_SECONDS = 0.1
_BEFORE_TRAINING = (Phase.STARTING, Phase.LOADING)


@dataclass(frozen=True)
class AttemptEnd:
    message: TerminationMessage
    cause: Cause


class Attempt:
    def __init__(self, spec: LaunchSpec, number: int, inbox: SignalInbox, guard: Guard, board: ReportBoard) -> None:
        self._spec = spec
        self._number = number
        self._inbox = inbox
        self._board = board
        self._gang = Gang(guard)
        self._hangs = HangDetector(spec.limits)
        self._ends: list[End] = []
        self._stop_forwarded = False
        self._kill_at = math.inf
        self._killed_at = math.inf

    def run(self, command: Sequence[str], port: int, peers: Peers) -> AttemptEnd:
        kills_before = out_of_memory_kills()
        if self._join(peers):
            self._start(command, port)
        while self._gang.alive and time.monotonic() < self._killed_at + self._spec.limits.kill:
            self._inbox.wait(self._nap(time.monotonic()))
            self._collect(time.monotonic())
            self._forward_stop()
            self._look_for_trouble(time.monotonic(), peers)
            self._kill_when_due(time.monotonic())
        for local_rank in self._gang.alive:
            say(f"pid {self._gang.pid(local_rank)} survives SIGKILL (stuck in the kernel) and is left behind")
        self._gang.drain()
        return self._conclude(out_of_memory_kills() > kills_before)

    def _join(self, peers: Peers) -> bool:
        while not peers.joined:
            now = time.monotonic()
            if self._inbox.stop_requested:
                self._note(End(ExitCode.SAVED_AND_STOPPED, now), 0.0)
                return False
            if (loss := peers.loss(now)) is not None:
                self._note(End(ExitCode.PEER_LOST, now, finding=loss), 0.0)
                return False
            self._inbox.wait(_JOIN_POLL_SECONDS)
        return True

    def _start(self, command: Sequence[str], port: int) -> None:
        environments = [
            rank_environment(self._spec, local_rank, self._number, port, self._board.path, os.environ)
            for local_rank in range(self._spec.nproc_per_node)
        ]
        self._gang.start(command, environments)

    def _collect(self, now: float) -> None:
        for local_rank, returncode in self._gang.reap():
            had_trained = self._board.read(local_rank).phase not in _BEFORE_TRAINING
            code = self._meaning(exit_code_of(returncode), had_trained)
            killed = code == KILLED and self._killed_at <= now
            self._note(End(code, now, local_rank, killed), self._grace_after(code, had_trained))

    def _meaning(self, code: int, had_trained: bool) -> int:
        # A rank that our SIGTERM met before it could handle it had nothing to save: it stopped as asked.
        if code == TERMINATED and self._stop_forwarded and not had_trained:
            return ExitCode.SAVED_AND_STOPPED
        return code

    def _grace_after(self, code: int, had_trained: bool) -> float:
        # It ended alone, with nothing to save, and the others wait for it.
        if code == ExitCode.SAVED_AND_STOPPED and not had_trained:
            return self._spec.limits.failure_grace
        return grace_after(code, self._spec.limits)

    def _note(self, end: End, grace: float) -> None:
        self._ends.append(end)
        self._kill_at = min(self._kill_at, end.at + grace)

    def _forward_stop(self) -> None:
        if self._inbox.stop_requested and not self._stop_forwarded:
            self._stop_forwarded = True
            say("stop requested: the ranks save and end (Ctrl-C twice ends without saving)")
            self._gang.signal(signal.SIGTERM)

    def _look_for_trouble(self, now: float, peers: Peers) -> None:
        if self._ends:
            return
        if (loss := peers.loss(now)) is not None:
            self._note(End(ExitCode.PEER_LOST, now, finding=loss), self._spec.limits.peer_lost_grace)
            return
        records = [self._board.read(local_rank) for local_rank in sorted(self._gang.alive)]
        if (hang := self._hangs.observe(records, now, self._stop_forwarded)) is not None:
            end = End(ExitCode.HANG, now, hang.local_rank, finding=hang.message)
            self._note(end, self._spec.limits.stack_dump)
            say(f"{hang.message} Stacks follow, then all ranks are killed.")
            self._gang.signal(STACK_DUMP_SIGNAL)

    def _kill_when_due(self, now: float) -> None:
        if self._killed_at < math.inf or not (now >= self._kill_at or self._inbox.interrupted):
            return
        if self._gang.alive and self._inbox.interrupted:
            self._note(End(INTERRUPTED, -math.inf), 0.0)
        self._killed_at = now
        self._gang.kill()

    def _nap(self, now: float) -> float:
        due = math.inf if self._killed_at < math.inf else self._kill_at - now
        return min(self._spec.limits.poll, due)

    def _conclude(self, memory_ran_out: bool) -> AttemptEnd:
        root = root_cause(self._ends)
        cause = Cause.HOST_OUT_OF_MEMORY if root.code == KILLED and memory_ran_out else Cause.of(root.code)
        last_lines = "" if root.local_rank is None else self._gang.last_lines(root.local_rank)
        return AttemptEnd(explain(root, cause, self._board.read_all(), last_lines), cause)
