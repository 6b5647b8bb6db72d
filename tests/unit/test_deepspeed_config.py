"""A user's own DeepSpeed configuration: what it changes, what is translated, and what is refused with its reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mamba_trainer import deepspeed_config
from mamba_trainer.contract import UserError
from mamba_trainer.plan.cards import named
from mamba_trainer.resolve import Request, resolve
from mamba_trainer.run import Run

REPOSITORY = Path(__file__).parents[2]


def run_of(tmp_path: Path, user: object, **request: Any) -> Run:
    path = tmp_path / "deepspeed_config.json"
    path.write_text(user if isinstance(user, str) else json.dumps(user))
    request = {"preset": "1b_mamba", "hardware": named("H200", 4), "deepspeed_config": path, **request}
    return resolve(Request(**request))


def built(run: Run) -> dict[str, Any]:
    return deepspeed_config.build(run.config, run.plan)


def test_keys_of_the_user_win_and_each_difference_is_named(tmp_path: Path) -> None:
    user = {
        "wall_clock_breakdown": True,
        "zero_optimization": {"stage": 2, "overlap_comm": False, "reduce_bucket_size": 12345},
    }
    run = run_of(tmp_path, user)
    assert built(run)["wall_clock_breakdown"] is True
    zero = built(run)["zero_optimization"]
    assert (zero["stage"], zero["overlap_comm"], zero["reduce_bucket_size"]) == (2, False, 12345)
    assert zero["contiguous_gradients"] is True
    lines = deepspeed_config.differences(run.config, run.plan)
    assert "wall_clock_breakdown: not set -> true" in lines
    assert "zero_optimization.overlap_comm: true -> false" in lines
    assert any(line.startswith("zero_optimization.reduce_bucket_size: ") for line in lines)
    assert len(lines) == 3


def test_what_we_have_a_name_for_is_translated_so_that_the_plan_knows_it(tmp_path: Path) -> None:
    user = {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu", "pin_memory": False},
            "offload_param": {"device": "cpu"},
        },
    }
    run = run_of(tmp_path, user)
    assert (run.config.training.global_batch_size, run.plan.micro_batch_size, run.plan.accumulation_steps) == (32, 2, 4)
    assert (run.plan.zero_stage, run.plan.offload_optimizer, run.plan.offload_parameters) == (3, "cpu", "cpu")
    assert run.plan.precision == "bf16"
    config = built(run)
    assert config["gradient_clipping"] == 0.5
    assert config["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": False}
    assert config["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": True}


@pytest.mark.parametrize(
    ("user", "precision", "section"),
    [
        ({"fp16": {"enabled": True, "initial_scale_power": 12}}, "fp16", "fp16"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": False}}, "bf16", "bf16"),
        ({"bf16": {"enabled": False}}, "fp32", None),
        ({"bf16": {"enabled": False}, "fp16": {"enabled": True}}, "fp16", "fp16"),
        ({"fp16": {"enabled": False}}, "bf16", "bf16"),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto", "loss_scale": "auto"}}, "bf16", "bf16"),
    ],
)
def test_plan_and_deepspeed_agree_on_the_precision(
    user: dict[str, Any], precision: str, section: str | None, tmp_path: Path
) -> None:
    run = run_of(tmp_path, user)
    assert run.plan.precision == precision
    enabled = [name for name in ("bf16", "fp16") if built(run).get(name, {}).get("enabled")]
    assert enabled == ([section] if section else [])
    if "initial_scale_power" in user.get("fp16", {}):
        assert built(run)["fp16"]["initial_scale_power"] == 12


def test_offload_that_is_null_is_none_in_plan_and_deepspeed(tmp_path: Path) -> None:
    run = run_of(tmp_path, {"zero_optimization": {"stage": 3, "offload_optimizer": None}})
    assert run.plan.offload_optimizer == "none"
    assert "offload_optimizer" not in built(run)["zero_optimization"]


def test_16_bit_masters_are_translated(tmp_path: Path) -> None:
    user = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}, "zero_optimization": {"stage": 2}}
    assert run_of(tmp_path, user).config.parallelism.master_dtype == "bf16"


def test_the_guides_activation_checkpointing_becomes_our_recompute(tmp_path: Path) -> None:
    guide = {"activation_checkpointing": {"partition_activations": True, "number_checkpoints": 4}}
    run = run_of(tmp_path, guide)
    assert run.plan.recompute_every == 48 // 4
    assert "activation_checkpointing" not in built(run)
    config = tmp_path / "guide.yaml"
    config.write_text("preset: 1b_mamba\nmodel: {n_layers: 10}\n")
    assert run_of(tmp_path, guide, preset=None, config=config).plan.recompute_every == 3


@pytest.mark.parametrize(
    ("section", "named_key"),
    [
        ({"cpu_checkpointing": True}, "cpu_checkpointing"),
        ({"contiguous_memory_optimization": True}, "contiguous_memory_optimization"),
        ({"number_checkpoints": 0}, "number_checkpoints"),
        ({"number_checkpoints": "four"}, "number_checkpoints"),
        ({"number_checkpoints": True}, "number_checkpoints"),
    ],
)
def test_other_activation_checkpointing_is_refused(section: dict[str, Any], named_key: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=named_key):
        run_of(tmp_path, {"activation_checkpointing": section})


def test_auto_values_are_ours_to_fill_in(tmp_path: Path) -> None:
    ours = run_of(tmp_path, {})
    auto = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": "auto", "offload_optimizer": {"device": "auto"}, "reduce_bucket_size": "auto"},
    }
    run = run_of(tmp_path, auto)
    assert (run.config.training, run.plan) == (ours.config.training, ours.plan)
    assert deepspeed_config.differences(run.config, run.plan) == []


def test_the_shipped_configuration_changes_nothing(tmp_path: Path) -> None:
    shipped = (REPOSITORY / "trainer_image/deepspeed_config.json").read_text()
    run = run_of(tmp_path, shipped)
    assert run.plan == run_of(tmp_path, {}).plan
    assert deepspeed_config.differences(run.config, run.plan) == []


def test_a_deepspeed_section_of_our_yaml_means_the_same_as_the_file(tmp_path: Path) -> None:
    user = {"zero_optimization": {"stage": 3, "overlap_comm": False}, "gradient_clipping": 0.25}
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"preset": "1b_mamba", "deepspeed": user}))
    from_yaml = resolve(Request(config=config, hardware=named("H200", 4)))
    assert from_yaml == run_of(tmp_path, user)
    assert from_yaml.plan.zero_stage == 3


REFUSED: dict[str, tuple[object, tuple[str, ...]]] = {
    "an optimizer": ({"optimizer": {"type": "Adam"}}, ("optimizer", "training.learning_rate")),
    "a scheduler": ({"scheduler": {"type": "WarmupLR"}}, ("scheduler", "warmup_steps")),
    "pipeline": ({"pipeline": {"stages": 2}}, ("pipeline", "not built yet")),
    "tensor parallelism": ({"tensor_parallel": {"autotp_size": 2}}, ("tensor_parallel", "not built yet")),
    "a removed key": ({"sparse_attention": {"mode": "fixed"}}, ("sparse_attention", "has been removed")),
    "a removed ZeRO key": ({"zero_optimization": {"mics_shard_size": 2}}, ("mics_shard_size", "has been removed")),
    "several at once": ({"amp": {}, "optimizer": {"type": "x"}}, ("amp", "optimizer")),
    "the old name of offload": ({"zero_optimization": {"cpu_offload": True}}, ("cpu_offload", "offload_optimizer")),
    "an unknown ZeRO key": ({"zero_optimization": {"overlap_com": True}}, ("zero_optimization.overlap_com",)),
    "a ZeRO key of another type": ({"zero_optimization": {"overlap_comm": "perhaps"}}, ("overlap_comm", "boolean")),
    "offload to nvme": (
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, ("offload_param", "nvme", "cpu"),
    ),
    "the old name of bf16": ({"bfloat16": {"enabled": True}}, ("bfloat16", "bf16")),
    "a precision beside ours": ({"torch_autocast": {"enabled": True}}, ("torch_autocast", "parallelism.precision")),
    "sequence parallelism": ({"sequence_parallel_size": 2}, ("sequence_parallel_size", "not built yet")),
    "a switch that is a text": ({"bf16": {"enabled": "false"}}, ("bf16.enabled", "true or false", "'false'")),
    "a monitor that is a switch": ({"tensorboard": True}, ("tensorboard", "dictionary")),
    "a monitor's path that is a number": ({"csv_monitor": {"output_path": 5}}, ("csv_monitor.output_path", "string")),
    "both 16-bit types": ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, ("both bf16 and fp16",)),
    "a section that is none": ({"fp16": True}, ("fp16", "must be an object", "true")),
    "ZeRO as a number": ({"zero_optimization": 2}, ("zero_optimization", "must be an object")),
    "a stage that does not exist": ({"zero_optimization": {"stage": 4}}, ("zero_optimization.stage",)),
    "batch sizes that contradict": (
        {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 3},
        ("32", "12"),
    ),
    "broken JSON": ('{"bf16": {"enabled": true}', ("is not valid JSON", "line 1")),
    "a list": ("[]", ("must hold a JSON object",)),
}  # fmt: skip


@pytest.mark.parametrize("mistake", REFUSED)
def test_what_would_not_work_is_refused_with_the_reason(mistake: str, tmp_path: Path) -> None:
    user, named_parts = REFUSED[mistake]
    with pytest.raises(UserError) as refusal:
        run_of(tmp_path, user)
    for part in named_parts:
        assert part in str(refusal.value)
    assert len(str(refusal.value).splitlines()) <= 8
