"""Attempt after attempt on one machine, or the single one of a pod."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from ..contract import ExitCode, TrainerError
from ..report import ReportBoard, Snapshot
from ..restart import AttemptRecord, Cause, Decision, Outcome, Stop, decide
from .attempt import Attempt, AttemptEnd
from .inbox import SignalInbox
from .output import say
from .peers import NoPeers, Peers, StorePeers
from .ports import choose_port
from .ranks import Guard
from .spec import LaunchSpec
from .termination import error_message, summary, write_termination

_SHARED_MEMORY = Path("/dev/shm")
_MEMORY = (Cause.OUT_OF_MEMORY, Cause.HOST_OUT_OF_MEMORY)


def run(spec: LaunchSpec) -> int:
    """Start the ranks, wait, and return the exit code to end with. Must be called in the main thread.

    Raises a `TrainerError` (its termination message is written) for what fails before any rank runs.
    """
    try:
        with ExitStack() as stack:
            inbox = stack.enter_context(SignalInbox())
            guard = stack.enter_context(Guard())
            board = stack.enter_context(_report_board(spec))
            launcher = _Launcher(spec, inbox, guard, board)
            stack.enter_context(_status_server(spec.status_port, launcher.snapshot))
            return launcher.run()
    except TrainerError as error:
        write_termination(spec.termination_log, error_message(error))
        raise


class _Launcher:
    def __init__(self, spec: LaunchSpec, inbox: SignalInbox, guard: Guard, board: ReportBoard) -> None:
        self._spec = spec
        self._inbox = inbox
        self._guard = guard
        self._board = board
        self._attempt = spec.attempt
        self._history: list[AttemptRecord] = []

    def snapshot(self) -> Snapshot:
        return Snapshot(self._attempt, self._board.read_all())

    def run(self) -> int:
        command = self._spec.command
        while True:
            end = self._run_attempt(command)
            if not self._spec.supervise:
                return end.message.exit_code
            smaller = self._smaller_plan(end)
            decision = self._decide(end, can_adapt=smaller is not None)
            if isinstance(decision, Stop):
                return decision.exit_code
            if self._stopped_within(decision.delay_seconds):
                say("stopped before the next attempt; the last checkpoint stands")
                return ExitCode.SAVED_AND_STOPPED
            command = smaller if decision.replan and smaller else command
            self._attempt += 1

    def _run_attempt(self, command: Sequence[str]) -> AttemptEnd:
        spec = self._spec
        self._board.reset()
        peers: Peers = StorePeers(spec, self._attempt) if spec.nnodes > 1 else NoPeers()
        port = choose_port(spec.master_port) if spec.nnodes == 1 else spec.master_port
        assert port is not None
        end = Attempt(spec, self._attempt, self._inbox, self._guard, self._board).run(command, port, peers)
        write_termination(spec.termination_log, end.message)
        if (text := summary(end.message)) is not None:
            say(text)
        peers.finish(end.message.exit_code, self._inbox)
        return end

    def _smaller_plan(self, end: AttemptEnd) -> Sequence[str] | None:
        wanted = end.cause in _MEMORY and not self._inbox.stop_requested
        return self._spec.on_replan() if wanted else None

    def _decide(self, end: AttemptEnd, can_adapt: bool) -> Decision:
        now = datetime.now(UTC)
        outcome = Outcome(
            exit_code=end.message.exit_code,
            cause=end.cause,
            resumed_from_step=end.message.resumed_from_step,
            last_checkpoint_step=end.message.last_checkpoint_step,
            stop_requested=self._inbox.stop_requested,
            can_adapt=can_adapt,
        )
        decision = decide(self._history, outcome, now, self._spec.restart_policy)
        self._history.append(AttemptRecord(outcome, now))
        start = _next_start(self._history)
        if isinstance(decision, Stop):
            say(f"{decision.reason}: {decision.message} {start}".rstrip())
        else:
            plan = " with a smaller plan" if decision.replan else ""
            when = f"attempt {self._attempt + 1} in {decision.delay_seconds:g} s{plan}"
            say(f"{decision.reason}: {when}. {start}")
        return decision

    def _stopped_within(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not self._inbox.stop_requested and (left := deadline - time.monotonic()) > 0:
            self._inbox.wait(left)
        return self._inbox.stop_requested


#: Ends that the same command meets again.
_NOT_MENDED_BY_A_START = {ExitCode.USER_ERROR, ExitCode.NO_VALID_CHECKPOINT, ExitCode.DO_NOT_REQUEUE}


def _next_start(history: Sequence[AttemptRecord]) -> str:
    """An attempt that ended early did not learn what the directory holds; the one before it may have."""
    last = history[-1].outcome
    if last.cause is Cause.DONE:
        return ""
    for outcome in (record.outcome for record in reversed(history)):
        known = [s for s in (outcome.last_checkpoint_step, outcome.resumed_from_step) if s is not None]
        if known:
            return f"Next start: step {max(known)}." if max(known) else "Next start: from the beginning."
    if last.exit_code in _NOT_MENDED_BY_A_START:
        return ""
    return "Next start: from the newest checkpoint, if there is one."


@contextmanager
def _report_board(spec: LaunchSpec) -> Iterator[ReportBoard]:
    with tempfile.TemporaryDirectory(prefix="mamba-", dir=_shared_memory()) as folder:
        board = ReportBoard.create(Path(folder) / "board", spec.nproc_per_node, spec.first_rank)
        yield board
        board.close()


def _shared_memory() -> Path | None:
    return _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else None


@contextmanager
def _status_server(port: int | None, source: Callable[[], Snapshot]) -> Iterator[None]:
    if port is None:
        yield
        return
    # Imported here: only who serves metrics needs prometheus_client.
    from ..exporter import StatusServer

    try:
        server = StatusServer(port, source)
    except OSError as error:
        # Training is worth more than its metrics.
        say(f"/status and /metrics are not served: port {port}: {error.strerror}")
        yield
        return
    with server:
        yield
