"""What a disk may hold if power fails before a given system call: one simulated disk per call and model.

SIGKILL loses nothing that was written, a power cut does. Three models span what file systems do with what was
not synced: keep it all (a kill), keep names but not the data of files, keep nothing.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any

_CALLS = frozenset(["open", "write", "flush", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir"])


class Model(StrEnum):
    ALL_KEPT = "all kept"
    DATA_LOST = "unsynced data lost"
    ALL_LOST = "all unsynced lost"


class Disk:
    """Watches one directory, and leaves a copy of what each model would hold before each call."""

    def __init__(self, root: Path, copies: Path) -> None:
        self._root = root
        self._copies = copies
        self._data: dict[int, bytes] = {}
        self._names: dict[int, dict[str, int]] = {}
        self._pins: list[int] = []
        #: (model, directory, whether the checkpoint had been acknowledged by then)
        self.snapshots: list[tuple[Model, Path, bool]] = []
        self.acknowledged = False
        for path in [root, *root.rglob("*")]:
            self._synced(path)

    def _synced(self, path: Path) -> None:
        self._pins.append(os.open(path, os.O_PATH))  # an inode that is held is not given to another file
        inode = path.stat().st_ino
        if path.is_dir():
            self._names[inode] = {entry.name: entry.stat().st_ino for entry in path.iterdir()}
        else:
            self._data[inode] = path.read_bytes()

    @contextmanager
    def watching(self) -> Iterator[None]:
        fsync = os.fsync

        def watched(descriptor: int) -> None:
            fsync(descriptor)
            self._synced(Path(f"/proc/self/fd/{descriptor}").readlink())

        os.fsync = watched
        sys.setprofile(self._before_call)
        try:
            yield
        finally:
            sys.setprofile(None)
            os.fsync = fsync
            self.snapshot()
            for pin in self._pins:
                os.close(pin)

    def _before_call(self, _frame: Any, event: str, function: Callable[..., Any]) -> None:
        if event == "c_call" and function.__name__ in _CALLS:
            self.snapshot()

    def snapshot(self) -> None:
        for model in Model:
            target = self._copies / str(len(self.snapshots))
            target.mkdir(parents=True)
            if model is Model.ALL_LOST:
                self._restore_names(self._root.stat().st_ino, target)
            else:
                shutil.copytree(self._root, target, dirs_exist_ok=True)
            if model is Model.DATA_LOST:
                for path in self._root.rglob("*"):
                    if path.is_file():
                        content = self._data.get(path.stat().st_ino, b"")
                        (target / path.relative_to(self._root)).write_bytes(content)
            self.snapshots.append((model, target, self.acknowledged))

    def _restore_names(self, inode: int, target: Path) -> None:
        for name, child in self._names.get(inode, {}).items():
            if child in self._names or child not in self._data:
                (target / name).mkdir()
                self._restore_names(child, target / name)
            else:
                (target / name).write_bytes(self._data[child])
