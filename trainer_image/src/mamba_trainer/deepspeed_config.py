"""From plan to DeepSpeed configuration, and a user's own configuration laid over it.

Only what the plan decides is written; a user's `deepspeed_config.json` wins over it key by key, with the
differences printed. What would silently not work is refused here: keys that the installed DeepSpeed has removed,
and settings that the trainer itself must own.
"""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from mamba_trainer.config import Device, Precision, TrainerConfig, lay_over, merge
from mamba_trainer.contract import UserError

if TYPE_CHECKING:
    from mamba_trainer.plan import TrainingPlan

#: Sections of a user's file that would take from the trainer what it must own, with what to do instead.
_OWNED = {
    "optimizer": "set training.learning_rate, beta1, beta2, adam_epsilon and weight_decay",
    "scheduler": "set training.schedule, warmup_steps and learning_rate",
    "pipeline": "pipeline parallelism is not built yet: use ZeRO-3",
    "tensor_parallel": "tensor parallelism is not built yet: use ZeRO-3",
    "sequence_parallel_size": "sequence parallelism is not built yet: leave it out",
    "torch_autocast": "set parallelism.precision",
    "bfloat16": "its name is bf16 now",
    "zero_allow_untested_optimizer": "leave it out",
    "zero_optimization.cpu_offload": "set offload_optimizer.device to cpu",
    "zero_optimization.cpu_offload_params": "set offload_param.device to cpu",
}


#: Keys of a user's file that our configuration has a name for, in its training group.
_TRAINING_KEYS = {
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "gradient_clipping",
}


#: Their name of a kind of offload, and ours.
_OFFLOADS = {"offload_optimizer": "offload_optimizer", "offload_param": "offload_parameters"}

#: Sections that go to DeepSpeed's monitors as they are.
_MONITORS = ("tensorboard", "wandb", "csv_monitor", "comet")

#: Sections that we read.
_SECTIONS = ("zero_optimization", "bf16", "fp16", "activation_checkpointing")


def build(config: TrainerConfig, plan: TrainingPlan) -> dict[str, Any]:
    """The configuration that realises `plan`, with the user's section merged over it."""
    return merge(_generated(config, plan), config.deepspeed)


def _generated(config: TrainerConfig, plan: TrainingPlan) -> dict[str, Any]:
    sizes = plan.sizes
    zero: dict[str, Any] = {"stage": plan.zero_stage}
    if plan.zero_stage in (1, 2):
        zero |= {
            "overlap_comm": plan.zero_stage == 2,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "reduce_bucket_size": sizes.reduce_bucket_elements,
            "allgather_bucket_size": sizes.allgather_bucket_elements,
        }
    if plan.zero_stage == 3:
        zero |= {
            "overlap_comm": True,
            "contiguous_gradients": True,
            "reduce_bucket_size": sizes.reduce_bucket_elements,
            "sub_group_size": sizes.sub_group_elements,
            "stage3_prefetch_bucket_size": sizes.prefetch_elements,
            "stage3_param_persistence_threshold": sizes.persistence_threshold,
            "stage3_max_live_parameters": sizes.max_live_parameters,
            "stage3_max_reuse_distance": sizes.max_live_parameters,
            "stage3_gather_16bit_weights_on_model_save": False,
            # A block reads its children's weights itself: it must be gathered as a whole.
            "leaf_module": {"classes": ["mamba_trainer.model.Block"]},
        }
    on_gpu = plan.device == "cuda"
    if plan.offload_optimizer is Device.CPU:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    if plan.offload_parameters is Device.CPU:
        zero["offload_param"] = {"device": "cpu", "pin_memory": on_gpu}
    generated: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.accumulation_steps,
        "gradient_clipping": config.training.gradient_clipping,
        "steps_per_print": None,
        "zero_optimization": zero,
        # The optimizer is torch's fused AdamW in every mode: no compiler is needed at start-up (ADR 0002).
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    match plan.precision:
        case Precision.BF16:
            generated["bf16"] = {"enabled": True}
            if config.parallelism.master_dtype == "bf16":
                generated["bf16"] |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
        case Precision.FP16:
            generated["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16, "hysteresis": 2}
        case Precision.FP32:
            pass
    return generated


def read_user_file(path: Path) -> dict[str, Any]:
    """A user's deepspeed_config.json, checked.

    Raises:
        UserError: missing, no JSON, or with keys that are refused (each with its reason).
    """
    try:
        user = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"Cannot read the DeepSpeed configuration {path}: {error.strerror}.") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(user, dict):
        raise UserError(f"{path} must hold a JSON object.")
    return user


def adopt_user_settings(raw: Mapping[str, Any], user: Mapping[str, Any]) -> dict[str, Any]:
    """Lays a user's DeepSpeed configuration over the raw configuration `raw`.

    What our configuration has a name for (stage, offload, precision, batch sizes, clipping, activation
    checkpointing) is translated, so that there is one place for each fact; "auto"
    values are ours to fill in; the rest is kept for `build`.

    Raises:
        UserError: a key that the installed DeepSpeed has removed, or that the trainer must own.
    """
    user = _without_auto(user)
    _refuse(user)
    sections = {name: dict(user.pop(name, {})) for name in _SECTIONS}
    training = {ours: user.pop(theirs) for theirs, ours in _TRAINING_KEYS.items() if theirs in user}
    zero = sections["zero_optimization"]
    parallelism = _precision(sections["bf16"], sections["fp16"])
    if "stage" in zero:
        parallelism["zero_stage"] = zero.pop("stage")
    for theirs, ours in _OFFLOADS.items():
        if zero.get(theirs, ...) is None:
            del zero[theirs]
            parallelism[ours] = "none"
        elif (device := zero.get(theirs, {}).get("device")) is not None:
            parallelism[ours] = device
    training |= _recompute(sections.pop("activation_checkpointing"), raw)
    kept = user | {name: section for name, section in sections.items() if section}
    return merge(lay_over(raw, {"parallelism": parallelism, "training": training}), {"deepspeed": kept})


