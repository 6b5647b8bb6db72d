"""Reads the keys of the guide's own YAML (`n_layers`, `max_seq_length`, `num_gpus`, ...) as ours.

They are translated once, before validation, so that nothing else knows of two spellings. Options of modes that
are not built yet are refused here with the reason, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: (group, the guide's key) -> (group, our key); the group None is the top level.
_RENAMED: dict[tuple[str | None, str], tuple[str | None, str]] = {
    (None, "model_type"): ("model", "model_type"),
    (None, "num_gpus"): ("parallelism", "num_gpus"),
    ("model", "n_layers"): ("model", "n_layer"),
    ("model", "max_seq_length"): ("training", "sequence_length"),
    ("training", "batch_size"): ("training", "micro_batch_size"),
}

_FUTURE_MODES = {
    "pipeline_parallel_size": "pipeline parallelism is not built yet: use ZeRO-3, which splits the model as well",
    "tensor_parallel_size": "tensor parallelism is not built yet: use ZeRO-3, which splits the model as well",
    "gradient_compression": (
        "gradient compression is not built yet, and DeepSpeed has removed its 1-bit optimizers since 0.19.7"
    ),
}


def rename_guide_keys(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`raw` with the guide's keys under our names, so that layers meet under one name; `raw` itself is not changed.

    A key that stands there under both names is left: `translate_guide_keys` judges it.
    """
    groups = {key: dict(value) if isinstance(value, Mapping) else value for key, value in raw.items()}
    for (group, old), (new_group, new) in _RENAMED.items():
        source = groups if group is None else groups.get(group)
        target = groups if new_group is None else groups.get(new_group, {})
        if isinstance(source, dict) and isinstance(target, dict) and old in source and new not in target:
            target[new] = source.pop(old)
            if new_group is not None:
                groups[new_group] = target
    return groups


def translate_guide_keys(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`raw` with the guide's keys renamed and its batch arithmetic done; `raw` itself is not changed.

    The guide's `batch_size` x `gradient_accumulation_steps` x `num_gpus` becomes `global_batch_size`, once.
    """
    groups = rename_guide_keys(raw)
    for (group, old), (new_group, new) in _RENAMED.items():
        source = groups if group is None else groups.get(group)
        target = groups if new_group is None else groups.get(new_group)
        if not isinstance(source, dict) or not isinstance(target, dict) or old not in source:
            continue
        value = source.pop(old)
        if target[new] != value:
            theirs, ours = (key if name is None else f"{name}.{key}" for name, key in ((group, old), (new_group, new)))
            raise ValueError(f"{theirs} ({value}) and {ours} ({target[new]}) mean the same and differ: remove one")
    _fold_accumulation(groups)
    return groups


def _fold_accumulation(groups: dict[str, Any]) -> None:
    training = groups.get("training")
    if not isinstance(training, dict) or "gradient_accumulation_steps" not in training:
        return
    accumulation = training.pop("gradient_accumulation_steps")
    parallelism = groups.get("parallelism")
    ranks = parallelism.get("num_gpus", 1) if isinstance(parallelism, dict) else 1
    micro = training.get("micro_batch_size", 1)
    try:
        product = int(accumulation) * int(ranks) * (1 if micro == "auto" else int(micro))
    except (TypeError, ValueError):
        raise ValueError("batch_size, gradient_accumulation_steps and num_gpus must be whole numbers") from None
    given = training.setdefault("global_batch_size", product)
    if given != product:
        raise ValueError(
            f"global_batch_size ({given}) is not batch_size x gradient_accumulation_steps x num_gpus ({product}): "
            "remove one of them"
        )


def refuse_future_modes(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`raw` without the options of modes that are not built yet, where they are off (1, false, null, none).

    Raises:
        ValueError: one is switched on; says why it cannot be.
    """
    groups = {
        key: _without_future_modes(raw[key]) for key in ("parallelism", "training") if isinstance(raw.get(key), Mapping)
    }
    return _without_future_modes({**raw, **groups})


def _without_future_modes(group: Mapping[str, Any]) -> dict[str, Any]:
    for key, reason in _FUTURE_MODES.items():
        value = group.get(key)
        if value is True or value not in (None, 1, False, "none"):  # True equals 1, but asks for the mode
            raise ValueError(f"{key}: {reason}")
    return {key: value for key, value in group.items() if key not in _FUTURE_MODES}
