"""When to save: every `interval` steps, on a stop, and at the end. How is `checkpoint.manager`'s business."""

from __future__ import annotations

import sys

from mamba_trainer.checkpoint.manager import CheckpointManager
from mamba_trainer.contract import Phase
from mamba_trainer.loop import Callback, StepResult, Trainer
from mamba_trainer.report import RankReporter


class SaveCheckpoints(Callback):
    def __init__(self, manager: CheckpointManager, reporter: RankReporter, rank: int) -> None:
        self._manager, self._reporter, self._rank = manager, reporter, rank
        self._saved_step: int | None = None

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        interval = trainer.config.checkpoint.interval
        if interval and result.step % interval == 0 and not trainer.finished:
            self._save(trainer)

    def on_stop(self, trainer: Trainer) -> None:
        if self._saved_step != trainer.step:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer) -> None:
        if trainer.config.checkpoint.save_final and trainer.resumed_from != trainer.step:
            self._save(trainer, final=True)

    def _save(self, trainer: Trainer, final: bool = False) -> None:
        self._reporter.update(phase=Phase.SAVING)
        saved = self._manager.save(trainer.step, trainer.samples, {}, final=final)
        self._saved_step = trainer.step
        self._reporter.update(
            phase=Phase.TRAINING, last_checkpoint_step=saved.step, checkpoint_save_seconds=saved.seconds
        )
        if self._rank == 0:
            name = "final" if final else f"step_{saved.step}"
            print(
                f"saved {name}: {saved.bytes / 1e9:,.2f} GB in {saved.seconds:,.1f} s, verified by size and SHA-256",
                file=sys.stdout,
                flush=True,
            )
