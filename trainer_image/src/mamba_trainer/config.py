"""The configuration of a training run: one pydantic tree for YAML, command line, launcher, ranks and operator.

Torch-free by contract. The tree is validated once, at the edge; inside the program every value is known to be
legal. `ModelConfig.parameter_shapes` is the single source of parameter counts: a test proves it equal, name by
name, to the module that trains.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.alias_generators import to_camel

from mamba_trainer import presets
from mamba_trainer.contract import UserError
from mamba_trainer.guide import refuse_future_modes, rename_guide_keys, translate_guide_keys

Auto = Literal["auto"]
PositiveInt = Annotated[int, Field(ge=1, le=2**40)]


class Precision(StrEnum):
    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


class Device(StrEnum):
    NONE = "none"
    CPU = "cpu"


class _Group(BaseModel):
    """Frozen, closed to unknown keys; read by Python name (YAML) or camelCase (the Kubernetes API)."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, loc_by_alias=False, extra="forbid", frozen=True,
        protected_namespaces=(),
    )  # fmt: skip


class ModelConfig(_Group):
    """Shape of a Mamba-1 language model, in the names of mamba_ssm (arXiv 2312.00752)."""

    model_type: Literal["mamba"] = Field("mamba", description="Mamba-1; there is no other yet.")
    d_model: int = Field(ge=1, le=65_536, description="Width of the residual stream.")
    n_layer: int = Field(ge=1, le=1_024, description="Number of Mamba blocks.")
    vocab_size: int = Field(50_257, ge=2, le=2**24, description="Vocabulary of the tokenizer, before padding.")
    d_state: int = Field(16, ge=1, le=256, description="State size N of each channel.")
    d_conv: int = Field(4, ge=1, le=16, description="Taps of the causal convolution.")
    expand: int = Field(2, ge=1, le=16, description="d_inner = expand * d_model.")
    dt_rank: PositiveInt | Auto = Field(
        "auto", description="Rank of the time step projection; auto: ceil(d_model / 16)."
    )
    pad_vocab_size_multiple: int = Field(
        8, ge=1, le=4_096, description="The embedding has a multiple of this many rows."
    )
    tie_embeddings: bool = Field(True, description="The head is the embedding.")
    norm_epsilon: float = Field(1e-5, gt=0, le=1e-2, description="Epsilon of every RMSNorm.")
    residual_in_fp32: bool = Field(True, description="Keep the residual stream in fp32 under 16-bit weights.")

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def resolved_dt_rank(self) -> int:
        return math.ceil(self.d_model / 16) if self.dt_rank == "auto" else self.dt_rank

    @property
    def padded_vocab_size(self) -> int:
        multiple = self.pad_vocab_size_multiple
        return math.ceil(self.vocab_size / multiple) * multiple

    def block_shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name within one block -> shape, as `mamba_ssm.modules.block.Block` names them."""
        d, e, n, r = self.d_model, self.d_inner, self.d_state, self.resolved_dt_rank
        return {
            "norm.weight": (d,),
            "mixer.A_log": (e, n),
            "mixer.D": (e,),
            "mixer.in_proj.weight": (2 * e, d),
            "mixer.conv1d.weight": (e, 1, self.d_conv),
            "mixer.conv1d.bias": (e,),
            "mixer.x_proj.weight": (r + 2 * n, e),
            "mixer.dt_proj.weight": (e, r),
            "mixer.dt_proj.bias": (e,),
            "mixer.out_proj.weight": (d, e),
        }

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every trained tensor, name -> shape. A tied head is the embedding and is not listed again."""
        shapes: dict[str, tuple[int, ...]] = {"backbone.embedding.weight": (self.padded_vocab_size, self.d_model)}
        block = self.block_shapes()
        for layer in range(self.n_layer):
            shapes |= {f"backbone.layers.{layer}.{name}": shape for name, shape in block.items()}
        shapes["backbone.norm_f.weight"] = (self.d_model,)
        if not self.tie_embeddings:
            shapes["lm_head.weight"] = (self.padded_vocab_size, self.d_model)
        return shapes

    def parameter_count(self) -> int:
        return sum(math.prod(shape) for shape in self.parameter_shapes().values())

    def flops_per_token(self) -> int:
        """Forward and backward, without recompute: 3x forward, matmuls plus scan (9 N) and convolution.

        The scan term follows the count of state-spaces/mamba#110; against 6 * parameters it differs by < 1 %.
        """
        d, e, n, r = self.d_model, self.d_inner, self.d_state, self.resolved_dt_rank
        matmul = 3 * d * e + e * (r + 2 * n) + r * e
        per_layer = 6 * matmul + 3 * (9 * e * n + 2 * e * self.d_conv)
        return self.n_layer * per_layer + 6 * d * self.padded_vocab_size


