"""What `auto` becomes, what is kept of a user's wishes, and how a job that does not fit is refused."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_trainer.config import Device, Precision, TrainerConfig, parse_config
from mamba_trainer.contract import UserError
from mamba_trainer.plan import CARDS, Hardware, Term, TrainingPlan, named, plan_training, smaller_plan

GB = 10**9


def config(preset: str = "7b_mamba", gpus: int = 4, **groups: dict) -> TrainerConfig:
    groups["parallelism"] = {"num_gpus": gpus, **groups.get("parallelism", {})}
    return parse_config({"preset": preset, **groups})


@pytest.mark.parametrize(
    ("preset", "gpus", "card", "mode"),
    [
        ("7b_mamba", 1, "RTX 4090", "ZeRO-2, optimizer on the host, recompute every 3 blocks"),
        ("7b_mamba", 4, "RTX 4090", "ZeRO-2, optimizer on the host, recompute every 3 blocks"),
        ("7b_mamba", 6, "A10", "ZeRO-2, optimizer on the host, recompute every 3 blocks"),
        ("7b_mamba", 8, "RTX 3090", "ZeRO-3, recompute of every block"),
        ("7b_mamba", 8, "H100", "ZeRO-2, no recompute"),
        ("3b_mamba", 4, "RTX 4090", "ZeRO-2, recompute every 4 blocks"),
        ("1b_mamba", 4, "RTX 4090", "ZeRO-2, no recompute"),
        ("1b_mamba", 1, "H100", "ZeRO-0, no recompute"),
        ("7b_mamba", 1, "H200", "ZeRO-0, no recompute"),
    ],
)
def test_auto_picks_the_fastest_mode_that_fits(preset, gpus, card, mode):
    hardware = named(card, gpus)
    plan = plan_training(config(preset, gpus), hardware)
    assert plan.mode == mode
    assert plan.gpu_total <= 0.95 * hardware.gpu_bytes
    assert plan.precision is Precision.BF16


def test_a_host_too_small_for_one_offload_gets_a_mode_that_fits_it():
    """ZeRO-2 with offload wants more host memory than ZeRO-3 with offload."""

    def host(gigabytes: int) -> TrainingPlan:
        return plan_training(config(), named("RTX 4090", 4, host_bytes=gigabytes * GB))

    assert host(200).zero_stage == 2
    assert host(160).zero_stage == 3
    assert host(160).host_total <= 160 * GB
    with pytest.raises(UserError, match=r"Host: needs 1\d\d GB of 140 GB per node"):
        host(140)


def test_cpu_processes_train_in_fp32_under_zero2_and_one_process_without_partitioning():
    machine = Hardware(gpus=0, host_bytes=8 * GB)
    two, one = plan_training(config("tiny", 2), machine), plan_training(config("tiny", 1), machine)
    assert (two.zero_stage, two.precision, two.device) == (2, Precision.FP32, "cpu")
    assert (one.zero_stage, one.precision, one.offload_optimizer) == (0, Precision.FP32, Device.NONE)
    assert two.scan_backend == "torch"


def test_cpu_memory_is_the_budget_of_all_processes():
    with pytest.raises(UserError, match="What fits") as refusal:
        plan_training(config("tiny", 8, training={"global_batch_size": 32}), Hardware(gpus=0, host_bytes=4 * GB))
    assert "4 processes" in str(refusal.value)


def test_a_card_without_bf16_gets_fp16_and_an_explicit_bf16_is_refused():
    old = named("RTX 3090", 1).model_copy(update={"name": "V100", "precisions": (Precision.FP16, Precision.FP32)})
    assert plan_training(config("1b_mamba", 1), old).precision is Precision.FP16
    with pytest.raises(UserError, match="V100 cannot compute in bf16"):
        plan_training(config("1b_mamba", 1, parallelism={"precision": "bf16"}), old)


@pytest.mark.parametrize("gpus", [0, 2])
def test_auto_never_changes_arithmetic(gpus):
    machine = named("RTX 4090", gpus) if gpus else Hardware(gpus=0, host_bytes=100 * GB)
    wanted = config("1b_mamba", 2, parallelism={"master_dtype": "bf16"})
    assert plan_training(wanted, machine).precision is Precision.BF16
    assert plan_training(wanted, machine).zero_stage > 0


def test_explicit_wishes_are_kept():
    wishes = {"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu", "precision": "fp16"}
    wanted = config("1b_mamba", 2, parallelism=wishes, training={"recompute": 5, "micro_batch_size": 2})
    plan = plan_training(wanted, named("H100", 2))
    assert plan.mode == "ZeRO-3, optimizer and parameters on the host, recompute every 5 blocks"
    assert (plan.micro_batch_size, plan.accumulation_steps, plan.precision) == (2, 8, Precision.FP16)


def test_a_mode_fixed_in_every_point_may_use_the_headroom_and_is_warned_about():
    wishes = {"zero_stage": 3, "offload_optimizer": "none", "offload_parameters": "none"}
    fixed = config(gpus=8, parallelism=wishes, training={"recompute": "all", "micro_batch_size": 1})
    need = plan_training(fixed, named("RTX 4090", 8)).gpu_total
    tight = named("RTX 4090", 8).model_copy(update={"gpu_bytes": int(need * 1.01)})
    assert any(reason.startswith("Warning") for reason in plan_training(fixed, tight).reasons)
    with pytest.raises(UserError, match="do not fit"):
        plan_training(fixed, tight.model_copy(update={"gpu_bytes": int(need * 0.99)}))


def test_zero2_of_the_7b_on_24_gb_is_refused_with_numbers_and_what_fits():
    wanted = config(parallelism={"zero_stage": 2, "offload_optimizer": "none"})
    with pytest.raises(UserError) as refusal:
        plan_training(wanted, named("RTX 4090", 4))
    message = str(refusal.value)
    assert "6.92B parameters do not fit on 4 x RTX 4090 (24.5 GB usable)" in message
    assert "Too big: master and moments" in message
    assert "as many GPUs with zero_stage 2, offload_optimizer cpu" in message
    assert "8 of these GPUs" in message
    assert len(message.splitlines()) <= 24


def test_a_model_that_fits_nowhere_is_told_so():
    huge = config(gpus=1, model={"d_model": 32_768, "n_layer": 1_000})
    with pytest.raises(UserError, match="No mode fits"):
        plan_training(huge, named("RTX 4090", 1, host_bytes=64 * GB))


def test_more_ranks_than_gpus_are_refused():
    with pytest.raises(UserError, match="8 GPUs are asked for, but there are 4"):
        plan_training(config(gpus=8), named("RTX 4090", 4))
    assert plan_training(config(gpus=8), named("RTX 4090", 4, nodes=2)).ranks_per_node == 4


def test_a_disk_that_cannot_hold_one_checkpoint_is_refused_unless_nothing_is_saved():
    small = named("H100", 8).model_copy(update={"disk_bytes": 60 * GB})
    with pytest.raises(UserError, match=r"A checkpoint takes 96.9 GB, but checkpoints has 60.0 GB free"):
        plan_training(config(gpus=8), small)
    plan_training(config(gpus=8, checkpoint={"interval": 0, "save_final": False}), small)
    roomy = small.model_copy(update={"disk_bytes": 200 * GB})
    assert any("lower checkpoint.keep" in reason for reason in plan_training(config(gpus=8), roomy).reasons)


def test_after_an_out_of_memory_the_next_plan_is_smaller_and_keeps_what_checkpoints_depend_on():
    wanted, hardware = config("3b_mamba", 8), named("RTX 4090", 8)
    plan: TrainingPlan | None = plan_training(wanted, hardware)
    seen = []
    while plan is not None and len(seen) < 20:
        seen.append(plan)
        plan = smaller_plan(wanted, hardware, plan)
    assert 1 < len(seen) < 20
    assert [p.gpu_total for p in seen] == sorted({p.gpu_total for p in seen}, reverse=True)
    assert {(p.zero_stage, p.offload_optimizer, p.sizes, p.tokens_per_step) for p in seen} == {
        (seen[0].zero_stage, seen[0].offload_optimizer, seen[0].sizes, seen[0].tokens_per_step)
    }
    assert all(p.micro_batch_size * p.accumulation_steps * 8 == 64 for p in seen)


def test_a_plan_survives_its_json():
    plan = plan_training(config(), named("RTX 4090", 4))
    assert TrainingPlan.model_validate_json(plan.model_dump_json()) == plan


def test_planning_imports_no_torch():
    code = "import sys, mamba_trainer.plan; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Any job, within what a person may write, on any card.
jobs = st.fixed_dictionaries(
    {
        "d_model": st.integers(8, 512).map(lambda n: 16 * n),
        "n_layer": st.integers(1, 96),
        "vocab_size": st.integers(256, 130_000),
        "d_state": st.sampled_from([8, 16, 64]),
        "expand": st.sampled_from([1, 2]),
        "tie_embeddings": st.booleans(),
    }
)
wishes = st.fixed_dictionaries(
    {},
    optional={
        "zero_stage": st.sampled_from([1, 2, 3]),
        "offload_optimizer": st.sampled_from(["none", "cpu"]),
        "precision": st.sampled_from(["bf16", "fp16", "fp32"]),
    },
)
lengths = st.sampled_from([256, 2048, 4096, 16_384])
gpu_counts = st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24, 48])
memories = st.integers(4, 200).map(lambda n: n * GB)


def attempt(model: dict, length: int, gpus: int, memory: int, parallelism: dict) -> TrainingPlan | str:
    wanted = parse_config(
        {
            "model": model,
            "training": {"global_batch_size": 96, "sequence_length": length},
            "parallelism": {"num_gpus": gpus, **parallelism},
        }
    )
    try:
        return plan_training(wanted, Hardware(gpus=gpus, name="card", gpu_bytes=memory))
    except UserError as error:
        return str(error)


@settings(max_examples=150, deadline=None)
@given(model=jobs, length=lengths, gpus=gpu_counts, memory=memories, parallelism=wishes, more=gpu_counts)
def test_more_gpus_never_make_a_fitting_job_not_fit(model, length, gpus, memory, parallelism, more):
    if not isinstance(attempt(model, length, gpus, memory, parallelism), str):
        assert not isinstance(attempt(model, length, max(gpus, more), memory, parallelism), str)


@settings(max_examples=100, deadline=None)
@given(model=jobs, length=lengths, gpus=gpu_counts, memory=memories, parallelism=wishes, more=memories)
def test_more_memory_never_makes_a_fitting_job_not_fit(model, length, gpus, memory, parallelism, more):
    if not isinstance(attempt(model, length, gpus, memory, parallelism), str):
        assert not isinstance(attempt(model, length, gpus, memory + more, parallelism), str)


@settings(max_examples=200, deadline=None)
@given(model=jobs, length=lengths, gpus=gpu_counts, memory=memories, parallelism=wishes)
def test_a_plan_fits_and_keeps_the_global_batch_and_a_refusal_is_concrete(model, length, gpus, memory, parallelism):
    result = attempt(model, length, gpus, memory, parallelism)
    if isinstance(result, str):
        assert any(f"Too big: {term}." in result for term in Term)
        assert "What fits:" in result or "No mode fits" in result
        assert len(result.splitlines()) <= 24
        return
    assert sum(result.gpu_memory.values()) == result.gpu_total <= 0.95 * memory
    assert min(result.gpu_memory.values()) >= 0
    assert result.micro_batch_size * result.accumulation_steps * result.world_size == 96
    assert {"zero_stage": result.zero_stage, "offload_optimizer": str(result.offload_optimizer),
            "precision": str(result.precision)}.items() >= parallelism.items()  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(model=jobs, length=lengths, gpus=st.sampled_from([1, 2, 4, 8]), card=st.sampled_from(CARDS))
def test_what_a_refusal_proposes_does_fit(model, length, gpus, card):
    wanted = {"zero_stage": 2, "offload_optimizer": "none"}
    result = attempt(model, length, gpus, card.usable_bytes, wanted)
    if isinstance(result, str) and "as many GPUs" in result:
        assert not isinstance(attempt(model, length, gpus, card.usable_bytes, {}), str)
