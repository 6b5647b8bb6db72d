"""Loss, pace and evaluation for TensorBoard, W&B, CSV or Comet, through DeepSpeed's own `monitor` sections.

DeepSpeed itself writes only the learning rate and, in fp16, the loss scale.
"""

from __future__ import annotations

import math

from mamba_trainer.callbacks.evaluate import Evaluate
from mamba_trainer.loop import Callback, StepResult, Trainer


class Monitor(Callback):
    """The x axis is samples, as DeepSpeed's is. Does nothing where no monitor is configured."""

    def __init__(self, evaluate: Evaluate | None) -> None:
        self._evaluate = evaluate

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        monitor = trainer.engine.deepspeed.monitor
        if not monitor.enabled or result.step % trainer.config.reporting.log_interval:
            return
        values = {
            "Train/Samples/train_loss": result.loss,
            "Train/Samples/gradient_norm": result.gradient_norm,
            "Train/Samples/tokens_per_second": result.tokens / result.seconds,
        }
        if self._evaluate is not None and self._evaluate.latest is not None:
            step, evaluation = self._evaluate.latest
            if step == result.step:
                values["Eval/Samples/loss"] = evaluation.loss
                if evaluation.bits_per_byte is not None:
                    values["Eval/Samples/bits_per_byte"] = evaluation.bits_per_byte
        monitor.write_events([(name, v, trainer.samples) for name, v in values.items() if math.isfinite(v)])
