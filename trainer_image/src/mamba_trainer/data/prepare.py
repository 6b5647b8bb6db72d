"""Text to a prepared dataset, once: in parallel, in order, and the same bytes whatever the number of workers.

The corpus streams through: units are read and tokenised by workers and appended in order. A directory that
already holds the same preparation is left as it is, so callers may prepare before every run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mamba_trainer.contract import UserError
from mamba_trainer.data.encode import EncodedUnit, Encoder
from mamba_trainer.data.output import (
    full_disk_explained,
    locked,
    prepared_before,
    refuse_foreign_files,
    require_space,
)
from mamba_trainer.data.parallel import available_cpus, ordered_map
from mamba_trainer.data.sources import Source, open_source
from mamba_trainer.data.tokenfile import DatasetWriter, Meta, Parameters, Split, SplitMeta, token_dtype
from mamba_trainer.data.tokenizer import Tokenizer
from mamba_trainer.data.tokenizer_choice import TokenizerChoice, choose_tokenizer


@dataclass(frozen=True)
class Progress:
    """`done` and `total` are bytes of the source; `activity` is a few words for a person."""

    activity: str
    done: int
    total: int


ProgressCallback = Callable[[Progress], None]


def prepare(
    source: str | Path,
    out_dir: Path,
    *,
    tokenizer: str | Path = "byte",
    eot_token: str | None = None,
    validation_fraction: float = 0.01,
    workers: int | None = None,
    text_field: str = "text",
    include: Sequence[str] = ("*",),
    progress: ProgressCallback = lambda _: None,
) -> Meta:
    """Write `source` to `out_dir` as tokens, unless that is what `out_dir` holds already.

    `tokenizer` is `byte`, `bpe:N` (a byte-level BPE of N tokens, trained on the source), or the path of a
    tokenizer.json or a folder with one. `include` are patterns for files in a folder.
    """
    if not 0 <= validation_fraction < 1:
        raise UserError(f"the validation fraction must be at least 0 and below 1, not {validation_fraction}")
    if workers is not None and workers < 1:
        raise UserError(f"at least one worker is needed, not {workers}")
    if out_dir.resolve() == Path(source).resolve():
        raise UserError(f"{out_dir} is the source itself: name another directory for the tokens")
    choice = choose_tokenizer(str(tokenizer), eot_token)
    opened = open_source(source, text_field=text_field, include=include)
    parameters = Parameters(
        source=opened.name,
        source_sha256=opened.sha256,
        tokenizer=choice.identity,
        validation_fraction=validation_fraction,
        text_field=text_field,
        include=tuple(include),
    )
    if (existing := prepared_before(out_dir, parameters)) is not None:
        return existing
    refuse_foreign_files(out_dir)
    with locked(out_dir, on_wait=lambda: progress(Progress("waiting for another process", 0, opened.size))):
        # Whoever held the lock before may have written just this dataset.
        if (existing := prepared_before(out_dir, parameters)) is not None:
            return existing
        return _write(opened, out_dir, choice, parameters, workers or available_cpus(), progress)


def _write(
    source: Source,
    out_dir: Path,
    choice: TokenizerChoice,
    parameters: Parameters,
    workers: int,
    progress: ProgressCallback,
) -> Meta:
    tokenizer = choice.build(
        source,
        parameters.validation_fraction,
        lambda done, total: progress(Progress("training the tokenizer", source.size * done // total, source.size)),
    )
    dtype = token_dtype(tokenizer.vocab_size)
    require_space(out_dir, _least_bytes(source, tokenizer, dtype))
    splits: tuple[Split, ...] = ("train", "validation") if parameters.validation_fraction else ("train",)
    encoder = Encoder(tokenizer, dtype, parameters.validation_fraction)
    with full_disk_explained(out_dir), DatasetWriter(out_dir, splits, dtype, tokenizer) as writer:
        encoded = ordered_map(encoder, source.units, min(workers, len(source.units)))
        with contextlib.closing(encoded):
            skipped = _append_all(encoded, writer, source.size, progress)
        written = writer.finish()
        _refuse_empty_splits(written, parameters, skipped)
        meta = Meta(
            dtype=dtype,
            tokenizer=tokenizer.record(),
            parameters=parameters,
            splits=written,
            skipped_documents=skipped,
        )
        writer.commit(meta)
    return meta


def _append_all(encoded: Iterator[EncodedUnit], writer: DatasetWriter, total: int, progress: ProgressCallback) -> int:
    """Append every unit in order; returns how many documents were no text."""
    done = skipped = 0
    for unit in encoded:
        for split, split_writer in writer.splits.items():
            documents = unit.splits[split]
            split_writer.append(documents.tokens, documents.lengths, documents.source_bytes)
        done += unit.size
        skipped += unit.skipped
        progress(Progress("preparing tokens", done, total))
    return skipped


def _refuse_empty_splits(written: dict[Split, SplitMeta], parameters: Parameters, skipped: int) -> None:
    documents = sum(split.documents for split in written.values())
    if not documents:
        raise UserError(f"{parameters.source} holds no UTF-8 text (documents skipped: {skipped})")
    for name, split in written.items():
        if not split.documents:
            raise UserError(
                f"none of the {documents} documents of {parameters.source} fell into the {name} split with a "
                f"validation fraction of {parameters.validation_fraction}: {_better_fraction(documents)}"
            )


def _better_fraction(documents: int) -> str:
    if documents == 1:
        return "hold none out with --validation-fraction 0"
    # Five documents are expected to fall into the split, so that none is rare.
    return f"choose --validation-fraction {min(0.5, 5 / documents):.2g}, or 0 for none"


def _least_bytes(source: Source, tokenizer: Tokenizer, dtype: str) -> int:
    """What the tokens will take at the very least: a sub-word is seldom longer than four bytes on average."""
    bytes_per_token = 1 if tokenizer.record().kind == "byte" else 4
    return source.size // bytes_per_token * (2 if dtype == "uint16" else 4)
