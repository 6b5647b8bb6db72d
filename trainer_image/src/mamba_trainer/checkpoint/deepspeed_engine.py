"""DeepSpeed's way to the disk, led through `files`.

DeepSpeed decides what a shard holds and what it is called; this decides how it gets there and when it may be
read. While a checkpoint is being recorded, errors are kept instead of raised: DeepSpeed ends a save with a
barrier, and a rank that raised before it would leave the others waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine

from mamba_trainer.checkpoint import files
from mamba_trainer.checkpoint.manifest import FileEntry


class Record:
    """What one rank wrote into one checkpoint, or the first error that kept it from doing so."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.entries: list[FileEntry] = []
        self.error: str | None = None
        self._folder = folder
        self._rank = rank

    def write(self, path: Path, state: Any) -> None:
        self.attempt(lambda: self._write(path, state))

    def _write(self, path: Path, state: Any) -> None:
        written = _save(state, path)
        name = path.relative_to(self._folder).as_posix()
        self.entries.append(FileEntry(path=name, size=written.size, sha256=written.sha256, rank=self._rank))

    def attempt(self, action: Callable[[], object]) -> None:
        """Runs `action` unless something failed before, and keeps what it raises."""
        if self.error is not None:
            return
        try:
            action()
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"


class VerifiedCheckpointEngine(CheckpointEngine):
    """Writes every file with its hash, and loads only files that have been verified."""

    def __init__(self) -> None:
        super().__init__()
        self.name = type(self).__name__
        self._record: Record | None = None
        self._verified: frozenset[Path] = frozenset()

    @contextmanager
    def recording(self, folder: Path, rank: int) -> Iterator[Record]:
        """All saves inside go to the record, which also takes their errors."""
        self._record = Record(folder, rank)
        try:
            yield self._record
            self._record.attempt(lambda: files.sync_directory(folder))
        finally:
            self._record = None

    def allow(self, paths: Iterable[Path]) -> None:
        """From now on these files, and no others, may be loaded."""
        self._verified = frozenset(paths)

    def verified(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if Path(name) in self._verified]

    def create(self, info: CheckpointCommitInfo) -> None:
        """Nothing: the folder was made before DeepSpeed was called."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self._guarded(lambda: Path(path).mkdir(parents=True, exist_ok=exist_ok))

    def save(self, state_dict: Any, path: str) -> None:
        if self._record is not None:
            self._record.write(Path(path), state_dict)
        else:
            _save(state_dict, Path(path))

    def load(self, path: str, map_location: Any = None) -> Any:
        if Path(path) not in self._verified:
            raise PermissionError(f"{path} has not been verified and is not loaded")
        # Optimizer shards hold DeepSpeed's own classes; what they contain was written by this trainer.
        return torch.load(path, map_location=map_location, weights_only=False)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """Nothing: `commit.CheckpointDirectory` commits after all ranks have agreed."""
        return True

    def _guarded(self, action: Callable[[], object]) -> None:
        if self._record is not None:
            self._record.attempt(action)
        else:
            action()


def _save(state: Any, path: Path) -> files.Written:
    with _without_crc32():
        return files.write_file(path, lambda sink: torch.save(state, cast(IO[bytes], sink)))


@contextmanager
def _without_crc32() -> Iterator[None]:
    """`torch.load` never looks at the CRC-32 in its files, and it costs nearly as much time as SHA-256."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def install(engine: Any) -> VerifiedCheckpointEngine:
    """Makes a DeepSpeed engine write and read its checkpoints through a `VerifiedCheckpointEngine`."""
    ours = VerifiedCheckpointEngine()
    engine.checkpoint_engine = ours
    # DeepSpeed finds model states by pattern: a stray file that matches would become a part of the model.
    find_names = engine._get_all_ckpt_names
    engine._get_all_ckpt_names = lambda folder, tag: ours.verified(find_names(folder, tag))
    # On rank 0 DeepSpeed copies its recovery scripts to the directory, before the barrier mentioned above.
    copy_script = engine._copy_recovery_script
    engine._copy_recovery_script = lambda path: ours._guarded(lambda: copy_script(path))
    return ours
