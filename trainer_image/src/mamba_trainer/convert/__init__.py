"""Weights in and out: training checkpoints and our own folders, Hugging Face's `MambaForCausalLM`, mamba_ssm.

Every way is exact: the same numbers under other names. An `ours` folder holds `config.json` and
`model.safetensors` (or shards of it) and is what `checkpoint.initial_weights` and generation read.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from mamba_trainer.checkpoint.commit import candidates
from mamba_trainer.config import ModelConfig, Precision
from mamba_trainer.contract import UserError
from mamba_trainer.convert import formats
from mamba_trainer.convert.formats import Format
from mamba_trainer.convert.training_checkpoint import is_training_checkpoint, open_training_checkpoint
from mamba_trainer.convert.weights import Weights, open_folder, write_bin, write_safetensors

__all__ = ["Format", "export", "import_", "open_model"]

_DTYPES = {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}


def export(source: Path, out: Path, format: str, dtype: str = Precision.FP32, tokenizer: Path | None = None) -> None:
    """Writes the model of a training checkpoint, or of a folder in any format, as the new folder `out`.

    Args:
        format: one of `Format`.
        dtype: one of `Precision`, the type of the written tensors; fp32 is exact.
        tokenizer: a `tokenizer.json` to put beside the weights.

    Raises:
        UserError: no model that can be read, a format that cannot express it, or `out` is in use.
    """
    if format not in list(Format):
        raise UserError(f"There is no format {format!r}: choose one of {', '.join(Format)}.")
    if dtype not in list(Precision):
        raise UserError(f"There is no dtype {dtype!r}: choose one of {', '.join(Precision)}.")
    if tokenizer is not None and not tokenizer.is_file():
        raise UserError(f"There is no tokenizer file {tokenizer}.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty: name a new folder.")
    config, weights = open_model(source)
    _write(config, weights, out, Format(format), _DTYPES[Precision(dtype)], tokenizer)


def import_(source: Path, out: Path) -> None:
    """Writes a model of any format as an `ours` folder in fp32, with its tokenizer if there is one.

    Raises:
        UserError: see `export`.
    """
    tokenizer = source / "tokenizer.json"
    export(source, out, Format.OURS, tokenizer=tokenizer if tokenizer.is_file() else None)


def open_model(source: Path) -> tuple[ModelConfig, Weights]:
    """Shape and weights, under our names, of a training checkpoint or of a folder in any format.

    Raises:
        UserError: `source` is neither, does not verify, or tensors do not fit its configuration.
    """
    if not source.is_dir():
        raise UserError(f"There is no folder {source}: name a checkpoint (step_N, final) or a folder of weights.")
    if is_training_checkpoint(source):
        config, weights = open_training_checkpoint(source)
    elif inside := candidates(source):
        raise UserError(f"{source} holds checkpoints, and is none itself: name one of them, for example {inside[0]}.")
    else:
        config = formats.read_config(_read_json(source / "config.json"))
        weights = open_folder(source).renamed(formats.our_name)
    return config, weights.only(config.parameter_shapes())


def _write(
    config: ModelConfig, weights: Weights, out: Path, to: Format, dtype: torch.dtype, tokenizer: Path | None
) -> None:
    written = formats.write_config(config, to, str(dtype).removeprefix("torch."))
    theirs = weights.renamed(lambda name: formats.their_name(name, to))
    # Written beside and renamed when complete: a folder that exists is a folder that can be loaded.
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"Cannot write to {out}: {error.strerror}. Name another folder.") from None
    if to is Format.MAMBA_SSM:
        write_bin(partial, theirs, dtype, formats.aliases(config, to))
    else:
        write_safetensors(partial, theirs, dtype)
    (partial / "config.json").write_text(json.dumps(written, indent=1), encoding="utf-8")
    if tokenizer is not None:
        shutil.copyfile(tokenizer, partial / "tokenizer.json")
    partial.replace(out)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}. A folder of weights needs its config.json.") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold a JSON object.")
    return raw