class DataConfig(_Group):
    """Where the tokens come from: a directory made by `mamba-train prepare`, Megatron files, or built-in text."""

    path: Path | None = Field(None, description="Prepared dataset directory, or the stem of Megatron .bin/.idx files.")
    builtin: Literal["python-stdlib"] | None = Field(None, description="Real text that is on every machine.")
    validation_path: Path | None = Field(
        None, description="Held-out Megatron files, which carry no split of their own."
    )
    seed: int = Field(0, ge=0, le=2**63 - 1, description="Seed of the training order.")

    @model_validator(mode="after")
    def _one_source(self) -> DataConfig:
        if self.path is not None and self.builtin is not None:
            raise ValueError("give either data.path or data.builtin, not both")
        return self


class Schedule(StrEnum):
    COSINE = "cosine"
    LINEAR = "linear"
    WSD = "wsd"


class TrainingConfig(_Group):
    """The optimisation problem. Nothing here may depend on the hardware: that is the plan's business."""

    sequence_length: int = Field(4_096, ge=1, le=2**20, description="Tokens a sequence is trained on.")
    global_batch_size: PositiveInt = Field(8, description="Sequences per optimizer step, over all GPUs.")
    micro_batch_size: PositiveInt | Auto = Field("auto", description="Sequences a GPU takes at once; auto: planned.")
    max_steps: PositiveInt = Field(200_000, description="Optimizer steps of the whole run.")
    learning_rate: float = Field(1e-4, gt=0, le=10, description="Peak, after warm-up.")
    min_learning_rate_ratio: float = Field(0.1, ge=0, le=1, description="Final over peak learning rate.")
    schedule: Schedule = Field(Schedule.COSINE, description="Decay after warm-up; wsd: constant, then a linear end.")
    warmup_steps: int = Field(100, ge=0, le=10**9, description="Steps of linear warm-up.")
    decay_fraction: float = Field(0.1, ge=0, le=1, description="Last part of the run in which WSD decays.")
    weight_decay: float = Field(0.1, ge=0, le=10, description="AdamW decay; none on norms, biases, A_log, D.")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW, first moment.")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW, second moment.")
    adam_epsilon: float = Field(1e-8, gt=0, le=1, description="AdamW, added to the denominator.")
    gradient_clipping: float = Field(1.0, ge=0, le=1e6, description="Largest global gradient norm; 0: no clipping.")
    seed: int = Field(0, ge=0, le=2**63 - 1, description="Seed of the initial weights.")
    recompute: PositiveInt | Literal["auto", "none", "all"] = Field(
        "auto", description="Activation recompute: none, all (every block), or k: one boundary every k blocks."
    )
    scan_backend: Literal["auto", "torch", "mamba_ssm"] = Field("auto", description="auto: the fastest that runs here.")
    eval_interval: int = Field(1_000, ge=0, le=10**9, description="Steps between evaluations; 0: only at the end.")
    eval_sequences: PositiveInt | None = Field(
        None, description="Held-out sequences an evaluation reads on the way; null: all."
    )
    max_nonfinite_steps: PositiveInt = Field(
        10, description="Steps in a row with a non-finite loss or gradient after which the run ends with exit 71."
    )

    @model_validator(mode="after")
    def _warmup_fits(self) -> TrainingConfig:
        if self.warmup_steps > self.max_steps:
            raise ValueError(
                f"warmup_steps ({self.warmup_steps}) is larger than max_steps ({self.max_steps}): lower one of them"
            )
        return self


