"""The rank processes of this machine: started, reaped, signalled, killed. I/O only, no decisions."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..contract import Env, UserError
from . import guard as guard_script
from .machine import usable_cores
from .output import RankOutput
from .spec import LaunchSpec

_DRAIN_SECONDS = 2.0


class Guard:
    """The process that kills our ranks should we be killed ourselves."""

    def __enter__(self) -> Guard:
        # A session of its own, so that what kills the launcher's process group spares it.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(guard_script.__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self

    def __exit__(self, *error: object) -> None:
        # The guard kills what is still listed, so an exception in the launcher leaves no rank behind either.
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()

    @property
    def pid(self) -> int:
        return self._process.pid

    def watch(self, pid: int) -> None:
        self._tell(f"+{pid}\n")

    def forget(self, pid: int) -> None:
        self._tell(f"-{pid}\n")

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()


def rank_environment(
    spec: LaunchSpec, local_rank: int, attempt: int, port: int, board: Path, inherited: Mapping[str, str]
) -> dict[str, str]:
    """What a rank finds in its environment: torch's names and ours."""
    threads = max(1, usable_cores() // spec.nproc_per_node)
    return {
        "OMP_NUM_THREADS": str(threads),
        **inherited,
        **spec.env,
        "RANK": str(spec.first_rank + local_rank),
        "LOCAL_RANK": str(local_rank),
        "GROUP_RANK": str(spec.node_rank),
        "WORLD_SIZE": str(spec.world_size),
        "LOCAL_WORLD_SIZE": str(spec.nproc_per_node),
        "MASTER_ADDR": spec.master_addr,
        "MASTER_PORT": str(port),
        # With several nodes launcher 0 hosts the store and torch makes every rank a client of it.
        "TORCHELASTIC_USE_AGENT_STORE": str(spec.nnodes > 1),
        "PYTHONUNBUFFERED": "1",
        Env.ATTEMPT: str(attempt),
        Env.REPORT_BOARD: str(board),
    }


@dataclass(frozen=True)
class _Rank:
    process: subprocess.Popen[bytes]
    output: RankOutput


class Gang:
    """The ranks of one attempt, by local rank."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._ranks: dict[int, _Rank] = {}
        self.alive: set[int] = set()

    def start(self, command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> None:
        try:
            for local_rank, environment in enumerate(environments):
                self._start_rank(local_rank, command, environment)
        except OSError as error:
            self.kill()
            raise UserError(f"Cannot start {command[0]}: {error.strerror}.") from error

    def reap(self) -> list[tuple[int, int]]:
        """(local rank, return code) of those that ended since the last call."""
        ended = [(r, self._bury(r)) for r in sorted(self.alive) if _has_ended(self._ranks[r].process.pid)]
        self.alive -= {local_rank for local_rank, _ in ended}
        if os.getpid() == 1:
            self._reap_strangers()
        return ended

    def signal(self, signum: int) -> None:
        for local_rank in self.alive:
            # Not Popen.send_signal, which reaps a rank that has just ended; until then its pid is its own.
            os.kill(self._ranks[local_rank].process.pid, signum)

    def kill(self) -> None:
        """Also whoever ignores SIGTERM or is stopped, and what the ranks have started."""
        for local_rank in self.alive:
            _kill_group(self._ranks[local_rank].process.pid)

    def pid(self, local_rank: int) -> int:
        return self._ranks[local_rank].process.pid

    def last_lines(self, local_rank: int) -> str:
        return self._ranks[local_rank].output.last_lines()

    def drain(self) -> None:
        deadline = time.monotonic() + _DRAIN_SECONDS
        for rank in self._ranks.values():
            rank.output.drain(max(0.0, deadline - time.monotonic()))

    def _start_rank(self, local_rank: int, command: Sequence[str], environment: Mapping[str, str]) -> None:
        # Rank 0 of the job has the terminal, so that it can draw progress; its stderr is kept as well. All
        # that others print is marked and goes to stderr.
        first = environment["RANK"] == "0"
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=None if first else subprocess.PIPE,
            stderr=subprocess.PIPE if first else subprocess.STDOUT,
            # Ctrl-C in a terminal reaches the launcher alone, which decides what it means.
            start_new_session=True,
        )
        self._guard.watch(process.pid)
        pipe = process.stderr if first else process.stdout
        assert pipe is not None
        self._ranks[local_rank] = _Rank(process, RankOutput(pipe, "" if first else f"[rank {environment['RANK']}] "))
        self.alive.add(local_rank)

    def _bury(self, local_rank: int) -> int:
        process = self._ranks[local_rank].process
        # Before the rank is reaped, as only until then is its process group sure to be ours.
        _kill_group(process.pid)
        self._guard.forget(process.pid)
        return process.wait()

    def _reap_strangers(self) -> None:
        """PID 1 inherits the orphans of its container, and they stay zombies unless it reaps them."""
        ours = {self._ranks[local_rank].process.pid for local_rank in self.alive} | {self._guard.pid}
        with contextlib.suppress(ChildProcessError):
            while (child := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
                if child.si_pid in ours:
                    return
                os.waitpid(child.si_pid, 0)


def _has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
