"""Reads Megatron-LM's indexed datasets, so that tokens prepared for it need no second preparation.

The `.idx` file: 9 bytes of magic, version (u64), token type (u8), sequence and document counts (u64), then
the length (i32) and byte position (i64) of every sequence, then the first sequence of every document (i64).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mamba_trainer.contract import UserError
from mamba_trainer.data.tokenfile import TokenStream, map_tokens

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_INTEGER_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


def is_megatron(stem: Path) -> bool:
    return stem.name != "" and stem.with_name(stem.name + ".idx").is_file()


def open_megatron(stem: Path) -> TokenStream:
    """The tokens of `stem.bin`, in one piece: sequences must lie there without gaps and in order."""
    index, binary = (stem.with_name(stem.name + suffix) for suffix in (".idx", ".bin"))
    contents = _read_index(index)
    starts = np.concatenate(([0], np.cumsum(contents.lengths, dtype=np.int64)))
    if not np.array_equal(contents.pointers, starts[:-1] * contents.dtype.itemsize):
        raise UserError(f"{index} lists sequences with gaps or out of order: merge them with Megatron's tools first")
    tokens = map_tokens(binary, contents.dtype, int(starts[-1]), told_by=index.name)
    return TokenStream(tokens, starts[contents.document_starts], source_bytes=None, origin=str(binary))


@dataclass(frozen=True)
class _Index:
    dtype: np.dtype[Any]
    lengths: NDArray[np.int32]
    pointers: NDArray[np.int64]
    document_starts: NDArray[np.int64]


def _read_index(path: Path) -> _Index:
    raw = path.read_bytes()
    if len(raw) < _HEADER.size or not raw.startswith(_MAGIC):
        raise UserError(f"{path} is not a Megatron index: it does not begin with {_MAGIC!r}")
    _, version, type_code, sequences, documents = _HEADER.unpack_from(raw)
    if version != 1 or type_code not in _INTEGER_TYPES:
        raise UserError(f"{path}: version {version} with token type {type_code} cannot be read, only 1 with integers")
    # Multimodal files carry one more byte a sequence behind these.
    if len(raw) < _HEADER.size + 12 * sequences + 8 * documents:
        raise UserError(f"{path} is shorter than its header says: it was not copied completely")
    lengths = np.frombuffer(raw, "<i4", sequences, _HEADER.size)
    pointers = np.frombuffer(raw, "<i8", sequences, _HEADER.size + 4 * sequences)
    starts = np.frombuffer(raw, "<i8", documents, _HEADER.size + 12 * sequences)
    if not documents or starts[0] != 0 or starts[-1] != sequences or (np.diff(starts) < 0).any():
        raise UserError(f"{path}: its documents do not cover its sequences, the file is damaged")
    return _Index(np.dtype(_INTEGER_TYPES[type_code]), lengths, pointers, starts)
