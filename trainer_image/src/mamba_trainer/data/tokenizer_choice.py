"""Which tokenizer a preparation uses, named before any work is done: even one that is still to be trained."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mamba_trainer.contract import UserError
from mamba_trainer.data.encode import training_texts
from mamba_trainer.data.sources import Source
from mamba_trainer.data.tokenizer import Tokenizer, load_tokenizer, train_bpe

#: What a trained tokenizer learns from: text from all over the source, as much in all.
_SAMPLE_BYTES = 16 << 20
_SAMPLE_PLACES = 64

#: 256 bytes and the end of a text: a smaller byte-level vocabulary cannot say everything.
_SMALLEST_BPE = 257
_LARGEST_BPE = 1 << 20

#: Called with the places read so far, and all of them.
OnSample = Callable[[int, int], None]


@dataclass(frozen=True)
class TokenizerChoice:
    """`identity` tells two tokenizers apart, given that the source is the same."""

    identity: str
    build: Callable[[Source, float, OnSample], Tokenizer]


def choose_tokenizer(spec: str, eot_token: str | None) -> TokenizerChoice:
    """`bpe:N` for one trained on the source; all else is for `load_tokenizer`."""
    match = re.fullmatch(r"bpe:(\d+)", spec)
    if eot_token is not None and (match or spec == "byte"):
        raise UserError(f"the tokenizer {spec} has an end-of-text token of its own: leave --eot-token out")
    if match:
        return _trained(int(match[1]))
    tokenizer = load_tokenizer(spec, eot_token)
    record = tokenizer.record()
    identity = record.kind if record.sha256 is None else f"{record.sha256} ending with {record.eot_id}"
    return TokenizerChoice(identity, lambda *_: tokenizer)


def _trained(vocab_size: int) -> TokenizerChoice:
    if not _SMALLEST_BPE <= vocab_size <= _LARGEST_BPE:
        raise UserError(f"N in bpe:N must be from {_SMALLEST_BPE} to {_LARGEST_BPE:,}, not {vocab_size:,}")

    def train(source: Source, validation_fraction: float, on_sample: OnSample) -> Tokenizer:
        return train_bpe(_sample(source, validation_fraction, on_sample), vocab_size)

    return TokenizerChoice(f"bpe:{vocab_size}", train)


def _sample(source: Source, validation_fraction: float, on_sample: OnSample) -> Iterator[str]:
    places = min(_SAMPLE_PLACES, len(source.units))
    share = _SAMPLE_BYTES // places
    for place in range(places):
        taken = 0
        for text in training_texts(source.units[place * len(source.units) // places], validation_fraction):
            yield text
            taken += len(text)
            if taken >= share:
                break
        on_sample(place + 1, places)
