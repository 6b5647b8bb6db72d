"""Starts launchers with stub ranks and waits for what they leave."""

from __future__ import annotations

import atexit
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent

#: Short times, so that a test of a limit does not last as long as the limit of a user.
QUICK = {"poll": 0.1, "failure_grace": 0.4, "peer_lost_grace": 0.8, "finish_grace": 1.0, "stack_dump": 0.5}


def stub(folder: Path, **behaviour: Any) -> list[str]:
    """The command of a stub rank (see `launcher_stub.Stub`)."""
    return [sys.executable, str(HERE / "launcher_stub.py"), json.dumps({"folder": str(folder), **behaviour})]


_started: list[subprocess.Popen[bytes]] = []


@atexit.register
def _kill_what_a_failed_test_left() -> None:
    for process in _started:
        if process.poll() is None:
            process.kill()
            process.wait()


class Launch:
    """A launcher in a process of its own."""

    def __init__(
        self,
        folder: Path,
        command: Sequence[str],
        limits: dict[str, float] | None = None,
        under: Sequence[str] = (),
        **spec: Any,
    ) -> None:
        self.folder = folder
        self.log = folder / "termination.json"
        settings = {
            "command": list(command),
            "nproc_per_node": 2,
            "termination_log": str(self.log),
            "limits": {**QUICK, **(limits or {})},
            **spec,
        }
        self.output = folder / f"output.{time.monotonic_ns()}"
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [*under, sys.executable, str(HERE / "launcher_driver.py"), json.dumps(settings)],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        _started.append(self.process)

    def send(self, signum: signal.Signals) -> None:
        self.process.send_signal(signum)

    def rank_pid(self, rank: int) -> int:
        path = self.folder / f"pid.{rank}"
        eventually(lambda: path.exists() and path.read_text() != "", f"rank {rank} trains")
        return int(path.read_text())

    def ranks_train(self, count: int = 2) -> None:
        for rank in range(count):
            self.rank_pid(rank)

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def wait(self, seconds: float = 30.0) -> int:
        return self.process.wait(seconds)

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def message(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self.log.read_text())
        return message


def eventually(condition: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def all_gone(processes: Sequence[psutil.Process], seconds: float = 5.0) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return not [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
