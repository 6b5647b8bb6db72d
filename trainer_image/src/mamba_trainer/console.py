"""What the commands print: one console, and a progress bar for work that takes long."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from mamba_trainer.data import prepare as preparation
from mamba_trainer.data.tokenfile import Meta

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def prepare_with_progress(
    source: str | Path,
    out_dir: Path,
    *,
    tokenizer: str,
    eot_token: str | None = None,
    validation_fraction: float = 0.01,
    workers: int | None = None,
    text_field: str = "text",
    include: Sequence[str] = ("*",),
) -> Meta:
    """`data.prepare.prepare` with a bar; says in one line what came of it."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=out, transient=True) as bars:
        tasks: dict[str, int] = {}

        def show(progress: preparation.Progress) -> None:
            if progress.activity not in tasks:
                tasks[progress.activity] = bars.add_task(progress.activity, total=progress.total)
            bars.update(tasks[progress.activity], completed=progress.done)  # type: ignore[arg-type]

        meta = preparation.prepare(
            source, out_dir, tokenizer=tokenizer, eot_token=eot_token, validation_fraction=validation_fraction,
            workers=workers, text_field=text_field, include=include, progress=show,
        )  # fmt: skip
    out.print(
        f"data: {out_dir}  {meta.tokens:,} tokens of {meta.documents:,} documents, "
        f"tokenizer {meta.tokenizer.name} ({meta.tokenizer.vocab_size:,})"
        + (f"; {meta.skipped_documents:,} skipped: not UTF-8" if meta.skipped_documents else "")
    )
    return meta
