"""One unit of a source to tokens: the pure work that `prepare` spreads over processes.

Which split a document belongs to is decided by a hash of its bytes. So the decision is the same wherever the
document stands and however many workers there are, and copies of one document never stand on both sides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mamba_trainer.contract import UserError
from mamba_trainer.data.tokenfile import Split, stored
from mamba_trainer.data.tokenizer import Ids, Tokenizer
from mamba_trainer.data.units import Unit

#: Text that is tokenised together: a tokenizer takes about a hundred times its memory.
_BATCH_BYTES = 1 << 20


@dataclass(frozen=True)
class EncodedDocuments:
    """Whole documents of one split, one after the other, each with its end-of-text token."""

    tokens: NDArray[np.generic]
    lengths: NDArray[np.int64]
    source_bytes: int


@dataclass(frozen=True)
class EncodedUnit:
    size: int
    skipped: int
    splits: dict[Split, EncodedDocuments]


@dataclass
class _Documents:
    """What a split has gathered so far."""

    encoded: list[Ids] = field(default_factory=list)
    source_bytes: int = 0


@dataclass(frozen=True)
class Encoder:
    """A function from unit to tokens, as data: it travels to worker processes."""

    tokenizer: Tokenizer
    dtype: str
    validation_fraction: float

    def __call__(self, unit: Unit) -> EncodedUnit:
        gathered: dict[Split, _Documents] = {"train": _Documents(), "validation": _Documents()}
        skipped = 0
        for batch in _batches(read_documents(unit)):
            texts = [(raw, text) for raw in batch if (text := decode_text(raw)) is not None]
            skipped += len(batch) - len(texts)
            for (raw, _), ids in zip(texts, self.tokenizer.encode_batch([text for _, text in texts]), strict=True):
                split = gathered[split_of(raw, self.validation_fraction)]
                split.encoded.append(ids)
                split.source_bytes += len(raw)
        return EncodedUnit(unit.size, skipped, {split: self._join(docs) for split, docs in gathered.items()})

    def _join(self, documents: _Documents) -> EncodedDocuments:
        lengths = np.array([len(ids) + 1 for ids in documents.encoded], dtype=np.int64)
        tokens = np.full(int(lengths.sum()), self.tokenizer.eot_id, dtype=stored(self.dtype))
        for ids, end in zip(documents.encoded, np.cumsum(lengths), strict=True):
            tokens[end - 1 - len(ids) : end - 1] = ids
        return EncodedDocuments(tokens, lengths, documents.source_bytes)


def _batches(documents: Iterator[bytes]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    size = 0
    for raw in documents:
        batch.append(raw)
        size += len(raw)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def split_of(raw: bytes, validation_fraction: float) -> Split:
    place = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")
    return "validation" if place < validation_fraction * 2**64 else "train"


def read_documents(unit: Unit) -> Iterator[bytes]:
    """The documents of a unit that hold anything at all."""
    try:
        yield from (raw for raw in unit.documents() if raw)
    except OSError as error:
        raise UserError(f"cannot read {error.filename or 'the source'}: {error.strerror or error}") from error


def decode_text(raw: bytes) -> str | None:
    """The text, or None for what is no text: other encodings, and binary files, which hold zero bytes."""
    try:
        return None if b"\0" in raw else raw.decode()
    except UnicodeDecodeError:
        return None


def training_texts(unit: Unit, validation_fraction: float) -> Iterator[str]:
    """Texts that a tokenizer may learn from: never the held-out ones."""
    for raw in read_documents(unit):
        text = decode_text(raw)
        if text is not None and split_of(raw, validation_fraction) == "train":
            yield text