class ParallelismConfig(_Group):
    """How the ranks share the work. `auto` is resolved by the plan, never by the ranks."""

    num_gpus: int = Field(1, ge=1, le=65_536, description="Ranks in all; CPU processes where there is no GPU.")
    zero_stage: Literal[0, 1, 2, 3] | Auto = Field(
        "auto", description="What the ranks share: 0 nothing, 1 optimizer, 2 and gradients, 3 and weights."
    )
    offload_optimizer: Device | Auto = Field("auto", description="cpu: masters and moments in host memory.")
    offload_parameters: Device | Auto = Field("auto", description="cpu: weights in host memory; ZeRO-3 only.")
    precision: Precision | Auto = Field("auto", description="Of weights and activations; auto: bf16, fp32 on CPUs.")
    master_dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="bf16: 16-bit master weights and Adam moments. Changes arithmetic, so never automatic."
    )

    @model_validator(mode="after")
    def _modes_exist(self) -> ParallelismConfig:
        stage = self.zero_stage
        if self.offload_parameters is Device.CPU and stage not in (3, "auto"):
            raise ValueError(f"offload_parameters needs ZeRO stage 3, not {stage}: only stage 3 partitions parameters")
        if self.offload_optimizer is Device.CPU and stage == 0:
            raise ValueError("offload_optimizer needs ZeRO stage 1, 2 or 3: stage 0 keeps the optimizer on the GPU")
        if self.master_dtype == "bf16" and (stage == 0 or self.precision not in (Precision.BF16, "auto")):
            raise ValueError("master_dtype bf16 needs precision bf16 and ZeRO stage 1, 2 or 3")
        return self


class CheckpointConfig(_Group):
    directory: Path = Field(Path("checkpoints"), description="Where checkpoints go.")
    interval: int = Field(
        1_000, ge=0, le=10**9, description="Steps between checkpoints; 0: only at the end and on a stop."
    )
    keep: int = Field(3, ge=1, le=10_000, description="Verified checkpoints that stay.")
    initial_weights: Path | None = Field(None, description="Directory made by `mamba-train import` to start from.")
    load: str = Field("auto", description="auto: the newest that verifies; none: start afresh; or the path of one.")
    save_final: bool = Field(True, description="Whether the end of the run is saved as `final/`.")


class ReportingConfig(_Group):
    log_interval: PositiveInt = Field(1, description="Steps between progress lines.")
    jsonl: Path | None = Field(None, description="File that gets one JSON object per logged step.")
    status_port: int | None = Field(None, ge=1, le=65_535, description="Port of /status and /metrics; null: off.")
    profile_steps: int = Field(0, ge=0, le=1_000, description="Steps traced with torch.profiler, from the third on.")