def _precision(bf16: dict[str, Any], fp16: dict[str, Any]) -> dict[str, Any]:
    """Takes `enabled` from the sections: what is left of them are details of a precision that is chosen elsewhere."""
    wide, narrow = bf16.pop("enabled", None), fp16.pop("enabled", None)
    if wide and narrow:
        raise UserError("The DeepSpeed configuration enables both bf16 and fp16: keep one.")
    masters = {"master_dtype": "bf16"} if bf16.get("bf16_master_weights_and_grads") else {}
    if wide or narrow:
        return {"precision": "bf16" if wide else "fp16", **masters}
    return {"precision": "fp32"} if wide is False else {}


def differences(config: TrainerConfig, plan: TrainingPlan) -> list[str]:
    """One line for each key in which the user's DeepSpeed section changes what the plan would have written."""
    generated = dict(_flatten(_generated(config, plan)))
    return [
        f"{key}: {json.dumps(generated[key]) if key in generated else 'not set'} -> {json.dumps(value)}"
        for key, value in _flatten(config.deepspeed)
        if generated.get(key, ...) != value
    ]


def _refuse(user: Mapping[str, Any]) -> None:
    for name in _SECTIONS:
        if not isinstance(user.get(name, {}), Mapping):
            raise UserError(f"{name} of the DeepSpeed configuration must be an object, not {json.dumps(user[name])}.")
        enabled = user.get(name, {}).get("enabled", True)
        if not isinstance(enabled, bool):  # any text would count as true, "false" too
            raise UserError(f"{name}.enabled of the DeepSpeed configuration must be true or false, not {enabled!r}.")
    wrong = [f"  {key}: {reason}" for key, reason in _OWNED.items() if _holds(user, key)]
    wrong += [f"  {key}: {reason}" for key, reason in _removed_from_deepspeed() if _holds(user, key)]
    wrong += [*_not_zero_options(user.get("zero_optimization", {})), *_not_monitors(user)] if not wrong else []
    if wrong:
        raise UserError("\n".join(["These keys of the DeepSpeed configuration cannot be used:", *wrong]))


def _holds(user: Mapping[str, Any], dotted: str) -> bool:
    section, _, key = dotted.rpartition(".")
    return key in (user.get(section, {}) if section else user)


def _removed_from_deepspeed() -> Iterator[tuple[str, str]]:
    """Keys that the installed version has removed, with its own words."""
    installed = _import_deepspeed("deepspeed.runtime.config")
    yield from getattr(installed, "_REMOVED_TOP_LEVEL_CONFIG_KEYS", {}).items()
    for key, reason in getattr(installed, "_REMOVED_ZERO_CONFIG_KEYS", {}).items():
        yield f"zero_optimization.{key}", reason


def _not_zero_options(zero: Mapping[str, Any]) -> list[str]:
    if wrong := _not_accepted("deepspeed.runtime.zero.config", "DeepSpeedZeroConfig", zero):
        return [f"  zero_optimization.{line}" for line in wrong]
    nvme = "offload to nvme is not supported: use cpu, or leave it out"
    devices = {key: (zero.get(key) or {}).get("device") for key in _OFFLOADS}
    return [f"  zero_optimization.{key}.device: {nvme}" for key, device in devices.items() if device == "nvme"]


def _not_monitors(user: Mapping[str, Any]) -> list[str]:
    sections = {name: user[name] for name in _MONITORS if name in user}
    return [f"  {line}" for line in _not_accepted("deepspeed.monitor.config", "DeepSpeedMonitorConfig", sections)]


def _not_accepted(module: str, model: str, section: Mapping[str, Any]) -> list[str]:
    """What DeepSpeed would refuse in every rank."""
    try:
        getattr(_import_deepspeed(module), model)(**section)
    except ValidationError as error:
        return [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
    return []


def _import_deepspeed(name: str) -> ModuleType:
    import torch

    # Else DeepSpeed looks for an accelerator itself and warns where it finds none.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    return importlib.import_module(name)


def _recompute(section: Mapping[str, Any], raw: Mapping[str, Any]) -> dict[str, Any]:
    """The guide's activation checkpointing: `number_checkpoints` segments become blocks per boundary.

    `partition_activations` splits boundaries over tensor-parallel ranks; there is one, so it holds as it is.
    """
    for key in ("cpu_checkpointing", "contiguous_memory_optimization"):
        if section.get(key):
            raise UserError(f"activation_checkpointing.{key} is not supported: set training.recompute instead.")
    count = section.get("number_checkpoints")
    layers = raw.get("model", {}).get("n_layer", raw.get("model", {}).get("n_layers"))
    if count is None or layers is None:
        return {}
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise UserError(f"activation_checkpointing.number_checkpoints must be a positive whole number, not {count!r}.")
    return {"recompute": math.ceil(layers / count)}


def _without_auto(section: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_auto(value) if isinstance(value, Mapping) else value
        for key, value in section.items()
        if value != "auto"
    }


def _flatten(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
