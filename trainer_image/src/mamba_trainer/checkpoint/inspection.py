"""What `mamba-train verify` says of a checkpoint, or of a folder of them. Changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mamba_trainer.checkpoint import layout
from mamba_trainer.checkpoint.commit import REASON_FILE, candidates, quarantined
from mamba_trainer.checkpoint.space import size_text
from mamba_trainer.checkpoint.verify import BadCheckpoint, verify
from mamba_trainer.contract import UserError


@dataclass(frozen=True)
class Finding:
    """One line about one folder. `sound` is False for what a resume would refuse."""

    folder: Path
    sound: bool
    text: str

    def __str__(self) -> str:
        return f"{self.folder}: {self.text}"


def inspect(directory: Path) -> Iterator[Finding]:
    """Hashes every file of every checkpoint, newest first; then says what stands in quarantine.

    Raises:
        UserError: there is no checkpoint at `directory`.
    """
    folders = [directory] if layout.is_checkpoint(directory.resolve().name) else candidates(directory)
    aside = quarantined(directory)
    if not directory.is_dir() or not (folders or aside):
        raise UserError(f"There is no checkpoint in {directory}: name a folder of step_N and final, or one of them.")
    yield from map(_examine, folders)
    for folder in aside:
        # Beside checkpoints it is history; where nothing else is left, a resume ends with NoValidCheckpoint.
        yield Finding(folder, bool(folders), f"set aside before: {_reason(folder)}")


def _examine(folder: Path) -> Finding:
    try:
        found = verify(folder)
    except BadCheckpoint as error:
        return Finding(folder, False, f"DAMAGED: {error}")
    ranks = f"{found.world_size} rank{'' if found.world_size == 1 else 's'}"
    size = size_text(found.total_bytes)
    return Finding(
        folder, True, f"sound: step {found.step}, ZeRO-{found.zero_stage}, {ranks}, {len(found.files)} files, {size}"
    )


def _reason(folder: Path) -> str:
    try:
        return (folder / REASON_FILE).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return "no reason recorded"
