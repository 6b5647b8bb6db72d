"""When to save: every `interval` steps, on a stop, and at the end. How is `checkpoint.manager`'s business."""

from __future__ import annotations

import sys

from mamba_trainer.checkpoint.manager import CheckpointManager, SaveFailed
from mamba_trainer.contract import Phase
from mamba_trainer.loop import Callback, StepResult, Trainer
from mamba_trainer.plan import gigabytes
from mamba_trainer.report import RankReporter


class SaveCheckpoints(Callback):
    def __init__(self, manager: CheckpointManager, reporter: RankReporter, rank: int) -> None:
        self._manager, self._reporter, self._rank = manager, reporter, rank

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        interval = trainer.config.checkpoint.interval
        if not interval or result.step % interval or trainer.finished:
            return
        try:
            self._save(trainer)
        except SaveFailed as error:  # a full disk must not end a run that can go on: the next save tries again
            self._reporter.update(phase=Phase.TRAINING)
            if self._rank == 0:
                print(f"checkpoint NOT saved, training goes on: {error}", file=sys.stderr, flush=True)

    def on_stop(self, trainer: Trainer) -> None:
        self._save(trainer)

    def on_train_end(self, trainer: Trainer) -> None:
        if trainer.config.checkpoint.save_final and trainer.resumed_from != trainer.step:
            self._save(trainer, final=True)

    def _save(self, trainer: Trainer, final: bool = False) -> None:
        self._reporter.update(phase=Phase.SAVING)
        saved = self._manager.save(trainer.step, trainer.samples, {}, final=final)
        self._reporter.update(
            phase=Phase.TRAINING, last_checkpoint_step=saved.step, checkpoint_save_seconds=saved.seconds
        )
        if self._rank == 0 and saved.bytes:
            print(f"saved {saved.path.name}: {gigabytes(saved.bytes)} in {saved.seconds:,.1f} s", flush=True)
