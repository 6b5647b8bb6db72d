"""The baseline a trained model has to beat: a bigram model's bits per byte on the same held-out text.

Interpolated Kneser-Ney: P(b | a) = max(c(ab) - d, 0) / c(a) + d * n(a) / c(a) * P(b), where n(a) is how many
different tokens were seen after a, and P(b) is the share of all different pairs that end in b. With d chosen
on the tail of the training split, this is about the best that two adjacent symbols can tell. Reported for the
tokens a model is trained on, and for the bytes of the same text.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mamba_trainer.data.dataset import bits_per_byte
from mamba_trainer.data.tokenfile import TokenStream, open_stream
from mamba_trainer.data.tokenizer import ByteTokenizer, Tokenizer, open_tokenizer

#: Counting more than this changes the second decimal of nothing.
MAX_TRAINING_TOKENS = 1 << 26

_DISCOUNTS = (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
_TUNING_FRACTION = 0.05

Tokens = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class BigramBaseline:
    """Held-out bits per byte of the two models."""

    tokens: float
    bytes: float


def bigram_bits_per_byte(directory: Path) -> BigramBaseline:
    """Both baselines of a prepared dataset, on its whole validation split."""
    meta, train = open_stream(directory, "train")
    _, validation = open_stream(directory, "validation")
    source_bytes = meta.splits["validation"].source_bytes
    head = train.tokens[:MAX_TRAINING_TOKENS]
    tokens = bits_per_byte(_held_out_nats(head, validation.tokens, meta.tokenizer.vocab_size), source_bytes)
    if meta.tokenizer.kind == "byte":
        return BigramBaseline(tokens, tokens)
    tokenizer = open_tokenizer(directory, meta.tokenizer)
    nats = _held_out_nats(_as_bytes(train, tokenizer), _as_bytes(validation, tokenizer), ByteTokenizer.vocab_size)
    return BigramBaseline(tokens, bits_per_byte(nats, source_bytes))


class _Bigram:
    def __init__(self, tokens: Tokens, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._pairs, self._pair_counts = np.unique(_pairs(tokens, vocab_size), return_counts=True)
        self._context_counts = np.bincount(tokens[:-1], minlength=vocab_size)
        self._followers = np.bincount(self._pairs // vocab_size, minlength=vocab_size)
        # Add-one, as a held-out token may be one that training never saw.
        endings = np.bincount(self._pairs % vocab_size, minlength=vocab_size) + 1
        self._ending = endings / endings.sum()

    def nats(self, tokens: Tokens, discount: float) -> float:
        """Negative log-likelihood of all tokens but the first."""
        pairs = _pairs(tokens, self._vocab_size)
        contexts, targets = tokens[:-1], tokens[1:]
        places = np.minimum(np.searchsorted(self._pairs, pairs), len(self._pairs) - 1)
        seen = np.where(self._pairs[places] == pairs, self._pair_counts[places], 0)
        totals = self._context_counts[contexts]
        # A context never seen has nothing to discount: all its mass goes to P(b).
        backed_off = np.where(totals, discount * self._followers[contexts] / np.maximum(totals, 1), 1.0)
        likelihood = np.maximum(seen - discount, 0) / np.maximum(totals, 1) + backed_off * self._ending[targets]
        return float(-np.log(likelihood).sum())


def _held_out_nats(train: Tokens, validation: Tokens, vocab_size: int) -> float:
    cut = int(len(train) * (1 - _TUNING_FRACTION))
    tuned = _Bigram(train[:cut], vocab_size)
    discount = min(_DISCOUNTS, key=lambda candidate: tuned.nats(train[cut:], candidate))
    return _Bigram(train, vocab_size).nats(validation, discount)


def _pairs(tokens: Tokens, vocab_size: int) -> NDArray[np.int64]:
    return tokens[:-1].astype(np.int64) * vocab_size + tokens[1:]


def _as_bytes(stream: TokenStream, tokenizer: Tokenizer) -> Tokens:
    """The same documents as the byte tokenizer would have them, each with its end."""
    bytewise = ByteTokenizer()
    end = np.array([bytewise.eot_id], dtype=np.uint32)
    pieces, count = [end], 0
    for start, stop in zip(stream.document_offsets[:-1], stream.document_offsets[1:], strict=True):
        pieces += [*bytewise.encode_batch([tokenizer.decode(stream.tokens[start : stop - 1].tolist())]), end]
        count += len(pieces[-2])
        if count >= MAX_TRAINING_TOKENS:
            break
    return np.concatenate(pieces)
