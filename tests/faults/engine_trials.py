"""Ranks that train under the real DeepSpeed engine, and compare every resume with a run never killed."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from faults.commit_trials import WrongState
from faults.gang import Phase, Rank, RankFunction
from faults.tiny_engine import Run
from ranks import run_ranks

#: Steps of the reference run: a directory that has come near its end is left for a fresh one.
LAST_STEP = 60
STAGE = 2


def reference(directory: Path, world_size: int) -> list[list[str]]:
    """Fingerprint of every rank at every step of an undisturbed run."""
    return run_ranks(_fingerprints, world_size, directory)


def _fingerprints(rank: int, directory: Path) -> list[str]:
    run = Run(directory, stage=STAGE)
    digests = [run.digest()]
    for _ in range(LAST_STEP):
        run.train(1)
        digests.append(run.digest())
    return digests


def training(truth: list[list[str]]) -> RankFunction:
    def function(rank: Rank) -> None:
        rank.join()
        rank.announce_writes()
        with peers_may_die():
            run = Run(rank.directory, stage=STAGE, attempt=rank.attempt, keep=2)
            run.resume()
        rank.step = run.step
        if run.manager.quarantined or run.digest() != truth[rank.rank][run.step]:
            raise WrongState(f"step {run.step}: {run.messages}")
        rank.announce(Phase.RESUMED)
        while run.step < LAST_STEP:
            with peers_may_die():
                run.train(1)
            rank.step = run.step
            rank.announce(Phase.TRAINING)
            with peers_may_die():
                run.save()
            if rank.rank == 0:
                rank.announce(Phase.ACKNOWLEDGED)
        signal.pause()

    return function


@contextmanager
def peers_may_die() -> Iterator[None]:
    """A collective of gloo raises a bare RuntimeError when a peer is gone."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionResetError from error
