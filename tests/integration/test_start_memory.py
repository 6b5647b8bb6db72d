"""Host memory of a rank while its model is built: its own part and one block, never the whole model.

Measured in real ranks as the growth of the resident set's high-water mark, beside a control that builds the
usual way and must show the difference.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import torch
from deepspeed import zero

from builders import CPU, make_config, make_plan
from mamba_trainer import deepspeed_config, engine
from mamba_trainer.build import build_model, seeded
from mamba_trainer.config import ModelConfig, TrainerConfig
from mamba_trainer.model import MambaLM
from mamba_trainer.scan.torch_scan import TorchScan
from ranks import run_ranks

RANKS = 4
M_MMAP_THRESHOLD = -3  # malloc.h
#: 100 blocks of 1.7 MB and a vocabulary that weighs nothing: 168 MB of fp32.
CONFIG: TrainerConfig = make_config(
    {"model": {"d_model": 256, "n_layer": 100, "vocab_size": 64}, "parallelism": {"num_gpus": RANKS}}
)
MODEL = CONFIG.model
#: Built first: a forked rank must page in the libraries' code, which is no part of what is measured.
WARM_UP = MODEL.model_copy(update={"n_layer": 1})
BLOCK_BYTES = 4 * sum(torch.Size(shape).numel() for shape in MODEL.block_shapes().values())
WHOLE_BYTES = 4 * MODEL.parameter_count()
#: Measured: 10 MB under ZeRO-3 (gloo's buffers, DeepSpeed's bookkeeping), 5 MB without.
SLACK_BYTES = 16 * 10**6


def peak_growth(build: Callable[[ModelConfig], MambaLM]) -> int:
    """Bytes by which the peak of the resident set passes what it was before."""
    # Tensors of a 7B are above malloc's limit and go back to the system when freed; so must these small ones.
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 64 * 1024)
    build(WARM_UP)
    libc.malloc_trim(0)  # what earlier tests freed would be used again and not be seen as growth
    before = resident("VmRSS")
    model = build(MODEL)
    grown = resident("VmHWM") - before
    del model
    return grown


def resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def whole(model: ModelConfig, dtype: torch.dtype) -> MambaLM:
    return build_model(model, seeded(model, 0, CPU), TorchScan(), CPU, dtype)


def zero3_rank(rank: int, whole_first: bool) -> int:
    engine.initialize_distributed(CPU)
    ds_config = deepspeed_config.build(CONFIG, make_plan(3, world_size=RANKS, elements=100_000))

    def by_block(model: ModelConfig) -> MambaLM:
        return build_model(model, seeded(model, 0, CPU), TorchScan(), CPU, torch.float32, zero3=ds_config)

    def whole_then_partitioned(model: ModelConfig) -> MambaLM:
        built = whole(model, torch.float32)
        zero.Init(module=built, config_dict_or_path=ds_config, mem_efficient_linear=False)
        return built

    return peak_growth(whole_then_partitioned if whole_first else by_block)


def sixteen_bit_rank(rank: int, in_fp32_first: bool) -> int:
    if in_fp32_first:
        return peak_growth(lambda model: whole(model, torch.float32).to(torch.bfloat16))
    return peak_growth(lambda model: whole(model, torch.bfloat16))


def test_a_zero_3_rank_holds_its_partition_and_one_block() -> None:
    allowed = WHOLE_BYTES / RANKS + 2 * BLOCK_BYTES + SLACK_BYTES
    grown = run_ranks(zero3_rank, RANKS, False)
    assert max(grown) <= allowed
    assert min(grown) >= 0.9 * WHOLE_BYTES / RANKS, "a measurement that misses the partition itself is none"
    usual = run_ranks(zero3_rank, RANKS, True)
    assert min(usual) >= WHOLE_BYTES > 2 * allowed, "the control shows that a whole model would be seen"


def test_a_sixteen_bit_rank_never_holds_its_weights_in_fp32() -> None:
    allowed = WHOLE_BYTES / 2 + 2 * BLOCK_BYTES + SLACK_BYTES
    (grown,) = run_ranks(sixteen_bit_rank, 1, False)
    assert 0.9 * WHOLE_BYTES / 2 <= grown <= allowed
    (usual,) = run_ranks(sixteen_bit_rank, 1, True)
    assert usual >= WHOLE_BYTES > 1.5 * allowed, "the control shows that whole fp32 weights would be seen"
