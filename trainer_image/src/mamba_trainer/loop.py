"""The training loop of one rank: batches in, optimizer steps out. All else is a callback.

The loop knows three ends: the last step, a stop that any rank saw (agreed by all within one step), and an error.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mamba_trainer.config import TrainerConfig
from mamba_trainer.contract import SavedAndStopped
from mamba_trainer.data.dataset import TokenDataset
from mamba_trainer.data.order import SampleOrder
from mamba_trainer.engine import Engine
from mamba_trainer.plan import TrainingPlan
from mamba_trainer.schedule import learning_rate
from mamba_trainer.stop import StopRequest


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same on every rank."""

    step: int  # steps completed, this one included
    loss: float  # mean over the global batch, nats per token
    learning_rate: float
    gradient_norm: float
    applied: bool  # False: skipped, because the gradients were not finite
    tokens: int
    seconds: float


class Callback:
    """One behaviour beside the loop. Every rank runs every callback, so that collectives in them match."""

    def on_train_start(self, trainer: Trainer) -> None:
        """After a checkpoint, if any, has been loaded."""

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """After each optimizer step."""

    def on_stop(self, trainer: Trainer) -> None:
        """All ranks have agreed to stop before the end."""

    def on_train_end(self, trainer: Trainer) -> None:
        """After the last step."""

    def close(self) -> None:
        """Always, whatever the end; must not raise."""


class Trainer:
    """Owns the position of a run: steps completed and samples consumed."""

    def __init__(
        self,
        config: TrainerConfig,
        plan: TrainingPlan,
        engine: Engine,
        train: TokenDataset,
        stop: StopRequest,
        callbacks: Sequence[Callback],
    ) -> None:
        self.config, self.plan, self.engine = config, plan, engine
        self.step = 0
        self.samples = 0
        self.resumed_from: int | None = None
        self._train, self._stop, self._callbacks = train, stop, callbacks
        self._order = SampleOrder(len(train), config.data.seed)
        self._rank, self._world = dist.get_rank(), dist.get_world_size()

    @property
    def finished(self) -> bool:
        return self.step >= self.config.training.max_steps

    def run(self) -> None:
        """Trains to the last step.

        Raises:
            SavedAndStopped: a stop was agreed on, and `on_stop` has run on every rank.
        """
        for callback in self._callbacks:
            callback.on_train_start(self)
        self._stop.training_begins()
        while not self.finished:
            result, stop = self._train_step()
            for callback in self._callbacks:
                callback.on_step_end(self, result)
            if stop and not self.finished:
                for callback in self._callbacks:
                    callback.on_stop(self)
                raise SavedAndStopped(f"stopped on request at step {self.step}, saved")
        for callback in self._callbacks:
            callback.on_train_end(self)

    def _train_step(self) -> tuple[StepResult, bool]:
        started = time.perf_counter()
        training = self.config.training
        rate = learning_rate(self.step, training)
        ids = self._order.batch_for(self.samples, training.global_batch_size, self._rank, self._world)
        micro = self.plan.micro_batch_size
        total = torch.zeros((), device=self.engine.device)
        applied = False
        self.engine.deepspeed.train()
        for first in range(0, len(ids), micro):
            tokens, targets = self.to_device(self._train.batch(ids[first : first + micro]))
            total += self.engine.micro_step(tokens, targets)
            applied = self.engine.step(rate)
        loss, stop = self._agree(total * micro / len(ids))
        self.step += 1
        self.samples += training.global_batch_size
        result = StepResult(
            step=self.step,
            loss=loss,
            learning_rate=rate,
            gradient_norm=self.engine.gradient_norm(),
            applied=applied,
            tokens=self.config.tokens_per_step,
            seconds=time.perf_counter() - started,
        )
        return result, stop

    def _agree(self, loss: Tensor) -> tuple[float, bool]:
        """One small collective a step: the mean loss, and whether any rank was asked to stop."""
        message = torch.stack((loss.float(), torch.full_like(loss, float(self._stop.requested)).float()))
        dist.all_reduce(message)
        summed, stops = message.tolist()
        return summed / self._world, stops > 0

    def to_device(self, windows: Any) -> tuple[Tensor, Tensor]:
        """Windows of length + 1 tokens -> inputs and targets, each (batch, length), on this rank's device."""
        batch = torch.from_numpy(windows)
        if self.engine.device.type == "cuda":
            batch = batch.pin_memory().to(self.engine.device, non_blocking=True)
        return batch[:, :-1], batch[:, 1:]
