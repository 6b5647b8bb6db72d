"""The DeepSpeed engine of one rank: model, optimizer and ZeRO mode, ready to train.

Everything that DeepSpeed does differently from plain PyTorch without being asked is set straight here, so that a
step in any ZeRO stage is the step that torch's AdamW would have made.
"""

from __future__ import annotations

import datetime
import importlib
import logging
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mamba_trainer import deepspeed_config, scan
from mamba_trainer.build import build_model, from_safetensors, seeded
from mamba_trainer.config import Device, Precision, TrainerConfig
from mamba_trainer.fp32_values import Fp32Values, widen_masters
from mamba_trainer.model import FP32_PARAMETERS, MambaLM
from mamba_trainer.scan import selftest

if TYPE_CHECKING:
    from mamba_trainer.plan import TrainingPlan

_DTYPES = {Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16, Precision.FP32: torch.float32}

#: A collective that waits longer means a lost peer. Above the longest wait of a healthy run: one rank's save.
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)


@dataclass
class Engine:
    """What the loop trains with."""

    deepspeed: Any
    model: MambaLM
    fp32_values: Fp32Values
    device: torch.device
    scan_backend: str
    _plain_norm: float = float("nan")
    _loss_scale: float = 1.0

    def micro_step(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Forward and backward of one micro-batch; the loss, detached. Gradients accumulate."""
        loss: Tensor = self.deepspeed(tokens, targets)
        self.backward(loss)
        return loss.detach()

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of `loss`, which `deepspeed(tokens, targets)` has returned."""
        if self.deepspeed.fp16_enabled() and not self.deepspeed.zero_optimization_stage():
            # In ZeRO-0 DeepSpeed unscales gradients in its step, but neither scales the loss nor unscales the norm.
            self._loss_scale = float(self.deepspeed.optimizer.loss_scale)
        self.deepspeed.backward(loss * self._loss_scale)

    def step(self, learning_rate: float) -> bool:
        """One call per micro-batch, as DeepSpeed wants it; updates at the boundary of accumulation.

        Returns:
            Whether weights changed: False within an accumulation, and where the gradients were not finite.
        """
        at_boundary: bool = self.deepspeed.is_gradient_accumulation_boundary()
        if at_boundary:
            for group in self.deepspeed.optimizer.param_groups:
                group["lr"] = learning_rate
            if self._plain_gradients_are_bad():
                self._skip_step()
                return False
        self.deepspeed.step()
        if at_boundary:
            self.fp32_values.refresh()
        return at_boundary and bool(self.deepspeed.was_step_applied())

    def _plain_gradients_are_bad(self) -> bool:
        """ZeRO-0 in fp32 is the one mode in which DeepSpeed steps on non-finite gradients."""
        if (
            self.deepspeed.zero_optimization_stage()
            or self.deepspeed.fp16_enabled()
            or self.deepspeed.bfloat16_enabled()
        ):
            return False
        norms = [p.grad.norm() for p in self.model.parameters() if p.grad is not None]
        self._plain_norm = float(torch.stack(norms).norm())
        return not math.isfinite(self._plain_norm)

    def _skip_step(self) -> None:
        self.deepspeed.zero_grad()
        self.deepspeed.skipped_steps += 1
        self.deepspeed.global_steps += 1
        self.deepspeed.micro_steps += 1

    def gradient_norm(self) -> float:
        """Global norm before clipping, of the latest step."""
        norm = self.deepspeed.get_global_grad_norm()
        return float(norm) / self._loss_scale if norm is not None else self._plain_norm

    def loaded(self) -> None:
        """To be called after DeepSpeed has loaded a checkpoint."""
        self.fp32_values.refresh()


def initialize_distributed(device: torch.device) -> dist.ProcessGroup:
    """Joins the process group of the environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

    Returns:
        A second group over the host (gloo), for agreements that must not wait behind GPU work.
    """
    import deepspeed

    prepare_deepspeed()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo", timeout=COLLECTIVE_TIMEOUT, auto_mpi_discovery=False
    )
    control: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
    return control


def prepare_deepspeed() -> None:
    """Settings of the DeepSpeed library that must stand before it joins a process group."""
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)  # hundreds of INFO lines of its own
    # On CPUs DeepSpeed would compile a collective over /dev/shm at the first start: 30 s, a busy wait that two ranks
    # on two cores cannot afford, and segments that outlive a killed rank.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]


