"""How a model's shape and parameter names are written by us, by Hugging Face and by mamba_ssm.

Pure translation. Each format has a `config.json`; reading one refuses, with the reason, whatever our model
would silently compute differently. The tensors are the same in all three: only the embedding has two names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any

from pydantic import ValidationError

from mamba_trainer.config import ModelConfig
from mamba_trainer.contract import UserError


class Format(StrEnum):
    OURS = "ours"
    HF = "hf"
    MAMBA_SSM = "mamba_ssm"


#: The key of our own `config.json` under which the `ModelConfig` stands.
OUR_KEY = "mamba_trainer"

_EMBEDDING, _HF_EMBEDDING = "backbone.embedding.weight", "backbone.embeddings.weight"
_HEAD = "lm_head.weight"

#: mamba_ssm has no field for the epsilon of its norms.
_MAMBA_SSM_EPSILON = 1e-5


def detect(raw: Mapping[str, Any]) -> Format:
    """Which format a `config.json` is of.

    Raises:
        UserError: none that holds a Mamba-1 model; names what was found.
    """
    if OUR_KEY in raw:
        return Format.OURS
    if raw.get("model_type") == "mamba":
        return Format.HF
    if "d_model" in raw and "n_layer" in raw:
        return Format.MAMBA_SSM
    kind = raw.get("model_type") or raw.get("architectures") or "no model_type"
    raise UserError(
        f"This is no Mamba-1 model: its config.json says {kind!r}. "
        "Needed is a model of type mamba (Hugging Face) or of mamba_ssm."
    )


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The shape that a `config.json` of any format describes.

    Raises:
        UserError: an option our model does not have, or a missing or illegal value.
    """
    readers: dict[Format, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
        Format.OURS: lambda config: dict(config[OUR_KEY]),
        Format.HF: _from_hf,
        Format.MAMBA_SSM: _from_mamba_ssm,
    }
    found = detect(raw)
    try:
        return ModelConfig.model_validate(readers[found](raw))
    except KeyError as error:
        raise UserError(f"The config.json of this {found} model has no {error}.") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or OUR_KEY
        raise UserError(f"The config.json of this {found} model is not valid: {where}: {first['msg']}") from None


def write_config(model: ModelConfig, to: Format, dtype: str) -> dict[str, Any]:
    """The `config.json` of `model`; `dtype` is the name of the stored type, such as `float32`.

    Raises:
        UserError: the format cannot express this model.
    """
    match to:
        case Format.OURS:
            return {OUR_KEY: model.model_dump(mode="json")}
        case Format.HF:
            return _to_hf(model, dtype)
        case Format.MAMBA_SSM:
            return _to_mamba_ssm(model)


def their_name(name: str, to: Format) -> str:
    """How `to` calls the parameter that we call `name`."""
    return _HF_EMBEDDING if to is Format.HF and name == _EMBEDDING else name


def our_name(name: str) -> str:
    return _EMBEDDING if name == _HF_EMBEDDING else name


def aliases(model: ModelConfig, to: Format) -> dict[str, str]:
    """Further names under which a file of `to` must hold a tensor: new name -> our name.

    mamba_ssm loads strictly and its state dict lists a tied head; Hugging Face ties it again while loading.
    """
    return {_HEAD: _EMBEDDING} if model.tie_embeddings and to is Format.MAMBA_SSM else {}


def _from_hf(raw: Mapping[str, Any]) -> dict[str, Any]:
    expand, width = raw.get("expand", 2), raw["hidden_size"]
    inner = raw.get("intermediate_size", expand * width)
    _refuse(
        {
            "use_bias: true": raw.get("use_bias", False),
            "use_conv_bias: false": not raw.get("use_conv_bias", True),
            f"hidden_act: {raw.get('hidden_act')}": raw.get("hidden_act", "silu") not in ("silu", "swish"),
            f"intermediate_size {inner}, which is not expand x hidden_size": inner != expand * width,
        }
    )
    return {
        "d_model": width,
        "n_layer": raw["num_hidden_layers"],
        "vocab_size": raw.get("unpadded_vocab_size", raw["vocab_size"]),
        "pad_vocab_size_multiple": raw.get("pad_vocab_size_multiple", 1),
        "d_state": raw.get("state_size", 16),
        "d_conv": raw.get("conv_kernel", 4),
        "expand": expand,
        "dt_rank": _rank(raw.get("time_step_rank", "auto"), width),
        "tie_embeddings": raw.get("tie_word_embeddings", True),
        "norm_epsilon": raw.get("layer_norm_epsilon", 1e-5),
        "residual_in_fp32": raw.get("residual_in_fp32", True),
    }


