"""Turns what a user names as a source of text into units of work and a fingerprint of its content.

Only names, sizes and headers are read here; the text itself is read by workers (`units`).
"""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

from mamba_trainer.contract import UserError
from mamba_trainer.data.output import LOCK_FILE
from mamba_trainer.data.units import (
    Block,
    JsonLinesUnit,
    ParquetUnit,
    SavedDatasetUnit,
    TextUnit,
    Unit,
    load_saved_dataset,
)

STANDARD_LIBRARY = "python-stdlib"

UNIT_BYTES = 1 << 20

#: A lone text file has no documents of its own: it becomes documents of about this size.
TEXT_DOCUMENT_BYTES = 64 << 10

#: A file in a folder is one document, unless it is larger than this.
FILE_DOCUMENT_BYTES = 4 << 20

_JSON_LINES = {".jsonl", ".ndjson"}
_NOT_SOURCE = {"site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Source:
    name: str
    units: tuple[Unit, ...]
    sha256: str

    @property
    def size(self) -> int:
        return sum(unit.size for unit in self.units)


@dataclass(frozen=True)
class _File:
    path: Path
    name: str
    size: int
    modified: int


def open_source(source: str | Path, *, text_field: str = "text", include: Sequence[str] = ("*",)) -> Source:
    """A text, .jsonl or .parquet file, a folder of them, a saved Hugging Face dataset, or `python-stdlib`."""
    if str(source) == STANDARD_LIBRARY:
        return _standard_library()
    path = Path(source)
    if path.is_file():
        files = [_describe(path, path.name)]
        units = _file_units(files, text_field, TEXT_DOCUMENT_BYTES)
    elif (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        files = list(_walk(path, ("*",)))
        units = _saved_dataset_units(path, sum(file.size for file in files), text_field)
    elif (path / "dataset_dict.json").is_file():
        splits = sorted(child.name for child in path.iterdir() if child.is_dir())
        raise UserError(f"{path} holds several datasets, name one: {', '.join(str(path / name) for name in splits)}")
    elif path.is_dir():
        files = list(_walk(path, include))
        units = _file_units(files, text_field, FILE_DOCUMENT_BYTES)
    else:
        raise UserError(f"there is no file or folder {path}, and {STANDARD_LIBRARY} is the only built-in source")
    if not any(unit.size for unit in units):
        raise UserError(f"{path} holds no text" + _pattern_hint(include))
    return Source(str(path), tuple(units), _fingerprint(files, lambda file: file.modified))


def _standard_library() -> Source:
    """The interpreter's own library: real text that is on every machine, whenever it was installed."""
    files = list(_walk(Path(sysconfig.get_path("stdlib")), ("*.py",)))
    if not files:
        raise UserError("this Python comes without the source of its standard library: name your own text")
    version = ".".join(map(str, sys.version_info[:3]))
    units = tuple(_file_units(files, "", FILE_DOCUMENT_BYTES))
    return Source(f"{STANDARD_LIBRARY} {version}", units, _fingerprint(files, lambda _: 0))


def _walk(root: Path, include: Sequence[str]) -> Iterator[_File]:
    """Regular files in a fixed order; hidden and installed ones are never meant, nor tokens prepared before."""
    for folder, folders, names in os.walk(root):
        if LOCK_FILE in names and Path(folder) != root:
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _NOT_SOURCE)
        for name in sorted(names):
            path = Path(folder, name)
            relative = path.relative_to(root).as_posix()
            wanted = any(fnmatch(relative, pattern) or fnmatch(name, pattern) for pattern in include)
            if wanted and not name.startswith(".") and path.is_file():
                yield _describe(path, relative)


def _describe(path: Path, name: str) -> _File:
    status = path.stat()
    return _File(path, name, status.st_size, status.st_mtime_ns)


def _fingerprint(files: Iterable[_File], modified: Callable[[_File], int]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file.size}\0{modified(file)}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _pattern_hint(include: Sequence[str]) -> str:
    return "" if tuple(include) == ("*",) else f" in files that match {', '.join(include)}"


def _file_units(files: Sequence[_File], text_field: str, document_bytes: int) -> list[Unit]:
    units: list[Unit] = []
    for kind, group in groupby(files, key=lambda file: _kind(file.path)):
        if kind == "text":
            units += _text_units(group, document_bytes)
        elif kind == "json lines":
            units += (unit for file in group for unit in _json_lines_units(file, text_field))
        else:
            units += (unit for file in group for unit in _parquet_units(file, text_field))
    return units


def _kind(path: Path) -> str:
    if path.suffix in _JSON_LINES:
        return "json lines"
    return "parquet" if path.suffix == ".parquet" else "text"


def _text_units(files: Iterable[_File], document_bytes: int) -> Iterator[Unit]:
    blocks: list[Block] = []
    size = 0
    for file in files:
        for start in range(0, file.size, document_bytes):
            blocks.append(Block(file.path, start // document_bytes, document_bytes))
            size += min(document_bytes, file.size - start)
            if size >= UNIT_BYTES:
                yield TextUnit(tuple(blocks), size)
                blocks, size = [], 0
    if blocks:
        yield TextUnit(tuple(blocks), size)


def _json_lines_units(file: _File, field: str) -> Iterator[Unit]:
    for start in range(0, file.size, UNIT_BYTES):
        yield JsonLinesUnit(file.path, start, min(start + UNIT_BYTES, file.size), field)


def _parquet_units(file: _File, column: str) -> Iterator[Unit]:
    _require("pyarrow", f"read {file.path}")
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(file.path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file.path} is not a parquet file that can be read: {error}") from error
    schema = metadata.schema.to_arrow_schema()
    columns = [name for name in schema.names if schema.field(name).type in (pa.string(), pa.large_string())]
    _require_column(str(file.path), column, columns)
    for group in range(metadata.num_row_groups):
        yield ParquetUnit(file.path, group, column, metadata.row_group(group).total_byte_size)


def _saved_dataset_units(path: Path, size: int, field: str) -> list[Unit]:
    _require("datasets", f"read the saved dataset {path}")
    dataset = load_saved_dataset(path)
    texts = [name for name, feature in dataset.features.items() if getattr(feature, "dtype", None) in _TEXT_TYPES]
    _require_column(str(path), field, texts)
    rows = len(dataset)
    step = max(1, rows * UNIT_BYTES // max(1, size))
    return [
        SavedDatasetUnit(path, start, min(start + step, rows), field, size * min(step, rows - start) // rows)
        for start in range(0, rows, step)
    ]


_TEXT_TYPES = {"string", "large_string"}


def _require(module: str, purpose: str) -> None:
    if find_spec(module) is None:
        raise UserError(f"`{module}` is needed to {purpose}: pip install 'mamba-trainer[data]'")


def _require_column(name: str, column: str, columns: Sequence[str]) -> None:
    if column not in columns:
        raise UserError(
            f"{name} has no text column {column!r}; its text columns are: {', '.join(columns) or 'none'}\n"
            "Name the column that holds the text with --text-field."
        )
