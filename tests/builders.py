"""Small models, configurations and plans for tests; what a test does not care about is defaulted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mamba_trainer.build import build_model, seeded
from mamba_trainer.config import Device, ModelConfig, Precision, TrainerConfig, merge, parse_config
from mamba_trainer.model import MambaLM
from mamba_trainer.plan import TrainingPlan
from mamba_trainer.plan.schema import Sizes
from mamba_trainer.scan.torch_scan import TorchScan

CPU = torch.device("cpu")

#: Every option of the model away from its default at least once, and sizes that divide by nothing.
SHAPES: dict[str, dict[str, Any]] = {
    "usual": {},
    "odd d_model": {"d_model": 19, "n_layer": 2},
    "expand 1, d_state 8": {"expand": 1, "d_state": 8},
    "d_state 64, d_conv 2": {"d_state": 64, "d_conv": 2},
    "d_conv 3, expand 3": {"d_conv": 3, "expand": 3},
    "untied head": {"tie_embeddings": False},
    "dt_rank 5, one tap": {"dt_rank": 5, "d_conv": 1},
    "16-bit residual, other epsilon": {"residual_in_fp32": False, "norm_epsilon": 1e-3},
    "vocabulary padded to 64": {"vocab_size": 65, "pad_vocab_size_multiple": 64},
}


def make_model_config(**options: Any) -> ModelConfig:
    return ModelConfig.model_validate({"d_model": 16, "n_layer": 3, "vocab_size": 50, "d_state": 4} | options)


def make_model(config: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> MambaLM:
    """With its initial weights."""
    return build_model(config, seeded(config, seed, CPU), TorchScan(), CPU, dtype)


def make_random_model(config: ModelConfig, seed: int = 0) -> MambaLM:
    """Every single weight random: initial weights hide exchanged norms, D or A_log, which start out alike."""
    model = make_model(config, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def make_tokens(config: ModelConfig, batch: int = 2, length: int = 23, seed: int = 0) -> torch.Tensor:
    return torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def make_config(over: Mapping[str, Any] | None = None) -> TrainerConfig:
    """A run on two ranks, two sequences at a time, two micro-batches a step."""
    base = {
        "model": {"d_model": 16, "n_layer": 3, "vocab_size": 50, "d_state": 4},
        "training": {
            "sequence_length": 12, "global_batch_size": 8, "micro_batch_size": 2, "learning_rate": 1e-2,
            "max_steps": 100, "warmup_steps": 0, "gradient_clipping": 1.0,
        },
        "parallelism": {"num_gpus": 2},
    }  # fmt: skip
    return parse_config(merge(base, over or {}))


def make_plan(
    zero_stage: int,
    precision: str = "fp32",
    *,
    offload_optimizer: bool = False,
    offload_parameters: bool = False,
    recompute_every: int = 0,
    world_size: int = 2,
    micro_batch_size: int = 2,
    accumulation_steps: int = 2,
    elements: int = 2_000,
) -> TrainingPlan:
    """A plan whose buffers are small (`elements`), so that even a tiny model needs several of each."""
    sizes = Sizes(
        reduce_bucket_elements=elements, allgather_bucket_elements=elements, prefetch_elements=elements // 2,
        sub_group_elements=elements, persistence_threshold=10, max_live_parameters=2 * elements,
        param_group_elements=elements,
    )  # fmt: skip
    return TrainingPlan(
        device="cpu", parameters=0, world_size=world_size, ranks_per_node=world_size,
        micro_batch_size=micro_batch_size, accumulation_steps=accumulation_steps, tokens_per_step=0,
        zero_stage=zero_stage, precision=Precision(precision), recompute_every=recompute_every,
        offload_optimizer=Device.CPU if offload_optimizer else Device.NONE,
        offload_parameters=Device.CPU if offload_parameters else Device.NONE,
        scan_backend="torch", sizes=sizes, gpu_budget=None, gpu_memory={}, peak_phase="", host_budget=None,
        host_memory={}, checkpoint_bytes=0, disk_bytes=0, reasons=(),
    )  # fmt: skip
