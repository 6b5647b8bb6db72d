"""Loss and bits per byte on the held-out split: a part of it every `eval_interval` steps, all of it at the end."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from mamba_trainer.contract import Phase
from mamba_trainer.data.dataset import TokenDataset, bits_per_byte
from mamba_trainer.loop import Callback, StepResult, Trainer
from mamba_trainer.loss import IGNORE
from mamba_trainer.report import RankReporter


@dataclass(frozen=True)
class Evaluation:
    loss: float  # nats per token
    bits_per_byte: float | None  # None where the data do not say how many bytes they were made from
    targets: int


class Evaluate(Callback):
    def __init__(self, validation: TokenDataset, reporter: RankReporter) -> None:
        self._validation, self._reporter = validation, reporter
        self.latest: tuple[int, Evaluation] | None = None

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        interval = trainer.config.training.eval_interval
        if (interval and result.step % interval == 0) or trainer.finished:
            limit = None if trainer.finished else trainer.config.training.eval_sequences
            self.latest = result.step, self._evaluate(trainer, limit)

    @torch.no_grad()
    def _evaluate(self, trainer: Trainer, limit: int | None) -> Evaluation:
        self._reporter.update(phase=Phase.EVALUATING)
        rank, world = dist.get_rank(), dist.get_world_size()
        micro = trainer.plan.micro_batch_size
        rounds = None if limit is None else max(1, limit // (micro * world))
        sums = torch.zeros(2, device=trainer.engine.device, dtype=torch.float64)  # nats, targets
        trainer.engine.deepspeed.eval()
        for batch in itertools.islice(self._validation.evaluation_batches(micro, rank, world), rounds):
            tokens, _ = trainer.to_device(batch.tokens)
            targets = torch.from_numpy(np.where(batch.mask, batch.tokens[:, 1:], IGNORE)).to(trainer.engine.device)
            count = int(batch.valid.sum())
            loss = trainer.engine.deepspeed(tokens, targets)
            sums += torch.stack((loss.double() * count, torch.full_like(loss, count).double()))
        dist.all_reduce(sums)
        nats, targets_read = sums.tolist()
        evaluation = Evaluation(nats / targets_read, self._bits_per_byte(nats, int(targets_read)), int(targets_read))
        self._reporter.update(
            phase=Phase.TRAINING, eval_loss=evaluation.loss, eval_bits_per_byte=evaluation.bits_per_byte
        )
        if rank == 0:
            bits = "" if evaluation.bits_per_byte is None else f"  {evaluation.bits_per_byte:.4f} bits per byte"
            print(f"held-out  loss {evaluation.loss:.4f}{bits}  ({evaluation.targets:,} tokens)", flush=True)
        return evaluation

    def _bits_per_byte(self, nats: float, targets: int) -> float | None:
        """Exact over the whole split; over a part, the split's mean bytes per token stand for the part's."""
        meta = self._validation.meta
        if meta is None or not math.isfinite(nats):
            return None
        split_bytes = meta.splits["validation"].source_bytes
        return bits_per_byte(nats, round(split_bytes * targets / self._validation.targets))
