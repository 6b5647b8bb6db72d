"""Bytes to disk and back, with their SHA-256.

A file is written under a temporary name, synced, and only then given its own: whoever finds the name finds
all bytes. The hash is computed from the bytes in memory while they are written, so that it vouches for what
was meant to be saved, not for what a disk gave back.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

#: Read size of verification: large enough for network storage, small enough to stay in cache.
BLOCK_BYTES = 8 * 2**20
#: Smaller pieces are hashed where they are: handing them to a thread costs more than it saves.
_OVERLAP_FROM_BYTES = 2**20
_BUFFER_BYTES = 2**20

Progress = Callable[[int], None]


class Written(NamedTuple):
    size: int
    sha256: str


class Sink(Protocol):
    """The part of a binary file that serialisers such as `torch.save` use."""

    def write(self, data: bytes | memoryview, /) -> int: ...
    def flush(self) -> None: ...


class _HashingSink:
    """Hashes and writes at the same time.

    A failed write is kept and raised by `finish`, and what follows it is dropped: between `torch.save`
    and this class is C code that no exception should pass through, and that writes again while it closes.
    """

    def __init__(self, file: BinaryIO, hasher: ThreadPoolExecutor) -> None:
        self._file = file
        self._hasher = hasher
        self._sha256 = hashlib.sha256()
        self._size = 0
        self._error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        length = memoryview(data).nbytes
        if self._error is None:
            try:
                self._write(data, length)
            except OSError as error:
                self._error = error
        return length

    def _write(self, data: bytes | memoryview, length: int) -> None:
        if length < _OVERLAP_FROM_BYTES:
            self._sha256.update(data)
            self._file.write(data)
        else:
            hashing = self._hasher.submit(self._sha256.update, data)
            try:
                self._file.write(data)
            finally:
                hashing.result()  # the caller may free `data` as soon as we return
        self._size += length

    def flush(self) -> None:
        """Nothing: `write_file` flushes once, at the end."""

    def finish(self) -> Written:
        if self._error is not None:
            raise self._error
        return Written(self._size, self._sha256.hexdigest())


def write_file(path: Path, produce: Callable[[Sink], object]) -> Written:
    """Writes what `produce` puts into a sink to `path`, durably, all or nothing.

    The new name itself is durable after `sync_directory` of the parent, which one call can do for many files.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb", buffering=_BUFFER_BYTES) as file, ThreadPoolExecutor(1) as hasher:
            sink = _HashingSink(file, hasher)
            produce(sink)
            written = sink.finish()
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)  # noqa: PTH105 (the name that every account of atomic writes uses)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return written


def write_bytes(path: Path, content: bytes) -> Written:
    """`write_file` for what is already in memory, and its name made durable too."""
    written = write_file(path, lambda sink: sink.write(content))
    sync_directory(path.parent)
    return written


def sync_directory(directory: Path) -> None:
    """Makes creations and renames in `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems have no such call; their renames are synchronous.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def hash_file(path: Path, progress: Progress | None = None) -> Written:
    """Size and SHA-256 of the bytes in `path`; `progress` gets the length of every block read."""
    sha256 = hashlib.sha256()
    block = memoryview(bytearray(BLOCK_BYTES))
    size = 0
    with path.open("rb", buffering=0) as file:
        while length := file.readinto(block):
            sha256.update(block[:length])
            size += length
            if progress is not None:
                progress(length)
    return Written(size, sha256.hexdigest())
