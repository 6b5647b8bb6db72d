"""Builds the model where and how its ZeRO stage wants it, so that no process ever holds more than it must.

ZeRO 0-2 keep whole 16-bit weights: they are made on the device, tensor by tensor. ZeRO-3 makes one block at a
time and partitions it before the next exists; stock Mamba cannot be built under `deepspeed.zero.Init`, because its
own initialisation writes into parameters that are already partitioned.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mamba_trainer.config import ModelConfig
from mamba_trainer.init import initial_value
from mamba_trainer.model import FP32_PARAMETERS, Block, MambaLM, Mixer
from mamba_trainer.scan import ScanBackend

#: Name of a parameter -> its fp32 value.
Source = Callable[[str], Tensor]


def seeded(config: ModelConfig, seed: int, device: torch.device) -> Source:
    """Fresh weights, see `init.initial_value`."""
    return lambda name: initial_value(name, config, seed, device)


def from_safetensors(directory: Path, config: ModelConfig) -> Source:
    """Weights of a directory written by `mamba-train import`, read tensor by tensor.

    Raises:
        UserError: no weights there, or a tensor is missing or has another shape; names the first.
    """
    from mamba_trainer.convert.weights import open_folder  # which needs the engine, which needs this module

    weights = open_folder(directory).only(config.parameter_shapes())
    return lambda name: weights.read(name).float()


def build_model(
    config: ModelConfig,
    source: Source,
    scan: ScanBackend,
    device: torch.device,
    dtype: torch.dtype,
    zero3: dict[str, Any] | None = None,
) -> MambaLM:
    """A model with its weights from `source`, in `dtype` on `device`.

    Args:
        zero3: the DeepSpeed configuration when parameters are to be partitioned (ZeRO-3), else None.

    Under a 16-bit `dtype` each mixer's `fp32_values` hold the exact values of its FP32_PARAMETERS.
    """

    def make(module: nn.Module, prefix: str, name: str, parameter: nn.Parameter) -> nn.Parameter:
        value = source(f"{prefix}{name}").to(device)
        if dtype != torch.float32 and name.removeprefix("mixer.") in FP32_PARAMETERS:
            mixer = module.get_submodule("mixer")
            assert isinstance(mixer, Mixer)
            mixer.fp32_values[name.removeprefix("mixer.")] = value.clone()
        made = nn.Parameter(value.to(dtype))
        made.__dict__.update(parameter.__dict__)
        return made

    def place(module: nn.Module, prefix: str) -> None:
        placed: dict[nn.Parameter, nn.Parameter] = {}  # a tied parameter is met twice and made once
        for owner_name, owner in module.named_modules():
            for name, parameter in owner._parameters.items():
                if parameter is None or not parameter.is_meta:
                    continue
                if parameter not in placed:
                    placed[parameter] = make(module, prefix, ".".join(filter(None, (owner_name, name))), parameter)
                owner._parameters[name] = placed[parameter]
        if zero3 is not None:
            _partition(module, zero3)

    def make_block(index: int) -> Block:
        block = Block(config, scan)
        place(block, f"backbone.layers.{index}.")
        return block

    with torch.device("meta"):
        model = MambaLM(config, scan, make_block)
    place(model, "")
    return model


def _partition(module: nn.Module, ds_config: dict[str, Any]) -> None:
    from deepspeed import zero

    # mem_efficient_linear would replace torch.nn.functional.linear for the whole process.
    zero.Init(module=module, config_dict_or_path=ds_config, mem_efficient_linear=False)
