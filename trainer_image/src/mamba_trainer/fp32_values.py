"""Gives `A_log`, `D` and the dt bias fp32 fidelity under 16-bit modes (ADR 0001).

DeepSpeed casts every parameter to 16 bit, where A_log near ln 16 has a resolution of 1/64 and small updates do not
reach the forward at all. Its optimizers do keep fp32 masters, partitioned over the ranks. After each step the
masters of these few parameters (0.12 % of a 7B) are gathered into one replicated fp32 buffer, in one collective;
the forward reads that buffer, and the gradient goes to the 16-bit parameter. Optimizer, clipping, loss scaling and
checkpoints stay DeepSpeed's, and `zero_to_fp32` exports exactly what the forward used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mamba_trainer.model import FP32_PARAMETERS, MambaLM


def widen_masters(engine: Any, groups: int) -> None:
    """Makes the masters and moments of the first `groups` parameter groups fp32 where they are 16 bit.

    With 16-bit masters DeepSpeed makes all of them 16 bit; these are the ones whose updates would be lost.
    """
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        masters = [
            master
            for index, master in enumerate(optimizer.fp32_partitioned_groups_flat)
            if optimizer.sub_group_to_group_id[index] < groups
        ]
    else:
        masters = optimizer.single_partition_of_fp32_groups[:groups]
    for master in masters:
        gradient, master.grad = master.grad, None
        master.data = master.data.float()
        if gradient is not None:
            master.grad = gradient.float()
        state = optimizer.optimizer.state.get(master, {})
        state.update({key: value.float() for key, value in state.items() if key.startswith("exp_avg")})
    if engine.zero_optimization_stage() != 3:
        optimizer._link_all_hp_params()  # its views are of the old storage


class _Entry(NamedTuple):
    parameter: Any  # an nn.Parameter, with what DeepSpeed has hung on it
    values: Tensor  # this parameter's flat slice of the buffer


class Fp32Values:
    """The replicated buffer, and its way from and to the optimizer's masters."""

    def __init__(self, model: MambaLM, engine: Any, device: torch.device) -> None:
        self._engine = engine
        self._entries: list[_Entry] = []
        total = sum(value.numel() for mixer in model.mixers() for value in mixer.fp32_values.values())
        self._buffer = torch.empty(total, device=device, dtype=torch.float32)
        offset = 0
        for mixer in model.mixers():
            for name in FP32_PARAMETERS:
                if (initial := mixer.fp32_values.get(name)) is None:
                    continue
                flat = self._buffer[offset : offset + initial.numel()]
                flat.copy_(initial.flatten())
                mixer.fp32_values[name] = flat.view(initial.shape)
                self._entries.append(_Entry(mixer.get_parameter(name), flat))
                offset += initial.numel()

    @torch.no_grad()
    def write_masters(self) -> None:
        """Sets this rank's masters to the buffer: DeepSpeed made them from the 16-bit rounding."""
        for values, master in self._local():
            master.copy_(values)

    @torch.no_grad()
    def refresh(self) -> None:
        """Sets the buffer to the masters of all ranks. Collective; call after a step and after a load."""
        if not self._entries:
            return
        self._buffer.zero_()
        for values, master in self._local():
            values.copy_(master)
        if self._engine.zero_optimization_stage() > 0 and dist.get_world_size() > 1:
            dist.all_reduce(self._buffer)

    def _local(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The masters that this rank owns: pairs of a slice of the buffer and the fp32 view it stands for."""
        if not self._entries:
            return
        optimizer = self._engine.optimizer
        stage = self._engine.zero_optimization_stage()
        if stage == 0:
            narrow = [p for group in optimizer.fp16_groups for p in group]
            exact = [m for group in optimizer.fp32_groups for m in group]
            whole = {id(p): m for p, m in zip(narrow, exact, strict=True)}
        for parameter, values in self._entries:
            if stage == 3:
                master, _ = optimizer._get_fp32_opt_state_partition(parameter, release_swap_buffers=False)
                start = dist.get_rank() * parameter.ds_tensor.ds_numel
                master = master[: max(0, parameter.ds_numel - start)]  # the last partition is padded
            elif stage == 0:
                master, start = whole[id(parameter)].flatten(), 0
            elif (mapping := parameter._hp_mapping) is not None:
                master, start = mapping.get_hp_fragment(), mapping.lp_fragment_address.start
            else:
                continue
            if master.numel():
                yield values[start : start + master.numel()], master
