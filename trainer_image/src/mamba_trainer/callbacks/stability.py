"""Counts steps skipped for non-finite gradients, and ends the run when they do not stop.

A skipped step changes no weight, so a single one is harmless (fp16 has them by design while its loss scale
settles). A row of them means that training is over and the GPUs only burn money.
"""

from __future__ import annotations

import math

from mamba_trainer.contract import NumericalInstability
from mamba_trainer.loop import Callback, StepResult, Trainer
from mamba_trainer.report import RankReporter


class Stability(Callback):
    def __init__(self, reporter: RankReporter) -> None:
        self._reporter = reporter
        self.skipped = 0
        self._in_a_row = 0

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        if result.applied and math.isfinite(result.loss):
            self._in_a_row = 0
            return
        self.skipped += 1
        self._in_a_row += 1
        self._reporter.update(skipped_steps=self.skipped)
        limit = trainer.config.training.max_nonfinite_steps
        if self._in_a_row >= limit:
            raise NumericalInstability(
                f"The loss or the gradients were not finite in {limit} steps in a row, up to step {result.step} "
                f"(loss {result.loss}, learning rate {result.learning_rate:.2e}). Lower training.learning_rate or "
                "lengthen warmup_steps; in fp16, try precision bf16. The latest checkpoint is from before."
            )
