"""Windows of tokens, for training in any order and for evaluation in full.

Window i covers tokens [i * L, i * L + L]: L inputs, and L targets one place further on. Neighbours share one
token, so that every token but the first of a split is the target of exactly one window.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mamba_trainer.contract import UserError
from mamba_trainer.data.megatron import is_megatron, open_megatron
from mamba_trainer.data.tokenfile import Meta, Split, TokenStream, open_stream

Batch = NDArray[np.int64]

#: Tokens of a dataset without a recorded vocabulary that are looked at for ids the model does not have.
_SCANNED_TOKENS = 1 << 28


@dataclass(frozen=True)
class EvaluationBatch:
    """`tokens` [n, L + 1]; the first `valid[i]` targets of row i count, what follows them is padding."""

    tokens: Batch
    valid: NDArray[np.int64]

    @property
    def mask(self) -> NDArray[np.bool_]:
        targets = self.tokens.shape[1] - 1
        return np.arange(targets) < self.valid[:, None]


@dataclass(frozen=True)
class TokenDataset:
    stream: TokenStream
    sequence_length: int
    meta: Meta | None

    @classmethod
    def open(cls, path: Path, split: Split, sequence_length: int) -> TokenDataset:
        """A split of a prepared directory; or the files of a Megatron stem, which serve as any split."""
        meta, stream = (None, open_megatron(path)) if is_megatron(path) else open_stream(path, split)
        dataset = cls(stream, sequence_length, meta)
        if not len(dataset):
            raise UserError(
                f"the {stream.origin} holds {len(stream.tokens):,} tokens, fewer than one sample of "
                f"{sequence_length + 1:,}: lower training.sequence_length, or prepare more text"
            )
        return dataset

    def __len__(self) -> int:
        """Whole windows; a shorter rest at the end is for evaluation only."""
        return (len(self.stream.tokens) - 1) // self.sequence_length

    @property
    def targets(self) -> int:
        return len(self.stream.tokens) - 1

    def batch(self, ids: NDArray[np.int64]) -> Batch:
        windows = np.empty((len(ids), self.sequence_length + 1), dtype=np.int64)
        for row, window in zip(windows, ids, strict=True):
            start = int(window) * self.sequence_length
            row[:] = self.stream.tokens[start : start + self.sequence_length + 1]
        return windows

    def evaluation_batches(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[EvaluationBatch]:
        """The whole split in order, each target once over all ranks.

        Every rank gets the same number of batches of the same shape, as collective operations in the model
        need; the last ones may be padding altogether.
        """
        windows = math.ceil(self.targets / self.sequence_length)
        for first in range(0, windows, batch_size * world_size):
            yield self._evaluation_batch(first + rank * batch_size, batch_size)

    def _evaluation_batch(self, first: int, batch_size: int) -> EvaluationBatch:
        tokens = np.zeros((batch_size, self.sequence_length + 1), dtype=np.int64)
        start = first * self.sequence_length
        stop = min(start + batch_size * self.sequence_length, self.targets)
        valid = np.clip(stop - start - np.arange(batch_size) * self.sequence_length, 0, self.sequence_length)
        for row, count in enumerate(valid):
            if count:
                begin = start + row * self.sequence_length
                tokens[row, : count + 1] = self.stream.tokens[begin : begin + count + 1]
        return EvaluationBatch(tokens, valid)


def open_datasets(
    path: Path, validation_path: Path | None, sequence_length: int
) -> tuple[TokenDataset, TokenDataset | None]:
    """Training and held-out data as the configuration names them; None where there is nothing held out."""
    train = TokenDataset.open(path, "train", sequence_length)
    if validation_path is not None:
        validation = TokenDataset.open(validation_path, "validation", sequence_length)
        _check_same_tokenizer(train, validation)
        return train, validation
    if train.meta is None or "validation" not in train.meta.splits:
        return train, None
    return train, TokenDataset.open(path, "validation", sequence_length)


def bits_per_byte(nll_nats_sum: float, source_bytes: int) -> float:
    """Compression of the text itself: comparable between tokenizers, which a loss per token is not."""
    return nll_nats_sum / math.log(2) / source_bytes


def check_vocabulary(dataset: TokenDataset, model_vocab_size: int) -> str | None:
    """Refuses tokens that the model has no embedding for; returns advice if most embeddings have no token."""
    if dataset.meta is None:
        _check_largest_token(dataset.stream.tokens, dataset.stream.origin, model_vocab_size)
        return None
    tokenizer = dataset.meta.tokenizer
    if tokenizer.vocab_size > model_vocab_size:
        raise UserError(
            f"the data was prepared with tokenizer {tokenizer.name!r}, whose vocabulary is "
            f"{tokenizer.vocab_size:,}, but model.vocab_size is {model_vocab_size:,}\n"
            f"Set model.vocab_size to {tokenizer.vocab_size}, or prepare the data with the model's tokenizer."
        )
    if model_vocab_size > 2 * tokenizer.vocab_size:
        return (
            f"model.vocab_size is {model_vocab_size:,}, but tokenizer {tokenizer.name!r} of the data only "
            f"uses {tokenizer.vocab_size:,}: the other embeddings are never trained"
        )
    return None


def _check_same_tokenizer(train: TokenDataset, validation: TokenDataset) -> None:
    """A loss on tokens of another tokenizer means nothing."""
    if train.meta and validation.meta and train.meta.tokenizer != validation.meta.tokenizer:
        raise UserError(
            f"training data was prepared with tokenizer {train.meta.tokenizer.name!r} and validation data "
            f"with {validation.meta.tokenizer.name!r}: prepare both with the same one"
        )


def _check_largest_token(tokens: NDArray[Any], origin: str, model_vocab_size: int) -> None:
    """Megatron files name no tokenizer, so the ids themselves are asked."""
    scanned = tokens[:_SCANNED_TOKENS]
    lowest, highest = int(scanned.min()), int(scanned.max())
    if lowest < 0 or highest >= model_vocab_size:
        raise UserError(
            f"{origin} holds token ids from {lowest:,} to {highest:,}, but model.vocab_size is "
            f"{model_vocab_size:,}: set it to the vocabulary of the tokenizer they were made with"
        )
