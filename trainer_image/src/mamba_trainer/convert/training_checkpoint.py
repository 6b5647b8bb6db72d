"""The fp32 weights of a training checkpoint (`step_N/`, `final/`), whatever its ZeRO stage.

What DeepSpeed's own `zero_to_fp32` would return, tensor by tensor, read by its functions - but one parameter
group at a time, where `zero_to_fp32` would hold the whole model. ZeRO-0, unknown to it, is read here.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from mamba_trainer.checkpoint.verify import BadCheckpoint, verify
from mamba_trainer.config import ModelConfig
from mamba_trainer.contract import UserError
from mamba_trainer.convert.weights import Weights
from mamba_trainer.engine import parameter_groups
from mamba_trainer.model import MambaLM

_MODEL_STATES, _OPTIMIZER_STATES = "*_model_states.pt", "*_optim_states.pt"


def is_training_checkpoint(folder: Path) -> bool:
    return any(folder.glob(_MODEL_STATES))


def open_training_checkpoint(folder: Path) -> tuple[ModelConfig, Weights]:
    """Shape and weights of a committed checkpoint. Names are ours; a tied head is not listed again.

    Raises:
        UserError: it is not what was committed, or does not record its model. Nothing was unpickled then.
    """
    model = _verified_model(folder)
    with _quiet_and_mapped():
        return model, _partitioned(folder) if any(folder.glob(_OPTIMIZER_STATES)) else _replicated(folder, model)


def _verified_model(folder: Path) -> ModelConfig:
    try:
        manifest = verify(folder)
    except BadCheckpoint as error:
        raise UserError(
            f"{folder} is not a committed checkpoint: {error}. Name one that `mamba-train verify` passes."
        ) from None
    listed = {entry.path for entry in manifest.files}
    for pattern in (_MODEL_STATES, _OPTIMIZER_STATES):
        for path in folder.glob(pattern):
            if path.name not in listed:
                raise UserError(f"{path} is not part of the committed checkpoint: remove it.")
    try:
        return ModelConfig.model_validate(manifest.extra["model"])
    except (KeyError, ValidationError):
        raise UserError(
            f"The manifest of {folder} does not record the model: another version of the trainer wrote it."
        ) from None


@contextlib.contextmanager
def _quiet_and_mapped() -> Iterator[None]:
    """DeepSpeed's functions print, draw bars, and read whole files of which they need a corner."""
    from torch.utils.serialization import config

    noise = io.StringIO()
    mapped = config.patch("load.mmap", True)  # type: ignore[attr-defined]
    with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise), mapped:
        yield


def _partitioned(folder: Path) -> Weights:
    from deepspeed.utils import zero_to_fp32 as ds

    model_states = ds.parse_model_states(ds.get_model_state_files(folder))
    stage, world_size, flat_groups, paddings = ds.parse_optim_states(ds.get_optim_files(folder), folder)
    param_shapes = model_states[0].param_shapes
    shapes = {name: tuple(shape) for group in param_shapes for name, shape in group.items()}
    if stage == 3:
        lazy: dict[str, Any] = {}
        with _quiet_and_mapped():
            ds._zero3_merge_trainable_params(lazy, world_size, flat_groups, model_states)
        return Weights(shapes, lambda name: lazy[name].contiguous().float(), folder)
    group_of = {name: index for index, group in enumerate(param_shapes) for name in group}

    @lru_cache(maxsize=2)
    def merged(index: int) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        one = replace(model_states[0], param_shapes=[param_shapes[index]])
        partitions = [[rank[index]] for rank in flat_groups]
        with _quiet_and_mapped():
            ds._zero2_merge_trainable_params(
                state, world_size, partitions, [one], None if paddings is None else [paddings[index]]
            )
        return state

    return Weights(shapes, lambda name: merged(group_of[name])[name].float(), folder)


def _replicated(folder: Path, model: ModelConfig) -> Weights:
    """ZeRO-0: whole weights, and beside 16-bit ones the fp32 masters in the optimizer's order."""
    state = torch.load(folder / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
    tensors: dict[str, Tensor] = {name: state["module"][name] for name in model.parameter_shapes()}
    masters = (state.get("optimizer") or {}).get("fp32_groups")
    if masters is not None:
        with torch.device("meta"):
            named = dict(MambaLM(model).named_parameters())
        name_of = {parameter: name for name, parameter in named.items()}
        # The groups stand one behind another in an order that does not depend on where they were cut.
        ordered = [p for group in parameter_groups(named.items(), 0.0, elements=2**62) for p in group["params"]]
        exact = [master for group in masters for master in group]
        tensors |= {name_of[parameter]: master for parameter, master in zip(ordered, exact, strict=True)}
    return Weights(
        {name: tuple(t.shape) for name, t in tensors.items()},
        lambda name: tensors[name].detach().float(),
        folder,
    )
