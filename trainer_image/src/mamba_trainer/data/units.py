"""How a worker reads its share of a source: a unit of about a mebibyte, found again from a few plain values.

A unit says which documents it holds by places in files alone, so the same source is cut the same way on every
machine, and units travel to worker processes while their text does not. Documents come as bytes that claim to
be UTF-8; `encode` judges that, in one place.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Protocol

from mamba_trainer.contract import UserError


class Unit(Protocol):
    @property
    def size(self) -> int:
        """Bytes on disk, about: the measure of progress."""

    def documents(self) -> Iterator[bytes]: ...


@dataclass(frozen=True, slots=True)
class Block:
    """A document of a text file: from the first line end in its block to the first one in the next block."""

    path: Path
    index: int
    block_bytes: int

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            start, stop = self._cut(file, self.index), self._cut(file, self.index + 1)
            file.seek(start)
            return file.read(stop - start)

    def _cut(self, file: IO[bytes], index: int) -> int:
        """Where block `index` really begins: a place that depends on nothing but the bytes around it."""
        if index == 0:
            return 0
        origin = index * self.block_bytes
        file.seek(origin)
        window = file.read(self.block_bytes)
        line_end = window.find(b"\n")
        if line_end >= 0:
            return origin + line_end + 1
        head = window[:4]
        return origin + next((at for at, byte in enumerate(head) if byte & 0xC0 != 0x80), len(head))


@dataclass(frozen=True, slots=True)
class TextUnit:
    blocks: tuple[Block, ...]
    size: int

    def documents(self) -> Iterator[bytes]:
        return (block.read() for block in self.blocks)


@dataclass(frozen=True, slots=True)
class JsonLinesUnit:
    """The records of a JSON lines file whose line begins in [start, stop)."""

    path: Path
    start: int
    stop: int
    field: str

    @property
    def size(self) -> int:
        return self.stop - self.start

    def documents(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            if self.start:
                file.seek(self.start - 1)
                file.readline()
            while (at := file.tell()) < self.stop and (line := file.readline()):
                if not line.isspace():
                    yield self._text(line, at)

    def _text(self, line: bytes, at: int) -> bytes:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{self.path}, byte {at:,}: not a JSON record ({error}): {line[:60]!r}") from error
        if not isinstance(record, dict) or self.field not in record:
            has = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise UserError(
                f"{self.path}, byte {at:,}: the record has no text in field {self.field!r} (it has: {has})\n"
                "Name the field that holds the text with --text-field."
            )
        text = record[self.field]
        if text is not None and not isinstance(text, str):
            raise UserError(f"{self.path}, byte {at:,}: field {self.field!r} holds {json.dumps(text)[:40]}, no text")
        return (text or "").encode(errors="surrogatepass")


@dataclass(frozen=True, slots=True)
class ParquetUnit:
    path: Path
    row_group: int
    column: str
    size: int

    def documents(self) -> Iterator[bytes]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        with pq.ParquetFile(self.path) as file:
            for rows in file.iter_batches(64, row_groups=[self.row_group], columns=[self.column]):
                yield from (text for text in rows.column(0).cast(pa.large_binary()).to_pylist() if text)


@dataclass(frozen=True, slots=True)
class SavedDatasetUnit:
    """Rows [start, stop) of a dataset written by `datasets.Dataset.save_to_disk`."""

    path: Path
    start: int
    stop: int
    field: str
    size: int

    def documents(self) -> Iterator[bytes]:
        texts = load_saved_dataset(self.path)[self.start : self.stop][self.field]
        return (text.encode(errors="surrogatepass") for text in texts if text)


@lru_cache(maxsize=1)
def load_saved_dataset(path: Path) -> Any:
    """Opened once a process: it is memory-mapped."""
    import datasets

    return datasets.load_from_disk(str(path))
