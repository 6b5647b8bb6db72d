"""A stand-in for a rank of the trainer, without torch: steps, reports, saves, agrees on a stop, or
misbehaves.

Run as `launcher_stub.py '<JSON of Stub>'` by the launcher under test. Ranks agree through files in `folder`,
as real ones do through a collective.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from mamba_trainer.contract import Phase
from mamba_trainer.report import RankReporter, install_stack_dump


@dataclass
class Stub:
    folder: str
    steps: int = 3
    step_seconds: float = 0.05
    save_seconds: float = 0.0
    save_every: int = 0
    #: What goes wrong: at `at_step`, on `rank` (-1: all), in attempts below `attempts`.
    trouble: str = ""
    rank: int = 0
    at_step: int = 1
    attempts: int = 1000
    #: The other ranks wait for a lost one for ever, as in a collective.
    stuck_without_it: bool = False
    ignore_sigterm: bool = False
    child: bool = False


class Rank:
    def __init__(self, stub: Stub) -> None:
        self.stub = stub
        self.folder = Path(stub.folder)
        self.rank = int(os.environ["RANK"])
        self.reporter = RankReporter.from_env()
        install_stack_dump()
        signal.signal(signal.SIGTERM, signal.SIG_IGN if stub.ignore_sigterm else self.ask_to_stop)
        if stub.child:
            subprocess.Popen(["sleep", "1000"])

    def ask_to_stop(self, signum: int, frame: object) -> None:
        (self.folder / "stop").touch()
        with (self.folder / f"sigterms.{self.rank}").open("a") as log:
            log.write("x")

    def meet(self) -> None:
        """As ranks do in the rendezvous."""
        attempt = os.environ["MAMBA_ATTEMPT"]
        (self.folder / f"ready.{attempt}.{self.rank}").touch()
        while len(list(self.folder.glob(f"ready.{attempt}.*"))) < int(os.environ["WORLD_SIZE"]):
            time.sleep(0.01)

    def train(self) -> int:
        start = max((int(p.suffix[1:]) for p in self.folder.glob("step.*")), default=0)
        self.meet()
        self.reporter.update(phase=Phase.TRAINING, step=start, resumed_from_step=start, max_steps=self.stub.steps)
        (self.folder / f"pid.{self.rank}").write_text(str(os.getpid()))
        for step in range(start + 1, self.stub.steps + 1):
            time.sleep(self.stub.step_seconds)
            self.reporter.update(step=step, loss=4.0 / step, tokens_per_second=1000.0, tokens_total=step * 10)
            self.misbehave(step)
            if (self.folder / "stop").exists():
                self.save(step)
                return 75
            if self.stub.save_every and step % self.stub.save_every == 0:
                self.save(step)
        self.reporter.update(phase=Phase.DONE)
        return 0

    def save(self, step: int) -> None:
        self.reporter.update(phase=Phase.SAVING)
        time.sleep(self.stub.save_seconds)
        (self.folder / f"step.{step}").touch()
        self.reporter.update(phase=Phase.TRAINING, last_checkpoint_step=step)

    def misbehave(self, step: int) -> None:
        stub = self.stub
        if step != stub.at_step or not stub.trouble or int(os.environ["MAMBA_ATTEMPT"]) >= stub.attempts:
            return
        if self.rank not in (stub.rank, *([self.rank] if stub.rank == -1 else [])):
            self.wait_for_ever() if stub.stuck_without_it else None
            return
        kind, _, value = stub.trouble.partition(":")
        getattr(self, f"do_{kind}")(value)

    def do_exit(self, code: str) -> None:
        print(f"last words of rank {self.rank}", file=sys.stderr, flush=True)
        sys.exit(int(code))

    def do_fail(self, code: str) -> None:
        self.reporter.fail("OutOfMemory", "the device is full; use a smaller micro-batch")
        sys.exit(int(code))

    def do_signal(self, number: str) -> None:
        os.kill(os.getpid(), int(number))
        time.sleep(1000)

    def do_hang(self, _: str) -> None:
        self.wait_for_ever()

    def wait_for_ever(self) -> None:
        while True:
            time.sleep(1000)


if __name__ == "__main__":
    sys.exit(Rank(Stub(**json.loads(sys.argv[1]))).train())
