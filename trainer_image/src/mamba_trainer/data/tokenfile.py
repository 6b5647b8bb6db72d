"""The prepared dataset on disk: what `prepare` writes and training memory-maps.

    meta.json                       the commit: written last, so a folder without it is not a dataset
    train.bin, validation.bin       token ids, little-endian uint16 or uint32
    train.idx, validation.idx       int64 offset of each document's first token, then the number of tokens
    tokenizer.json                  the tokenizer, unless it is the byte tokenizer

A split starts with one end-of-text token and every document ends with one. So a model that reads a split from
its start predicts every token of every document and every end: its total loss over `source_bytes` is exactly
the bits per byte of that text.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from mamba_trainer.contract import UserError
from mamba_trainer.data.tokenizer import TOKENIZER_FILE, Tokenizer, TokenizerRecord

META_FILE = "meta.json"

Split = Literal["train", "validation"]

#: Every file but meta.json that a dataset may hold.
DATA_FILES = ("train.bin", "train.idx", "validation.bin", "validation.idx", TOKENIZER_FILE)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SplitMeta(_Record):
    tokens: int
    documents: int
    source_bytes: int
    sha256: str


class Parameters(_Record):
    """What decides the content of a dataset: two preparations with equal parameters write equal files.

    What the source holds counts, not where it lies.
    """

    source: str
    source_sha256: str
    tokenizer: str
    validation_fraction: float
    text_field: str
    include: tuple[str, ...]

    def difference(self, wanted: Parameters) -> list[str]:
        """One line for each parameter that differs."""
        ours, theirs = self.model_dump(exclude={"source"}), wanted.model_dump(exclude={"source"})
        if ours.pop("source_sha256") != theirs.pop("source_sha256"):
            changed = [f"source: {self.source} as it was then, not {wanted.source} as it is now"]
        else:
            changed = []
        return changed + [
            f"{name}: {ours[name]} (asked for: {theirs[name]})" for name in ours if ours[name] != theirs[name]
        ]


class Meta(_Record):
    format: Literal["mamba-tokens"] = "mamba-tokens"
    version: Literal[1] = 1
    dtype: Literal["uint16", "uint32"]
    tokenizer: TokenizerRecord
    parameters: Parameters
    splits: dict[Split, SplitMeta]
    skipped_documents: int

    @property
    def tokens(self) -> int:
        return sum(split.tokens for split in self.splits.values())

    @property
    def documents(self) -> int:
        return sum(split.documents for split in self.splits.values())

    @property
    def source_bytes(self) -> int:
        return sum(split.source_bytes for split in self.splits.values())


@dataclass(frozen=True)
class TokenStream:
    """One split, whatever file format holds it.

    Document i is `tokens[document_offsets[i] : document_offsets[i + 1]]`.
    """

    tokens: NDArray[Any]
    document_offsets: NDArray[np.int64]
    source_bytes: int | None
    origin: str


def token_dtype(vocab_size: int) -> Literal["uint16", "uint32"]:
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def stored(dtype: str) -> np.dtype[Any]:
    return np.dtype(dtype).newbyteorder("<")


def read_meta(directory: Path) -> Meta | None:
    """The committed description of a dataset, or None where none has been committed."""
    path = directory / META_FILE
    try:
        return Meta.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValidationError as error:
        raise UserError(
            f"{path} does not describe a dataset that this version can read: {error.errors()[0]['msg']}\n"
            "Prepare the dataset again, into another directory."
        ) from error


def open_stream(directory: Path, split: Split) -> tuple[Meta, TokenStream]:
    meta = read_meta(directory)
    if meta is None:
        raise UserError(f"{directory} is not a prepared dataset: make one with `mamba-train prepare`")
    if split not in meta.splits:
        raise UserError(f"{directory} has no {split} split: prepare again with a validation fraction above 0")
    sizes = meta.splits[split]
    tokens = map_tokens(directory / f"{split}.bin", stored(meta.dtype), sizes.tokens, told_by=META_FILE)
    offsets = map_tokens(directory / f"{split}.idx", stored("int64"), sizes.documents + 1, told_by=META_FILE)
    return meta, TokenStream(tokens, offsets, sizes.source_bytes, f"{split} split of {directory}")


def map_tokens(path: Path, dtype: np.dtype[Any], count: int, told_by: str) -> NDArray[Any]:
    """A file of exactly `count` integers, as `told_by` promises, read only when touched."""
    expected = count * dtype.itemsize
    actual = path.stat().st_size if path.is_file() else None
    if actual != expected:
        found = "is missing" if actual is None else f"holds {actual:,} bytes"
        raise UserError(
            f"{path} {found}, but {told_by} says {expected:,} bytes: the dataset was not copied completely. "
            "Copy or prepare it again."
        )
    if not count:
        raise UserError(f"{path} holds no tokens")
    return np.memmap(path, dtype=dtype, mode="r", shape=(count,)).view(np.ndarray)


class SplitWriter:
    """Appends documents to one split's partial files, which `DatasetWriter.commit` gives their names."""

    def __init__(self, directory: Path, split: Split, dtype: str, eot_id: int) -> None:
        self._dtype = stored(dtype)
        self.files = [directory / f"{split}.bin", directory / f"{split}.idx"]
        self._bin, self._idx = (_partial(path).open("wb") for path in self.files)
        self._sha256 = hashlib.sha256()
        self._tokens = self._documents = self._source_bytes = 0
        self._write_tokens(np.array([eot_id]))

    def append(self, tokens: NDArray[Any], lengths: NDArray[np.int64], source_bytes: int) -> None:
        """Whole documents, one after the other, `lengths[i]` tokens each."""
        ends = self._tokens + np.cumsum(lengths)
        self._idx.write((ends - lengths).astype(stored("int64")).tobytes())
        self._write_tokens(tokens)
        self._documents += len(lengths)
        self._source_bytes += source_bytes

    def _write_tokens(self, tokens: NDArray[Any]) -> None:
        raw = tokens.astype(self._dtype, copy=False).tobytes()
        self._bin.write(raw)
        self._sha256.update(raw)
        self._tokens += len(tokens)

    def finish(self) -> SplitMeta:
        self._idx.write(np.array([self._tokens], dtype=stored("int64")).tobytes())
        for file in (self._bin, self._idx):
            file.flush()
            os.fsync(file.fileno())
            file.close()
        return SplitMeta(
            tokens=self._tokens,
            documents=self._documents,
            source_bytes=self._source_bytes,
            sha256=self._sha256.hexdigest(),
        )

    def discard(self) -> None:
        for file, path in zip((self._bin, self._idx), self.files, strict=True):
            with contextlib.suppress(OSError):  # closing flushes, which a full disk refuses once more
                file.close()
            _partial(path).unlink(missing_ok=True)


class DatasetWriter:
    """Both splits of a dataset. Leaving the context without `commit` removes everything it wrote."""

    def __init__(self, directory: Path, splits: tuple[Split, ...], dtype: str, tokenizer: Tokenizer) -> None:
        self._directory = directory
        self._tokenizer = tokenizer
        self.splits = {split: SplitWriter(directory, split, dtype, tokenizer.eot_id) for split in splits}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for writer in self.splits.values():
            writer.discard()

    def finish(self) -> dict[Split, SplitMeta]:
        return {split: writer.finish() for split, writer in self.splits.items()}

    def commit(self, meta: Meta) -> None:
        """Everything durable under its final name first, meta.json last."""
        for name, content in self._tokenizer.files().items():
            _write_durably(self._directory / name, content)
        for writer in self.splits.values():
            for path in writer.files:
                _partial(path).rename(path)
        _sync_directory(self._directory)
        _write_durably(self._directory / META_FILE, meta.model_dump_json(indent=2).encode())
        _sync_directory(self._directory)


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _write_durably(path: Path, content: bytes) -> None:
    with _partial(path).open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    _partial(path).rename(path)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
