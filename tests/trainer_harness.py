"""Trains as a user does: `train_deepspeed.py` with its launcher, real ranks and real DeepSpeed, in small.

Importing torch and DeepSpeed takes longer than these runs. `Training` therefore forks the launcher from this
process, and the launcher forks its ranks; all else, signals and exit codes included, is as a user has it.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before DeepSpeed is imported; each rank does so itself

import psutil
import torch

import ranks as _preloaded  # noqa: F401 what a rank would import by itself
from launcher_harness import QUICK, eventually
from mamba_trainer import cli, convert, launch, main, session  # noqa: F401 imported once, here
from mamba_trainer.data.prepare import prepare
from mamba_trainer.launch import Limits
from mamba_trainer.loop import Trainer
from mamba_trainer.restart import RestartPolicy

SEQUENCE = 64
GLOBAL_BATCH = 4
WORDS = ["def", "class", "return", "self", "import", "for", "in", "if", "else", "None", "True", "print", "range", "len"]


@functools.cache
def dataset() -> Path:
    """Some 400 kB of text that a model can learn, as bytes; prepared once."""
    folder = Path(tempfile.mkdtemp(prefix="trainer-data-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return prepared(folder, documents=200)


def prepared(folder: Path, documents: int, words: int = 400, validation_fraction: float = 0.1) -> Path:
    source = folder / "text.jsonl"
    choice = random.Random(0)
    lines = (json.dumps({"text": " ".join(choice.choices(WORDS, k=words))}) for _ in range(documents))
    source.write_text("\n".join(lines))
    prepare(source, folder / "tokens", tokenizer="byte", validation_fraction=validation_fraction, workers=1)
    return folder / "tokens"


def options(
    folder: Path, *, steps: int = 12, zero_stage: int = 2, data: Path | None = None, **settings: Any
) -> list[str]:
    """The command line of a small run; `settings` are GROUP__OPTION=VALUE."""
    small = {
        "model__d_model": 32, "model__n_layer": 2, "model__vocab_size": 257, "model__d_state": 4,
        "training__sequence_length": SEQUENCE, "training__global_batch_size": GLOBAL_BATCH,
        "training__warmup_steps": 2, "training__eval_sequences": 8, "training__eval_interval": 0,
        "parallelism__zero_stage": zero_stage, "checkpoint__interval": 4,
        "reporting__log_interval": 1, "reporting__jsonl": folder / "steps.jsonl",
    }  # fmt: skip
    return [
        "--preset", "tiny", "--num_gpus", "2", "--data", str(data or dataset()), "--max_steps", str(steps),
        "--checkpoint_dir", str(folder / "checkpoints"),
        *(word for key, value in (small | settings).items() for word in ("--set", f"{key.replace('__', '.')}={value}")),
    ]  # fmt: skip


@dataclass(frozen=True)
class QuickSpec(launch.LaunchSpec):
    """Short times, as in the launcher's own tests."""

    restart_policy: RestartPolicy = field(default_factory=lambda: RestartPolicy(first_delay_seconds=0.2))
    limits: Limits = field(default_factory=lambda: Limits(**(QUICK | {"finish_grace": 60.0})))


