"""The smallest model that makes DeepSpeed use all it has: two linear layers that share a weight, and dropout.

Dropout makes a wrong random state show up as a wrong loss.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mamba_trainer.checkpoint.manager import CheckpointManager
from mamba_trainer.engine import initialize_distributed

WIDTH = 24
MICRO_BATCH = 2


class TiedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.dropout(torch.tanh(self.first(x)))).square().mean()


class Run:
    """One rank of a run: the engine, its manager, and steps whose data depend on the position alone."""

    def __init__(self, directory: Path, *, stage: int = 2, dtype: str = "fp32", **settings: Any) -> None:
        self.group = initialize_distributed(torch.device("cpu"))
        self.rank = dist.get_rank()
        torch.manual_seed(0)
        model = TiedModel()
        torch.manual_seed(1000 + self.rank)
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": MICRO_BATCH,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        }
        if dtype == "bf16":
            config["bf16"] = {"enabled": True}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )
        self.dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
        self.step = 0
        self.messages: list[str] = []
        self.manager = CheckpointManager(
            directory,
            self.engine,
            control_group=self.group,
            attempt=settings.pop("attempt", 0),
            keep=settings.pop("keep", 3),
            config_hash=settings.pop("config_hash", "c0ffee"),
            log=self.messages.append,
            **settings,
        )

    @property
    def position(self) -> int:
        return self.step * MICRO_BATCH * dist.get_world_size()

    def train(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            generator = torch.Generator().manual_seed(self.position * 64 + self.rank)
            loss = self.engine(torch.randn(MICRO_BATCH, WIDTH, generator=generator).to(self.dtype))
            self.engine.backward(loss)
            self.engine.step()
            self.step += 1
            losses.append(loss.item())
        return losses

    def save(self, final: bool = False) -> Any:
        return self.manager.save(self.step, self.position, {"step": self.step}, final=final)

    def resume(self, requested: Any = "auto") -> Any:
        state = self.manager.resume(requested)
        if state is not None:
            self.step = state.step
        return state

    def digest(self) -> str:
        """Fingerprint of all that decides how this rank's training goes on."""
        sha256 = hashlib.sha256(repr((self.step, self.engine.global_steps)).encode())
        sha256.update(torch.get_rng_state().numpy().tobytes())
        for tensor in _tensors(self.engine.optimizer.state_dict()):
            sha256.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        for parameter in self.engine.module.parameters():
            held = getattr(parameter, "ds_tensor", parameter)
            sha256.update(held.detach().float().cpu().contiguous().numpy().tobytes())
        return sha256.hexdigest()


def _tensors(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    if isinstance(state, dict):
        return [tensor for key in state for tensor in _tensors(state[key])]
    if isinstance(state, list | tuple):
        return [tensor for item in state for tensor in _tensors(item)]
    return []
