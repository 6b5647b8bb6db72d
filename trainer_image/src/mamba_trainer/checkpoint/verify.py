"""Whether a folder is exactly what was committed. Reads bytes only: nothing is unpickled, nothing is
changed."""

from __future__ import annotations

import stat
from collections.abc import Iterable
from pathlib import Path

from mamba_trainer.checkpoint import layout, manifest
from mamba_trainer.checkpoint.files import Progress, hash_file
from mamba_trainer.checkpoint.manifest import FileEntry, Manifest
from mamba_trainer.contract import UserError


class BadCheckpoint(Exception):
    """The folder is not what was committed. The message names the file and the difference."""


def verify(folder: Path, progress: Progress | None = None) -> Manifest:
    """Checks a whole checkpoint: manifest, and presence, size and SHA-256 of every file it lists.

    Files that the manifest does not list are ignored here, and refused should a loader ask for them.

    Raises:
        BadCheckpoint: it must not be loaded.
        UserError: it cannot be read for lack of rights, which says nothing about its content.
    """
    found = read_manifest(folder)
    verify_files(folder, found.files, progress)
    return found


def read_manifest(folder: Path) -> Manifest:
    """The manifest of `folder`, parsed and in agreement with the folder's name. Raises as `verify` does."""
    path = folder / manifest.FILE_NAME
    try:
        if (size := _regular_size(path)) > manifest.MAX_BYTES:
            raise BadCheckpoint(f"{path.name} has {size} bytes")
        found = manifest.parse(path.read_bytes())
    except manifest.ManifestError as error:
        raise BadCheckpoint(f"{path.name} is no manifest: {error}") from None
    except OSError as error:
        raise _unreadable(path, error) from None
    if layout.is_checkpoint(folder.name) and layout.step_of(folder.name) not in (None, found.step):
        raise BadCheckpoint(f"its manifest is that of step {found.step}")
    return found


def verify_files(folder: Path, entries: Iterable[FileEntry], progress: Progress | None = None) -> None:
    """Checks some files of a checkpoint; sizes first, so that a truncated file is found at once."""
    entries = list(entries)
    for entry in entries:
        path = folder / entry.path
        try:
            size = _regular_size(path)
        except OSError as error:
            raise _unreadable(path, error) from None
        if size != entry.size:
            raise BadCheckpoint(f"{entry.path} has {size} bytes instead of {entry.size}")
    for entry in entries:
        path = folder / entry.path
        try:
            read = hash_file(path, progress)
        except OSError as error:
            raise _unreadable(path, error) from None
        if (read.size, read.sha256) != (entry.size, entry.sha256):
            raise BadCheckpoint(f"{entry.path} has SHA-256 {read.sha256} instead of {entry.sha256}")


def _regular_size(path: Path) -> int:
    """Size of a regular file: a pipe would block the reader, a link could lead anywhere."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise BadCheckpoint(f"{path.name} is not a regular file")
    return status.st_size


def _unreadable(path: Path, error: OSError) -> Exception:
    if isinstance(error, PermissionError):
        return UserError(f"No right to read {path}. Make it readable for the user that trains.")
    if isinstance(error, FileNotFoundError):
        return BadCheckpoint(f"{path.name} is missing")
    return BadCheckpoint(f"{path.name} cannot be read: {error.strerror}")