class Training:
    """A run in a process of its own, leader of its session as in a terminal.

    Args:
        before: called in each rank before it trains, with its number and its attempt: the place to record, to wait
            or to break something.
    """

    def __init__(
        self,
        folder: Path,
        arguments: Sequence[str],
        *,
        before: Callable[[int, int], object] | None = None,
        environ: Mapping[str, str] | None = None,
        command: Callable[[Sequence[str]], object] = cli.train_deepspeed,
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "termination.json"
        self.output = folder / "output"
        self.pid = os.fork()
        if self.pid == 0:
            _end_with(lambda: self._launch(lambda: command(arguments), before, environ or {}))
        self.process = psutil.Process(self.pid)
        _alive.append(self)

    def _launch(
        self, command: Callable[[], object], before: Callable[[int, int], object] | None, environ: Mapping[str, str]
    ) -> None:
        os.setsid()
        output = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        _become_a_process(os.environ | environ | {"MAMBA_TERMINATION_LOG": str(self.log)}, output, output)
        os.chdir(self.folder)
        launch.LaunchSpec = QuickSpec  # type: ignore[misc]
        real = subprocess.Popen
        subprocess.Popen = lambda command, **how: (  # type: ignore[assignment,misc]
            ForkedRank(command, before, **how) if "mamba_trainer.main" in command else real(command, **how)
        )
        command()

    def wait(self, seconds: float = 60) -> int:
        """The exit code, as a shell would say it."""
        status: list[int] = []

        def ended() -> bool:
            pid, ended_with = os.waitpid(self.pid, os.WNOHANG)
            status.extend([ended_with] if pid else [])
            return bool(pid)

        eventually(ended, f"the run ends:\n{self.text()}", seconds)
        _alive.remove(self)
        code = os.waitstatus_to_exitcode(status[0])
        return code if code >= 0 else 128 - code

    def text(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def message(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self.log.read_text())
        return message

    def reaches(self, step: int, folder: Path | None = None) -> None:
        eventually(lambda: last_step(folder or self.folder) >= step, f"step {step}:\n{self.text()}", 60)

    def ranks(self) -> list[psutil.Process]:
        """In their order."""
        found = {int(p.environ_rank): p.process for p in map(_RankProcess, self.process.children())}
        return [found[rank] for rank in sorted(found) if rank >= 0]

    def send(self, signum: signal.Signals) -> None:
        os.kill(self.pid, signum)

    def interrupt(self) -> None:
        """Ctrl-C: the terminal signals the whole foreground process group."""
        os.killpg(self.pid, signal.SIGINT)


_alive: list[Training] = []


@atexit.register
def _kill_what_a_failed_test_left() -> None:
    for training in _alive:
        os.kill(training.pid, signal.SIGKILL)


class _RankProcess:
    """A forked process has the environment of its parent in /proc; it names itself instead."""

    def __init__(self, process: psutil.Process) -> None:
        self.process = process
        name = Path(f"/proc/{process.pid}/comm").read_text().strip()
        self.environ_rank = name.removeprefix("rank-") if name.startswith("rank-") else "-1"


class ForkedRank:
    """What the launcher uses of `subprocess.Popen`, for a rank that is forked instead of started."""

    def __init__(
        self,
        command: Sequence[str],
        before: Callable[[int, int], object] | None,
        *,
        env: Mapping[str, str],
        stdin: int,
        stdout: int | None,
        stderr: int,
        start_new_session: bool,
    ) -> None:
        assert start_new_session and stdin == subprocess.DEVNULL
        read_end, write_end = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            _end_with(lambda: self._train(command, before, env, write_end if stdout else None, write_end))
        os.close(write_end)
        pipe = os.fdopen(read_end, "rb", buffering=0)
        self.stdout, self.stderr = (None, pipe) if stdout is None else (pipe, None)

    def _train(
        self,
        command: Sequence[str],
        before: Callable[[int, int], object] | None,
        environ: Mapping[str, str],
        stdout: int | None,
        stderr: int,
    ) -> None:
        os.setsid()
        _become_a_process(environ, stdout, stderr)
        sys.argv = [str(word) for word in command[2:]]
        Path("/proc/self/comm").write_text(f"rank-{environ['RANK']}")
        if before is not None:
            before(int(environ["RANK"]), int(environ["MAMBA_ATTEMPT"]))
        main.main(main._from_command_line)

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _become_a_process(environ: Mapping[str, str], stdout: int | None, stderr: int) -> None:
    """After a fork: signals, environment and descriptors as a process has them that was started anew."""
    signal.set_wakeup_fd(-1)
    for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(signum, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    if stdout is not None:
        os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    # Covered, not closed: objects of the parent close these numbers when they are collected, which must then not be
    # those of new sockets.
    for descriptor in map(int, os.listdir("/proc/self/fd")):  # noqa: PTH208 a Path would open another one
        if descriptor > 2 and descriptor != null:
            with contextlib.suppress(OSError):  # the listing's own
                os.dup2(null, descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    kept = dict(environ)  # it may be os.environ itself
    os.environ.clear()
    os.environ.update(kept)
    for handler in logging.getLogger("DeepSpeed").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stdout)
    torch.set_num_threads(1)


def _end_with(call: Callable[[], object]) -> None:
    code = 1
    try:
        call()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def paced(rank: int = 0, attempt: int = 0, seconds: float = 0.03) -> None:
    """A `before`: steps that last long enough for a test to act between two of them."""
    train_step = Trainer._train_step

    def step(trainer: Trainer) -> Any:
        time.sleep(seconds)
        return train_step(trainer)

    Trainer._train_step = step  # type: ignore[method-assign]


def trained(folder: Path, *, before: Callable[[int, int], object] | None = None, **settings: Any) -> Training:
    """A run that has ended well."""
    training = Training(folder, options(folder, **settings), before=before)
    assert training.wait() == 0, training.text()
    return training


def steps(folder: Path) -> list[dict[str, Any]]:
    """The JSON lines of a run."""
    path = folder / "steps.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line, parse_constant=_no_json) for line in lines if line.endswith("}")]


def _no_json(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def last_step(folder: Path) -> int:
    return max((row["step"] for row in steps(folder)), default=0)


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir() if path.is_dir())


def same_weights(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same fp32 values, bit by bit."""
    (_, first), (_, second) = convert.open_model(one), convert.open_model(other)
    return set(first.shapes) == set(second.shapes) and all(
        torch.equal(first.read(name), second.read(name)) for name in first.shapes
    )