def local_device() -> torch.device:
    """The device of this rank, from LOCAL_RANK."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def create(config: TrainerConfig, plan: TrainingPlan, device: torch.device) -> Engine:
    """Builds the model for the plan's ZeRO stage and hands it to DeepSpeed.

    Raises:
        UserError: the scan backend cannot serve or gives wrong numbers, or initial weights do not fit.
    """
    import deepspeed

    dtype = _DTYPES[plan.precision]
    backend = scan.choose(config.training.scan_backend, config.model, device)
    selftest.check(backend, device, dtype, config.model.d_state, config.model.d_conv)
    ds_config = deepspeed_config.build(config, plan)
    weights = config.checkpoint.initial_weights
    source = from_safetensors(weights, config.model) if weights else seeded(config.model, config.training.seed, device)
    model = build_model(config.model, source, backend, device, dtype, zero3=ds_config if plan.zero_stage == 3 else None)
    model.set_recompute(plan.recompute_every)
    optimizer = _optimizer(config, plan, model)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config, dist_init_required=False)
    _undo_initial_step(engine)
    if plan.zero_stage in (1, 2):
        # In fp32, DeepSpeed 0.19.6 steps on non-finite gradients without this; 0.19.8 looks at their norm anyway.
        engine.optimizer.check_grad_overflow = True
    if config.parallelism.master_dtype == "bf16":
        widen_masters(engine, sum(group["kind"] == "fp32" for group in engine.optimizer.param_groups))
    fp32_values = Fp32Values(model, engine, device)
    fp32_values.write_masters()
    return Engine(engine, model, fp32_values, device, backend.name)


def _optimizer(config: TrainerConfig, plan: TrainingPlan, model: MambaLM) -> torch.optim.Optimizer:
    training = config.training
    groups = parameter_groups(model.named_parameters(), training.weight_decay, plan.sizes.param_group_elements)
    # The rate is set at each step. DeepSpeed makes a first one on zero gradients, which would decay the weights.
    settings: dict[str, Any] = {"lr": 0.0, "betas": (training.beta1, training.beta2), "eps": training.adam_epsilon}
    if config.parallelism.master_dtype == "bf16" and plan.offload_optimizer is Device.CPU:
        # The one mode for which DeepSpeed insists on its own CPU kernel (compiled at the first use).
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        cpu_adam: torch.optim.Optimizer = DeepSpeedCPUAdam(
            groups, adamw_mode=True, fp32_optimizer_states=False, **settings
        )
        return cpu_adam
    return torch.optim.AdamW(groups, fused=True, **settings)


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float, elements: int
) -> list[dict[str, Any]]:
    """Groups of at most `elements` elements (a larger parameter stands alone).

    Parameters marked `_no_weight_decay`, norms and biases do not decay. DeepSpeed flattens, converts and steps
    group by group: bounded groups bound its start-up copies and the fp32 gradients of a step.
    """
    kinds: dict[str, list[nn.Parameter]] = {"fp32": [], "plain": [], "decayed": []}
    for name, parameter in parameters:
        undecayed = getattr(parameter, "_no_weight_decay", False) or name.endswith(
            ("norm.weight", "norm_f.weight", "bias")
        )
        kind = "fp32" if name.split("mixer.")[-1] in FP32_PARAMETERS else "plain" if undecayed else "decayed"
        kinds[kind].append(parameter)
    groups = []
    for kind, members in kinds.items():
        for chunk in _chunks(members, elements):
            groups.append({"params": chunk, "kind": kind, "weight_decay": weight_decay if kind == "decayed" else 0.0})
    return groups


def _chunks(parameters: list[nn.Parameter], elements: int) -> Iterable[list[nn.Parameter]]:
    chunk: list[nn.Parameter] = []
    filled = 0
    for parameter in parameters:
        size = int(getattr(parameter, "ds_numel", parameter.numel()))
        if chunk and filled + size > elements:
            yield chunk
            chunk, filled = [], 0
        chunk.append(parameter)
        filled += size
    if chunk:
        yield chunk


def _undo_initial_step(engine: Any) -> None:
    """ZeRO-3 and -0 allocate Adam's moments by a step on zero gradients, which counts as one in bias correction."""
    basic = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for state in basic.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"].zero_()
        elif "step" in state:
            state["step"] = 0


def memory_of_failure(error: BaseException) -> str:
    """What an out-of-memory error was about, in a few lines a person can act on."""
    if not torch.cuda.is_available():
        return str(error).splitlines()[0]
    stats = torch.cuda.memory_stats()
    gib = 2**30
    free, total = torch.cuda.mem_get_info()
    return (
        f"{str(error).splitlines()[0]}\n"
        f"  live tensors {stats['allocated_bytes.all.current'] / gib:.2f} GiB (peak "
        f"{stats['allocated_bytes.all.peak'] / gib:.2f}), reserved by PyTorch "
        f"{stats['reserved_bytes.all.current'] / gib:.2f} GiB, free on the card "
        f"{free / gib:.2f} of {total / gib:.2f} GiB"
    )
