"""What a person sees, and one JSON object per logged step for machines."""

from __future__ import annotations

import datetime
import json
import math
from collections import deque
from pathlib import Path
from typing import IO, Any

import torch

from mamba_trainer.contract import Phase
from mamba_trainer.loop import Callback, StepResult, Trainer
from mamba_trainer.report import RankReporter

#: Steps whose pace is averaged: long enough to be calm, short enough to show a change within a minute.
_WINDOW = 20


class Progress(Callback):
    """Prints on rank 0, and reports from every rank to the launcher's board."""

    def __init__(self, rank: int, reporter: RankReporter, flops_per_token: int, peak_flops: float | None) -> None:
        self._rank, self._reporter = rank, reporter
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._recent: deque[StepResult] = deque(maxlen=_WINDOW)
        self._jsonl: IO[str] | None = None

    def on_train_start(self, trainer: Trainer) -> None:
        path = trainer.config.reporting.jsonl
        if self._rank == 0 and path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._jsonl = Path(path).open("a", encoding="utf-8")  # noqa: SIM115 closed in close()
        self._reporter.update(
            phase=Phase.TRAINING,
            step=trainer.step,
            max_steps=trainer.config.training.max_steps,
            resumed_from_step=trainer.resumed_from or 0,
        )

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        self._recent.append(result)
        pace = sum(r.tokens for r in self._recent) / sum(r.seconds for r in self._recent)
        mfu = pace * self._flops_per_token / self._peak_flops if self._peak_flops else None
        memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        self._reporter.update(
            step=result.step,
            loss=result.loss,
            learning_rate=result.learning_rate,
            gradient_norm=result.gradient_norm,
            tokens_total=trainer.samples * trainer.config.training.sequence_length,
            tokens_per_second=pace,
            mfu=mfu,
            peak_memory_bytes=memory,
        )
        interval = trainer.config.reporting.log_interval
        if self._rank != 0 or (result.step % interval and not trainer.finished and result.step != 1):
            return
        left = (trainer.config.training.max_steps - result.step) * result.tokens / pace
        print(_line(trainer, result, pace, mfu, memory, left), flush=True)
        if self._jsonl is not None:
            row: dict[str, Any] = {
                "step": result.step, "loss": _finite(result.loss), "learning_rate": result.learning_rate,
                "gradient_norm": _finite(result.gradient_norm), "applied": result.applied, "samples": trainer.samples,
                "tokens_per_second": pace, "step_seconds": result.seconds, "mfu": mfu, "peak_memory_bytes": memory,
            }  # fmt: skip
            self._jsonl.write(json.dumps(row) + "\n")
            self._jsonl.flush()

    def close(self) -> None:
        if self._jsonl is not None:
            self._jsonl.close()


def _finite(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def _line(trainer: Trainer, result: StepResult, pace: float, mfu: float | None, memory: int, left: float) -> str:
    last = trainer.config.training.max_steps
    parts = [
        f"step {result.step:>{len(str(last))}}/{last}",
        f"loss {result.loss:.4f}",
        f"lr {result.learning_rate:.2e}",
        f"grad {result.gradient_norm:.2f}" if result.applied else "SKIPPED (gradients not finite)",
        f"{pace:,.0f} tok/s",
    ]
    if mfu is not None:
        parts.append(f"mfu {mfu:.1%}")
    if memory:
        parts.append(f"mem {memory / 1e9:.1f} GB")
    parts.append(f"eta {datetime.timedelta(seconds=round(left))}")
    return "  ".join(parts)
