"""Checkpoints as a training loop sees them: `save` and `resume`, each called by every rank.

Everything that ranks must agree on passes through rank 0 or a gather; an error of one rank becomes the error
of all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from mamba_trainer.checkpoint import fence, layout, rng, space
from mamba_trainer.checkpoint.commit import CheckpointDirectory, candidates
from mamba_trainer.checkpoint.control import Control
from mamba_trainer.checkpoint.deepspeed_engine import Record, install
from mamba_trainer.checkpoint.manifest import Manifest
from mamba_trainer.checkpoint.resume import Resume, RunFacts, Selection
from mamba_trainer.checkpoint.verify import BadCheckpoint, read_manifest
from mamba_trainer.contract import TrainerError, UserError

#: DeepSpeed mixes a client's state with its own keys; under one key it comes back as it was given.
_CLIENT_STATE = "trainer_state"
#: Network file systems may show a replaced file late to other nodes.
_VISIBLE_SECONDS = 60.0


class SaveFailed(TrainerError):
    """No checkpoint was written, on no rank; older ones are untouched and training can go on."""

    reason = "CheckpointNotSaved"


@dataclass(frozen=True)
class SaveResult:
    step: int
    path: Path
    seconds: float
    bytes: int


@dataclass(frozen=True)
class ResumeState:
    """Where a run goes on from. If `finished`, it was complete already and nothing has been loaded."""

    step: int
    data_position: int
    client_state: dict[str, Any]
    path: Path
    finished: bool


class CheckpointManager:
    """Saves and resumes one DeepSpeed engine. All ranks make the same calls in the same order."""

    def __init__(
        self,
        directory: Path,
        engine: Any,
        *,
        control_group: dist.ProcessGroup,
        attempt: int,
        keep: int,
        config_hash: str,
        log: Callable[[str], None],
        expected_bytes: int = 0,
        shard_layout: Mapping[str, Any] | None = None,
        model: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            control_group: a gloo group of all ranks; its timeout must exceed the longest save of one rank.
            log: gets one-line messages, on rank 0 only.
            expected_bytes: size of one checkpoint, for the check of free space before the first save.
            shard_layout: settings, beyond world size and ZeRO stage, on which the content of shards depends.
            model: the model's configuration, for whoever exports a checkpoint without the run it came from.

        Raises:
            Fenced: a newer attempt owns the directory.
            UserError: the directory cannot be used, or is not the same one on all ranks.
        """
        self._control = Control(control_group)
        self._directory = CheckpointDirectory(directory.resolve(), attempt)
        self._engine = engine
        self._checkpoint_engine = install(engine)
        self._keep = keep
        self._log = log
        self._expected_bytes = expected_bytes
        self._run = RunFacts(
            self._control.world_size, engine.zero_optimization_stage(), config_hash, dict(shard_layout or {})
        )
        self._model = dict(model or {})
        self._started_from: str | None = None
        self._newest: tuple[int, Path] | None = None
        #: Checkpoints that failed to verify since this process started (rank 0).
        self.quarantined = 0
        self._control.on_rank_zero(self._open)
        self._require_shared_directory()

    def save(self, step: int, data_position: int, client_state: Mapping[str, Any], final: bool = False) -> SaveResult:
        """Commits the state of all ranks as `step_<step>` or `final`. The step saved last is not saved again.

        Raises:
            SaveFailed: a disk is full or broken; the run may go on.
            Fenced: another run owns the directory; this one must end.
        """
        if self._newest is not None and self._newest[0] == step and not final:
            return SaveResult(step, self._newest[1], 0.0, 0)
        started = time.monotonic()
        folder = self._control.on_rank_zero(lambda: self._begin(step, final))
        with self._checkpoint_engine.recording(folder, self._control.rank) as record:
            self._engine.save_checkpoint(
                str(folder.parent),
                tag=folder.name,
                client_state={_CLIENT_STATE: dict(client_state)},
                save_latest=False,
            )
            record.write(folder / layout.rng_file_name(self._control.rank), rng.capture())
        records: list[Record] = self._control.gather(record)
        path, size = self._control.on_rank_zero(lambda: self._commit(folder, records, step, data_position, final))
        self._newest = (step, path)
        return SaveResult(step, path, time.monotonic() - started, size)

    def resume(self, requested: Literal["auto"] | Path = "auto") -> ResumeState | None:
        """Loads the newest checkpoint that verifies, or the one at `requested`; None where there is none.

        A run that was started from `requested` and has saved since goes on from its own newest checkpoint, so
        that the same arguments serve the first start and every restart.

        Raises:
            NoValidCheckpoint: there are checkpoints but only bad ones, or the requested one is bad.
            UserError: it was saved by another number of ranks, ZeRO stage or configuration, or does not
            exist.
        """
        search = Resume(self._directory, self._control, self._run, self._log)
        self._started_from = None if requested == "auto" else str(Path(requested).resolve())
        try:
            if self._started_from is None or self._control.on_rank_zero(self._has_gone_on):
                selected = search.newest()
            else:
                selected = search.explicit(Path(self._started_from))
        finally:
            self.quarantined += search.quarantined
        return None if selected is None else self._load(selected)

    def _load(self, selected: Selection) -> ResumeState:
        folder, found = selected
        self._started_from = found.extra.get("startedFrom") if self._started_from is None else self._started_from
        if folder.name == layout.FINAL and found.config_hash == self._run.config_hash:
            return ResumeState(found.step, found.data_position, {}, folder, finished=True)
        self._checkpoint_engine.allow(folder / entry.path for entry in found.files)
        path, loaded = self._engine.load_checkpoint(str(folder.parent), tag=folder.name)
        self._checkpoint_engine.allow(())
        if path is None:
            raise UserError(f"{folder} holds no model states that DeepSpeed finds: was it saved by another model?")
        rng.restore(rng.load(folder / layout.rng_file_name(self._control.rank)))
        if folder.parent == self._directory.path:
            self._newest = (found.step, folder)
        return ResumeState(found.step, found.data_position, loaded[_CLIENT_STATE], folder, finished=False)

    # What follows runs on rank 0 alone, but for the last method.

    def _open(self) -> None:
        space.check_directory(self._directory.path, self._expected_bytes)
        self._directory.open()

    def _has_gone_on(self) -> bool:
        """Whether the newest checkpoint here is this very run's, gone on from the one that was asked for."""
        for folder in candidates(self._directory.path):
            try:
                found = read_manifest(folder)
            except BadCheckpoint:
                continue
            return found.config_hash == self._run.config_hash and found.extra.get("startedFrom") == self._started_from
        return False

    def _begin(self, step: int, final: bool) -> Path:
        if problem := space.shortage(self._directory.path, self._expected_bytes):
            raise SaveFailed(f"Step {step} is not saved. {problem}")
        try:
            return self._directory.begin(step, final)
        except OSError as error:
            raise SaveFailed(f"Step {step} is not saved: {error}.") from error

    def _commit(
        self, folder: Path, records: list[Record], step: int, data_position: int, final: bool
    ) -> tuple[Path, int]:
        errors = [f"rank {rank}: {record.error}" for rank, record in enumerate(records) if record.error]
        try:
            if errors:
                raise SaveFailed(f"Step {step} is not saved; older checkpoints stay. {'; '.join(errors[:3])}")
            manifest = self._manifest(records, step, data_position)
            path = self._directory.commit(folder, manifest, final)
        except OSError as error:
            self._directory.abort(folder)
            raise SaveFailed(f"Step {step} is not saved; older checkpoints stay. {error}") from error
        except TrainerError:
            self._directory.abort(folder)
            raise
        self._expected_bytes = manifest.total_bytes
        self._retain(path)
        return path, manifest.total_bytes

    def _manifest(self, records: list[Record], step: int, data_position: int) -> Manifest:
        extra: dict[str, Any] = {"shardLayout": dict(self._run.shard_layout), "model": self._model}
        if self._started_from is not None:
            extra["startedFrom"] = self._started_from
        return Manifest(
            step=step,
            attempt=self._directory.owner.attempt,
            world_size=self._run.world_size,
            zero_stage=self._run.zero_stage,
            data_position=data_position,
            config_hash=self._run.config_hash,
            files=tuple(entry for record in records for entry in record.entries),
            extra=extra,
        )

    def _retain(self, committed: Path) -> None:
        try:
            self._directory.retain(self._keep, committed)
        except OSError as error:  # the save itself succeeded; the next one tries again
            self._log(f"an old checkpoint could not be deleted: {error}")

    def _require_shared_directory(self) -> None:
        """Every rank must see what rank 0 wrote: one that does not would call good checkpoints bad."""
        owner = self._control.on_rank_zero(lambda: self._directory.owner)
        deadline = time.monotonic() + _VISIBLE_SECONDS
        while not (sees := fence.read(self._directory.path) == owner) and time.monotonic() < deadline:
            time.sleep(0.2)
        blind = [rank for rank, seen in enumerate(self._control.gather(sees)) if not seen]
        if blind:
            raise UserError(
                f"Ranks {blind} do not see what rank 0 writes to {self._directory.path}. All nodes must "
                "mount the same volume there (in Kubernetes: ReadWriteMany)."
            )
