"""The commit protocol of one checkpoint directory. One process uses it: rank 0.

Ranks fill `step_N.tmp-<attempt>/`; when all have, the manifest is written there and the folder is renamed to
`step_N/`. That rename is the commit. Before it no resume sees the folder, after it every byte in it is on
disk. Deletion takes the same way back: renamed first, so that a half-deleted folder has no name that a resume
trusts.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mamba_trainer.checkpoint import fence, layout, manifest
from mamba_trainer.checkpoint.files import sync_directory, write_bytes
from mamba_trainer.checkpoint.layout import Transience
from mamba_trainer.checkpoint.manifest import Manifest
from mamba_trainer.checkpoint.verify import BadCheckpoint, read_manifest

REASON_FILE = "quarantine-reason.txt"


class CheckpointDirectory:
    """What rank 0 of one run does to its directory. Every visible change checks the fence first."""

    def __init__(self, path: Path, attempt: int) -> None:
        self.path = path
        self.owner = fence.new_owner(attempt)

    def open(self) -> None:
        """Takes the directory, and clears what runs before this one left unfinished.

        Raises:
            Fenced: a newer attempt owns it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        fence.take(self.path, self.owner)
        for name in layout.list_names(self.path):
            found = layout.parse_transient(name)
            if found is not None and found.attempt <= self.owner.attempt:
                self._settle(self.path / name, found)

    def _settle(self, folder: Path, found: layout.Transient) -> None:
        original = self.path / found.checkpoint
        if found.why is Transience.REPLACED and not original.exists():
            folder.rename(original)  # its successor never got the name
            sync_directory(self.path)
        else:
            shutil.rmtree(folder)

    def begin(self, step: int, final: bool = False) -> Path:
        """An empty folder for all ranks to write to, on disk before they do."""
        fence.check(self.path, self.owner)
        folder = self.path / self._transient(layout.checkpoint_name(step, final), Transience.TMP)
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        try:
            sync_directory(self.path)
        except OSError:
            self.abort(folder)
            raise
        return folder

    def commit(self, folder: Path, content: Manifest, final: bool = False) -> Path:
        """Turns a folder from `begin`, complete and synced by every rank, into a checkpoint.

        Raises:
            Fenced: another run owns the directory; nothing was committed.
            OSError: nothing was committed, unless the very last sync of the directory failed.
        """
        for entry in content.files:
            seen = (folder / entry.path).stat().st_size
            if seen != entry.size:
                raise OSError(f"{entry.path} of rank {entry.rank} has {seen} bytes here instead of {entry.size}")
        write_bytes(folder / manifest.FILE_NAME, content.encode())
        target = self.path / layout.checkpoint_name(content.step, final)
        replaced = self.path / self._transient(target.name, Transience.REPLACED)
        fence.check(self.path, self.owner)
        if target.exists():
            target.rename(replaced)
        folder.rename(target)
        sync_directory(self.path)
        if replaced.exists():
            shutil.rmtree(replaced)
        with suppress(OSError):  # a hint: the checkpoint is committed without it
            write_bytes(self.path / layout.LATEST, target.name.encode())
        return target

    def abort(self, folder: Path) -> None:
        """Drops a folder from `begin`; to be called when no rank writes to it any more."""
        shutil.rmtree(folder, ignore_errors=True)

    def quarantine(self, folder: Path, reason: str) -> Path:
        """Takes a checkpoint out of the sight of every resume, with the reason beside its data."""
        fence.check(self.path, self.owner)
        target = self.path / f"{folder.name}.quarantine"
        number = 0
        while target.exists():
            number += 1
            target = self.path / f"{folder.name}.quarantine-{number}"
        folder.rename(target)
        sync_directory(self.path)
        with suppress(OSError):  # the name alone does what matters
            write_bytes(target / REASON_FILE, f"{reason}\n".encode())
        return target

    def retain(self, keep: int, committed: Path) -> list[str]:
        """Deletes all but the newest `keep` steps. `committed`, `final` and quarantined ones always stay.

        Returns:
            The names of those deleted.
        """
        names = expired([found.name for found in candidates(self.path)], keep, committed.name)
        for name in names:
            fence.check(self.path, self.owner)
            doomed = self.path / self._transient(name, Transience.DELETED)
            (self.path / name).rename(doomed)
            (doomed / manifest.FILE_NAME).unlink(missing_ok=True)
            shutil.rmtree(doomed)
        return names

    def _transient(self, checkpoint: str, why: Transience) -> str:
        return layout.transient_name(checkpoint, why, self.owner.attempt)


def candidates(directory: Path) -> list[Path]:
    """Folders that claim to be checkpoints, newest first. `final` stands before the step it was made at."""
    names = [name for name in layout.list_names(directory) if layout.is_checkpoint(name)]
    return [directory / name for name in sorted(names, key=lambda name: _age(directory / name), reverse=True)]


def _age(folder: Path) -> tuple[float, bool]:
    step = layout.step_of(folder.name)
    if step is not None:
        return step, False
    try:
        return read_manifest(folder).step, True
    except BadCheckpoint:
        return float("inf"), True  # first in line, so that it is found out and reported


def quarantined(directory: Path) -> list[Path]:
    return [directory / name for name in layout.list_names(directory) if layout.is_quarantined(name)]


def expired(newest_first: Sequence[str], keep: int, committed: str) -> list[str]:
    """Which of these names retention deletes."""
    steps = [name for name in newest_first if name != layout.FINAL]
    return [name for name in steps[keep:] if name != committed]
