"""Which checkpoint a run starts from: the newest that verifies, found by all ranks together.

Rank 0 proposes, every rank reads and hashes the files it wrote itself, and rank 0 acts on what all of them
found. A bad checkpoint is set aside and reported; a run never falls back to step 0 because of one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mamba_trainer.checkpoint import layout, manifest
from mamba_trainer.checkpoint.commit import CheckpointDirectory, candidates, quarantined
from mamba_trainer.checkpoint.control import Control
from mamba_trainer.checkpoint.manifest import FileEntry, Manifest
from mamba_trainer.checkpoint.space import size_text
from mamba_trainer.checkpoint.verify import BadCheckpoint, read_manifest, verify_files
from mamba_trainer.contract import NoValidCheckpoint, UserError

_PROGRESS_SECONDS = 10.0


@dataclass(frozen=True)
class RunFacts:
    """What a checkpoint and the run that resumes it must agree on."""

    world_size: int
    zero_stage: int
    config_hash: str
    #: Further settings that decide how DeepSpeed lays out its shards (for ZeRO-3, `sub_group_size`).
    shard_layout: Mapping[str, Any] = field(default_factory=dict)


class Selection(NamedTuple):
    folder: Path
    manifest: Manifest


def refusal(folder: Path, found: Manifest, run: RunFacts) -> str | None:
    """Why this run cannot load a sound checkpoint, and what to do about it; None if it can."""
    if found.schema_version > manifest.SCHEMA_VERSION:
        return f"{folder} was written by a newer trainer. Use that version, or another directory."
    if found.world_size != run.world_size:
        return (
            f"{folder} was saved by {found.world_size} ranks and this run has {run.world_size}. "
            f"Start it with {found.world_size} ranks, or convert it with DeepSpeed's ds_to_universal."
        )
    if found.zero_stage != run.zero_stage:
        return (
            f"{folder} was saved with ZeRO stage {found.zero_stage} and this run uses {run.zero_stage}. "
            f"Set parallelism.zero_stage to {found.zero_stage}."
        )
    saved_layout = found.extra.get("shardLayout", {})
    for name, value in run.shard_layout.items():
        saved = saved_layout.get(name)
        if saved != value:
            return f"{folder} was saved with {name} = {saved} and this run has {value}: use the same."
    return None


def mismatch(folder: Path, found: Manifest, run: RunFacts) -> str | None:
    """`refusal`, for a checkpoint that was not asked for by name: it must be of the same optimisation problem."""
    problem = refusal(folder, found, run)
    if problem is None and found.config_hash != run.config_hash:
        return (
            f"{folder} was saved with another configuration of model, training or data order. "
            "Choose another checkpoint.directory, or name this checkpoint to go on from it: "
            f"--load_checkpoint {folder}"
        )
    return problem


class Resume:
    """One search. All ranks make the same calls in the same order."""

    def __init__(
        self, directory: CheckpointDirectory, control: Control, run: RunFacts, log: Callable[[str], None]
    ) -> None:
        self._directory = directory
        self._control = control
        self._run = run
        self._log = log
        self.quarantined = 0

    def newest(self) -> Selection | None:
        """The newest checkpoint of the directory that verifies; None for a directory without any.

        Raises:
            NoValidCheckpoint: there are checkpoints, and none of them verifies.
            UserError: the newest one is sound but not for this run.
        """
        while (proposed := self._control.on_rank_zero(self._propose)) is not None:
            problem = self._verify(proposed)
            if problem is None:
                return proposed
            self._control.on_rank_zero(partial(self._set_aside, proposed.folder, problem))
        return None

    def explicit(self, folder: Path) -> Selection:
        """The checkpoint that was asked for, or an error: never another one in its place.

        Newer ones of the same directory are set aside, as a later restart would otherwise return to them.
        """
        proposed = self._control.on_rank_zero(lambda: self._read_explicit(folder))
        problem = self._verify(proposed)
        if problem is not None:
            raise NoValidCheckpoint(f"{folder} is not loaded: {problem}.")
        self._control.on_rank_zero(lambda: self._abandon_newer(proposed))
        return proposed

    def _propose(self) -> Selection | None:
        for folder in candidates(self._directory.path):
            try:
                found = read_manifest(folder)
            except BadCheckpoint as error:
                self._set_aside(folder, str(error))
                continue
            problem = mismatch(folder, found, self._run)
            if problem is not None:
                raise UserError(problem)
            return Selection(folder, found)
        if bad := quarantined(self._directory.path):
            names = ", ".join(folder.name for folder in bad[:5])
            raise NoValidCheckpoint(
                f"{self._directory.path} holds no checkpoint that verifies ({len(bad)} in quarantine: "
                f"{names}). Restore one from a copy, or remove them to start from step 0."
            )
        return None

    def _read_explicit(self, folder: Path) -> Selection:
        if not folder.is_dir():
            raise UserError(f"There is no checkpoint {folder}.")
        try:
            found = read_manifest(folder)
        except BadCheckpoint as error:
            raise NoValidCheckpoint(f"{folder} is not loaded: {error}.") from None
        if problem := refusal(folder, found, self._run):
            raise UserError(problem)
        if found.config_hash != self._run.config_hash:
            self._log(f"{folder} was saved with another configuration; it was asked for by name, so it is loaded")
        return Selection(folder, found)

    def _verify(self, proposed: Selection) -> str | None:
        """What is wrong with it, the same answer on every rank."""
        progress = _Progress(proposed, self._log if self._control.rank == 0 else None, self._run.world_size)
        problem: str | None = None
        refused: str | None = None
        try:
            verify_files(proposed.folder, self._own(proposed.manifest.files), progress)
        except BadCheckpoint as error:
            problem = str(error)
        except UserError as error:
            refused = str(error)
        reports = self._control.gather((problem, refused))
        for rank, (_, refused) in enumerate(reports):
            if refused is not None:
                raise UserError(f"Rank {rank}: {refused}")
        return next((f"{problem} (rank {rank})" for rank, (problem, _) in enumerate(reports) if problem), None)

    def _own(self, entries: tuple[FileEntry, ...]) -> list[FileEntry]:
        rank, world_size = self._control.rank, self._control.world_size
        return [entry for entry in entries if entry.rank == rank or (rank == 0 and entry.rank >= world_size)]

    def _set_aside(self, folder: Path, reason: str) -> None:
        target = self._directory.quarantine(folder, reason)
        self.quarantined += 1
        self._log(f"checkpoint {folder.name} does not verify: {reason}; it is now {target.name}")

    def _abandon_newer(self, selected: Selection) -> None:
        if selected.folder.parent != self._directory.path or not layout.is_checkpoint(selected.folder.name):
            return
        for folder in candidates(self._directory.path):
            if folder == selected.folder:
                return
            target = self._directory.quarantine(folder, f"abandoned: training went back to {selected.folder.name}")
            self._log(f"going back to {selected.folder.name}: {folder.name} is now {target.name}")


class _Progress:
    """Says every few seconds how far the verification of a large checkpoint is."""

    def __init__(self, proposed: Selection, log: Callable[[str], None] | None, world_size: int) -> None:
        self._name = proposed.folder.name
        self._total = proposed.manifest.total_bytes // world_size
        self._log = log
        self._done = 0
        self._next = time.monotonic() + _PROGRESS_SECONDS

    def __call__(self, length: int) -> None:
        self._done += length
        if self._log is not None and time.monotonic() >= self._next:
            self._next += _PROGRESS_SECONDS
            self._log(f"verifying {self._name}: {size_text(self._done)} of about {size_text(self._total)} on rank 0")