def _to_hf(model: ModelConfig, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "vocab_size": model.padded_vocab_size,
        "hidden_size": model.d_model,
        "num_hidden_layers": model.n_layer,
        "state_size": model.d_state,
        "conv_kernel": model.d_conv,
        "expand": model.expand,
        "intermediate_size": model.d_inner,
        "time_step_rank": model.resolved_dt_rank,
        "layer_norm_epsilon": model.norm_epsilon,
        "residual_in_fp32": model.residual_in_fp32,
        "tie_word_embeddings": model.tie_embeddings,
        "use_bias": False,
        "use_conv_bias": True,
        "hidden_act": "silu",
        # Which token ends a text is the tokenizer's business; the class's default would be token 0.
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": dtype,
        # Not Hugging Face's: they let an import find the tokenizer's vocabulary again.
        "unpadded_vocab_size": model.vocab_size,
        "pad_vocab_size_multiple": model.pad_vocab_size_multiple,
    }


#: Options of mamba_ssm's mixer that concern initialisation or speed, not what the weights compute.
_IGNORED_SSM = {"dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "use_fast_path"}
_SHAPE_SSM = {"d_state", "d_conv", "expand", "dt_rank"}


def _from_mamba_ssm(raw: Mapping[str, Any]) -> dict[str, Any]:
    ssm = dict(raw.get("ssm_cfg") or {})
    layer = ssm.pop("layer", "Mamba1")
    unknown = ssm.keys() - _IGNORED_SSM - _SHAPE_SSM - {"bias", "conv_bias"}
    _refuse(
        {
            f"ssm_cfg.layer: {layer}": layer != "Mamba1",
            "attention layers (attn_layer_idx)": raw.get("attn_layer_idx"),
            "an MLP in each block (d_intermediate)": raw.get("d_intermediate"),
            "rms_norm: false": not raw.get("rms_norm", True),
            "ssm_cfg.bias: true": ssm.get("bias", False),
            "ssm_cfg.conv_bias: false": not ssm.get("conv_bias", True),
            f"ssm_cfg.{', '.join(sorted(unknown))}": unknown,
        }
    )
    return {
        "d_model": raw["d_model"],
        "n_layer": raw["n_layer"],
        "vocab_size": raw["vocab_size"],
        "pad_vocab_size_multiple": raw.get("pad_vocab_size_multiple", 8),
        "tie_embeddings": raw.get("tie_embeddings", True),
        "norm_epsilon": _MAMBA_SSM_EPSILON,
        "residual_in_fp32": raw.get("residual_in_fp32", True),
        **{key: ssm[key] for key in _SHAPE_SSM & ssm.keys()},
    }


def _to_mamba_ssm(model: ModelConfig) -> dict[str, Any]:
    if model.norm_epsilon != _MAMBA_SSM_EPSILON:
        raise UserError(
            f"mamba_ssm fixes the epsilon of its norms at {_MAMBA_SSM_EPSILON}; this model has "
            f"{model.norm_epsilon}: export it as hf instead."
        )
    return {
        "d_model": model.d_model,
        "d_intermediate": 0,
        "n_layer": model.n_layer,
        "vocab_size": model.vocab_size,
        "ssm_cfg": {
            "d_state": model.d_state,
            "d_conv": model.d_conv,
            "expand": model.expand,
            "dt_rank": model.dt_rank,
        },
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": model.residual_in_fp32,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": model.pad_vocab_size_multiple,
        "tie_embeddings": model.tie_embeddings,
    }


def _rank(rank: Any, width: int) -> Any:
    """`auto` where it is the usual one, so that a model keeps its configuration on the way out and back."""
    return "auto" if rank == math.ceil(width / 16) else rank


def _refuse(found: Mapping[str, Any]) -> None:
    """Raises for each option whose value is true."""
    unsupported = [name for name, present in found.items() if present]
    if unsupported:
        raise UserError(
            f"This model cannot be imported, as our Mamba-1 has no counterpart of {'; '.join(unsupported)}."
        )
