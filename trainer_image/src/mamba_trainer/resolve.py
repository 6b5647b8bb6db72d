"""From what a person asked for to a run that can start: one place, for every way to start.

All that can be wrong is found here, before a process is started or a byte of GPU memory is taken.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mamba_trainer import deepspeed_config
from mamba_trainer.checkpoint.commit import candidates
from mamba_trainer.checkpoint.verify import BadCheckpoint, read_manifest
from mamba_trainer.config import TrainerConfig, lay_over, merge, parse_config, read_yaml
from mamba_trainer.contract import UserError
from mamba_trainer.plan import Hardware, MemoryTable, memory_table, plan_training
from mamba_trainer.plan.hardware import detect, free_disk
from mamba_trainer.run import Run

DEFAULT_PRESET = "7b_mamba"


@dataclass(frozen=True)
class Request:
    """The options of a training command, as given; None: not given."""

    preset: str | None = None
    config: Path | None = None
    num_gpus: int | None = None
    deepspeed_config: Path | None = None
    load_checkpoint: str | None = None
    data: Path | None = None
    checkpoint_dir: Path | None = None
    max_steps: int | None = None
    profile: int | None = None
    settings: list[str] = field(default_factory=list)
    #: The machine to plan for; None: the one at hand.
    hardware: Hardware | None = None


def resolve(request: Request) -> Run:
    """
    Raises:
        UserError: whatever is wrong with the request, with what to do about it.
    """
    config, hardware = _configure(request)
    return Run(config=config, plan=plan_training(config, hardware), hardware=hardware)


def resolve_memory(request: Request) -> MemoryTable:
    """What `--check_memory` shows: which modes fit how many of this card, or of the one named.

    Raises:
        UserError: as `resolve`; or there is no GPU here and none is named.
    """
    config, hardware = _configure(request)
    if not hardware.gpus:
        raise UserError("This machine has no GPU to check: name a card, for example --check_memory --gpu 'RTX 4090'.")
    return memory_table(config, hardware)


def _configure(request: Request) -> tuple[TrainerConfig, Hardware]:
    hardware = request.hardware or detect(request.checkpoint_dir or Path("checkpoints"))
    raw = _raw(request, hardware)
    user = _group(raw, "deepspeed")
    if request.deepspeed_config is not None:
        user = merge(user, deepspeed_config.read_user_file(request.deepspeed_config))
    if user:
        raw.pop("deepspeed", None)
        raw = deepspeed_config.adopt_user_settings(lay_over(_preset_of(raw), raw), user)
    config = parse_config(raw)
    if request.hardware is None:
        hardware = hardware.model_copy(update={"disk_bytes": free_disk(config.checkpoint.directory)})
    return _as_checkpointed(config), hardware


def _as_checkpointed(config: TrainerConfig) -> TrainerConfig:
    """A run that resumes keeps the ZeRO stage of its checkpoint, however much memory is free today."""
    load = config.checkpoint.load
    if config.parallelism.zero_stage != "auto" or load == "none":
        return config
    for folder in candidates(config.checkpoint.directory) if load == "auto" else [Path(load)]:
        try:
            stage = read_manifest(folder).zero_stage
        except (BadCheckpoint, UserError):
            continue  # the resume says what is wrong with it, and goes on to the next
        return parse_config(merge(config.model_dump(mode="json"), {"parallelism": {"zero_stage": stage}}))
    return config


def check_output(run: Run) -> None:
    """
    Raises:
        UserError: the checkpoint folder cannot be written. (That it is large enough, the plan has checked.)
    """
    directory = run.config.checkpoint.directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UserError(
            f"The checkpoint folder {directory} cannot be written: {error.strerror}. "
            "Choose another with --checkpoint_dir."
        ) from None


def _raw(request: Request, hardware: Hardware) -> dict[str, Any]:
    raw: dict[str, Any] = read_yaml(request.config) if request.config else {}
    if request.preset is not None:
        if raw.get("preset", request.preset) != request.preset:
            raise UserError(f"--preset {request.preset} contradicts preset: {raw['preset']} in {request.config}.")
        raw["preset"] = request.preset
    if not raw:
        raw["preset"] = DEFAULT_PRESET
    if not hardware.gpus and request.preset is None and request.config is None:
        raise UserError(
            "This machine has no GPU that PyTorch can use, and the default is the 7B model on all GPUs.\n"
            "Try the whole trainer on CPU processes with:  --preset tiny --num_gpus 2\n"
            "To plan for another machine, name its card:   --dry_run --gpu 'RTX 4090' --num_gpus 4"
        )
    given: dict[str, dict[str, Any]] = {
        "checkpoint": {"directory": _text(request.checkpoint_dir), "load": request.load_checkpoint},
        "data": {"path": _text(request.data)},
        "training": {"max_steps": request.max_steps},
        "reporting": {"profile_steps": request.profile},
    }
    raw = lay_over(raw, {g: kept for g, values in given.items() if (kept := _given(values))})
    if request.num_gpus is not None:
        raw.pop("num_gpus", None)
        raw = merge(raw, {"parallelism": {"num_gpus": request.num_gpus}})
    for setting in request.settings:
        raw = lay_over(raw, read_setting(setting))
    if "num_gpus" not in raw and "num_gpus" not in _group(raw, "parallelism"):
        raw = merge(raw, {"parallelism": {"num_gpus": _default_ranks(raw, hardware)}})
    return raw


def _default_ranks(raw: Mapping[str, Any], hardware: Hardware) -> int:
    """All GPUs, or two CPU processes; fewer where a given global batch can only be split over fewer."""
    ranks = hardware.gpus or min(2, hardware.cpu_count)
    batch = _group(lay_over(_preset_of(raw), raw), "training").get("global_batch_size")
    if isinstance(batch, int) and batch > 0:
        ranks = next(n for n in range(min(ranks, batch), 0, -1) if batch % n == 0)
    return ranks


def _group(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Nothing has been validated yet: a group may be missing, or anything."""
    group = raw.get(name)
    return group if isinstance(group, Mapping) else {}


def _preset_of(raw: Mapping[str, Any]) -> dict[str, Any]:
    from mamba_trainer import presets

    name = raw.get("preset")
    return presets.get(name) if isinstance(name, str) else {}


def read_setting(text: str) -> dict[str, Any]:
    """`training.learning_rate=1e-4` -> {"training": {"learning_rate": "1e-4"}}; values are read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"--set takes GROUP.OPTION=VALUE, for example training.learning_rate=1e-4, not {text!r}.")
    try:
        nested: Any = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"--set {key}: {value!r} is not a valid value.") from None
    for part in reversed(key.strip().split(".")):
        nested = {part: nested}
    return dict(nested)


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
