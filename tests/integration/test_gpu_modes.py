"""On a CUDA device: the fused kernels and every ZeRO stage in 16 bit against fp32 arithmetic on the CPU.

Skipped where there is no GPU. Kept apart because a forked rank must be the first to touch CUDA.
"""

from __future__ import annotations

import os

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import pytest
import torch

from mamba_trainer import engine as engines
from mamba_trainer.config import merge, parse_config
from mamba_trainer.plan import Hardware, plan_training
from mamba_trainer.scan import choose, selftest
from ranks import run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

RAW = {
    "model": {"d_model": 64, "n_layer": 3, "vocab_size": 500},
    "training": {"sequence_length": 128, "global_batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-3},
    "parallelism": {"num_gpus": 1},
}


def _train(rank: int, stage: int, precision: str, offload: str, master: str) -> list[tuple[float, float]]:
    raw = merge(RAW, {"parallelism": {"zero_stage": stage, "precision": precision, "offload_optimizer": offload,
                                      "offload_parameters": "none", "master_dtype": master}})  # fmt: skip
    device = engines.local_device() if precision != "fp32" else torch.device("cpu")
    config = parse_config(raw)
    engines.initialize_distributed(engines.local_device())
    plan = plan_training(config, Hardware(gpus=1, gpu_bytes=10**11))
    engine = engines.create(config, plan, device)
    generator = torch.Generator().manual_seed(7)
    results = []
    for _ in range(12 if precision == "fp16" else 4):
        losses = []
        for _ in range(2):
            window = torch.randint(500, (2, 129), generator=generator).to(device)
            losses.append(float(engine.micro_step(window[:, :-1], window[:, 1:])))
            applied = engine.step(1e-3)
        if applied:
            results.append((sum(losses) / 2, engine.gradient_norm()))
    return results


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_trains_alike_in_16_bit(stage: int, precision: str) -> None:
    ((first, norm), *rest) = run_ranks(_train, 1, stage, precision, "none", "fp32")[0]
    assert first == pytest.approx(6.22, abs=0.15)  # ln 500, and the spread of the initial weights
    assert 0.05 < norm < 50
    assert len(rest) >= 3


@pytest.mark.parametrize(("stage", "offload", "master"), [(2, "cpu", "fp32"), (3, "cpu", "fp32"), (3, "none", "bf16")])
def test_offload_and_16_bit_masters_train(stage: int, offload: str, master: str) -> None:
    reference = run_ranks(_train, 1, 2, "bf16", "none", "fp32")[0]
    ours = run_ranks(_train, 1, stage, "bf16", offload, master)[0]
    for (loss, norm), (expected_loss, expected_norm) in zip(ours, reference, strict=True):
        assert loss == pytest.approx(expected_loss, abs=1e-2)
        assert norm == pytest.approx(expected_norm, rel=0.05)


def _check_kernel(rank: int, precision: str) -> str:
    device = engines.local_device()
    backend = choose("mamba_ssm", parse_config(RAW).model, device)
    selftest.check(
        backend, device, {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision], 16, 4
    )
    return backend.name


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_official_kernels_pass_the_self_test(precision: str) -> None:
    pytest.importorskip("mamba_ssm")
    assert run_ranks(_check_kernel, 1, precision) == ["mamba_ssm"]
