"""Starts a resolved run on this machine: data first, then the launcher, which supervises it to its end."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from mamba_trainer import launch, preflight, sample
from mamba_trainer.checkpoint import fence
from mamba_trainer.contract import Env, ExitCode
from mamba_trainer.data.tokenfile import read_meta
from mamba_trainer.data.tokenizer import ByteTokenizer
from mamba_trainer.plan import smaller_plan
from mamba_trainer.resolve import check_output
from mamba_trainer.run import Run

#: What a rank waits for the rank that prepares built-in text.
_PREPARATION_SECONDS = 1800


def start(run: Run, port: int | None = None) -> int:
    """Trains; returns the exit code of the contract.

    Raises:
        UserError: data or checkpoint folder cannot serve.
    """
    check_output(run)
    run = with_data(run)
    files = _RunFiles(run)
    code = launch.run(
        launch.LaunchSpec(
            command=files.command(),
            nproc_per_node=run.plan.ranks_per_node,
            master_port=port,
            supervise=True,
            attempt=_first_attempt(run),
            status_port=run.config.reporting.status_port,
            on_replan=files.replan,
        )
    )
    if code == ExitCode.DONE:
        sample.print_ending(run)
    return code


def load_as_rank(run: Run) -> Run:
    """The run of a rank that `deepspeed` or `torchrun` started: one rank of each machine prepares the data.

    Raises:
        UserError: as `start`.
    """
    data = run.config.data
    if data.builtin is not None and os.environ.get("LOCAL_RANK", "0") != "0":
        directory = builtin_directory(str(data.builtin), run.config.model.vocab_size)
        deadline = time.monotonic() + _PREPARATION_SECONDS
        while read_meta(directory) is None and time.monotonic() < deadline:
            time.sleep(0.2)
    run = with_data(run)
    # Read before the ranks meet, so that all of them count alike; rank 0 writes the fence after that.
    os.environ.setdefault(Env.ATTEMPT, str(_first_attempt(run)))
    if os.environ["RANK"] == "0":
        check_output(run)
        run.write(run.config.checkpoint.directory / "run.json")
    return run


def with_data(run: Run) -> Run:
    """`run` with its data opened once, built-in text prepared: mistakes show before any rank starts."""
    preflight.require_data(run.config)
    data = run.config.data
    path = data.path or prepare_builtin(str(data.builtin), run.config.model.vocab_size)
    # Absolute: `generate` finds the tokenizer through run.json from wherever it is called.
    data = data.model_copy(update={"path": path.absolute(), "builtin": None})
    run = run.model_copy(update={"config": run.config.model_copy(update={"data": data})})
    if advice := preflight.check_data(run.config):
        print(advice)
    return run


def prepare_builtin(name: str, vocab_size: int) -> Path:
    """Real text from this machine as bytes, or with a BPE of the model's vocabulary trained on it; prepared once."""
    from mamba_trainer.console import prepare_with_progress

    path = builtin_directory(name, vocab_size)
    prepare_with_progress(
        name, path, tokenizer="byte" if vocab_size == ByteTokenizer.vocab_size else f"bpe:{vocab_size}"
    )
    return path


def builtin_directory(name: str, vocab_size: int) -> Path:
    return Path.cwd() / "data" / f"{name}-{vocab_size}"


def _first_attempt(run: Run) -> int:
    """Where the last run in this folder ended counting: its fence stops a lower number as a leftover of the past."""
    owner = fence.read(run.config.checkpoint.directory)
    return 0 if owner is None else owner.attempt


class _RunFiles:
    """The resolved run on disk, where the ranks read it; a smaller plan gets a file of its own."""

    def __init__(self, run: Run) -> None:
        self._run, self._number = run, 0
        run.write(self._path())

    def command(self) -> list[str]:
        return [sys.executable, "-m", "mamba_trainer.main", str(self._path())]

    def replan(self) -> list[str] | None:
        run = self._run
        if (plan := smaller_plan(run.config, run.hardware, run.plan)) is None:
            return None
        self._run, self._number = run.model_copy(update={"plan": plan}), self._number + 1
        self._run.write(self._path())
        return self.command()

    def _path(self) -> Path:
        suffix = f".replanned-{self._number}" if self._number else ""
        return self._run.config.checkpoint.directory / f"run{suffix}.json"