class TrainerConfig(_Group):
    """One training run, complete."""

    preset: str | None = Field(None, description="Named settings that everything else is laid over.")
    model: ModelConfig
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    parallelism: ParallelismConfig = ParallelismConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    reporting: ReportingConfig = ReportingConfig()
    deepspeed: dict[str, Any] = Field(
        default_factory=dict, description="DeepSpeed keys merged over the generated ones."
    )

    @model_validator(mode="before")
    @classmethod
    def _read(cls, raw: Any) -> Any:
        if not isinstance(raw, Mapping):
            return raw
        return translate_guide_keys(refuse_future_modes(raw))

    @model_validator(mode="after")
    def _batch_divides(self) -> TrainerConfig:
        ranks, batch, micro = (
            self.parallelism.num_gpus, self.training.global_batch_size, self.training.micro_batch_size,
        )  # fmt: skip
        per_round = ranks * (1 if micro == "auto" else micro)
        if batch % per_round:
            below = batch // per_round * per_round
            nearest = f"{below} or {below + per_round}" if below else f"{per_round}"
            raise ValueError(
                f"global_batch_size {batch} cannot be split over {ranks} ranks"
                + ("" if micro == "auto" else f" with micro-batches of {micro}")
                + f": use {nearest}"
            )
        return self

    @property
    def tokens_per_step(self) -> int:
        return self.training.global_batch_size * self.training.sequence_length

    def fingerprint(self) -> str:
        """Identity of the optimisation problem: what must agree between a checkpoint and the run that resumes it.

        Hardware, paths and reporting are left out, so that a run may move between machines.
        """
        problem = {
            "model": self.model.model_dump(mode="json"),
            "training": self.training.model_dump(
                mode="json",
                exclude={
                    "micro_batch_size",
                    "recompute",
                    "scan_backend",
                    "eval_interval",
                    "eval_sequences",
                    "max_nonfinite_steps",
                },
            ),
            "data_seed": self.data.seed,
        }
        return hashlib.sha256(json.dumps(problem, sort_keys=True).encode()).hexdigest()


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, mapping by mapping; neither is changed."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


#: Options that say the same in two ways: giving one of a pair takes the other from what it is laid on.
_RIVALS = {
    "data": (({"path"}, {"builtin"}),),
    "training": (({"global_batch_size"}, {"gradient_accumulation_steps"}),),
}


def lay_over(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`merge`, where an option of `over` also removes its rivals from `base` (a preset's `builtin`, for one).

    The guide's name of an option and ours are the same option.
    """
    cleaned, over = rename_guide_keys(base), rename_guide_keys(over)
    for group, pairs in _RIVALS.items():
        given, under = over.get(group), cleaned.get(group)
        if not isinstance(given, Mapping) or not isinstance(under, dict):
            continue
        for one, other in pairs:
            for mine, theirs in ((one, other), (other, one)):
                if mine & given.keys():
                    for key in theirs:
                        under.pop(key, None)
    return merge(cleaned, over)


def parse_config(raw: Mapping[str, Any]) -> TrainerConfig:
    """A validated configuration from plain data; a preset it names is filled in underneath.

    Raises:
        UserError: naming each wrong key, its value and what is expected.
    """
    name = raw.get("preset")
    base = presets.get(name) if isinstance(name, str) else {}
    try:
        return TrainerConfig.model_validate(_with_shorter_warmup(lay_over(base, raw), raw))
    except ValidationError as error:
        raise UserError(_explain(error)) from None


def _with_shorter_warmup(merged: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A preset's warm-up is for its own length: a run cut to a few steps takes a tenth of them instead."""
    chosen, training = given.get("training"), merged.get("training")
    if isinstance(chosen, Mapping) and "warmup_steps" not in chosen and isinstance(training, Mapping):
        steps, warmup = training.get("max_steps"), training.get("warmup_steps")
        if isinstance(steps, int) and isinstance(warmup, int) and 0 < steps < warmup:
            return merge(merged, {"training": {"warmup_steps": steps // 10}})
    return merged


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping a YAML file holds.

    Raises:
        UserError: the file is missing, is no YAML (with the line), or holds no mapping.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"Cannot read the configuration {path}: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold a mapping (`model:`, `training:` ...), not {type(raw).__name__}.")
    return raw


def _explain(error: ValidationError) -> str:
    lines = ["The configuration is not valid:"]
    for item in error.errors():
        where = _place(item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"  {where}: unknown option")
            continue
        message = item["msg"].removeprefix("Value error, ")
        given = "" if isinstance(item["input"], (dict, BaseModel)) else f" (given: {item['input']!r})"
        lines.append(f"  {where}: {message}{given}")
    return "\n".join(dict.fromkeys(lines))


def _place(location: tuple[int | str, ...]) -> str:
    """Of an option that takes several types, pydantic adds the type it tried: `literal['auto']`, `constrained-int`."""
    parts = [str(part) for part in location]
    return ".".join(p for p in parts if "[" not in p and not p.startswith("constrained-")) or "configuration"
