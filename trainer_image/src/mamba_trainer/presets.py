"""Named model sizes, with the training settings that go with them.

The 7b and 3b follow the guide's YAML (`configs/` holds the same as files, and a test keeps them equal). The 3b
and 1b have the shapes of the published mamba-2.8b and mamba-1.4b, so that their weights load.
"""

from __future__ import annotations

import difflib
from typing import Any

from mamba_trainer.contract import UserError

_PRESETS: dict[str, dict[str, Any]] = {
    "7b_mamba": {
        "model": {"d_model": 4864, "n_layer": 45},
        "training": {"sequence_length": 4096, "max_steps": 200_000, "learning_rate": 1e-4, "warmup_steps": 2_000},
    },
    "3b_mamba": {
        "model": {"d_model": 2560, "n_layer": 64},
        "training": {"sequence_length": 4096, "max_steps": 150_000, "learning_rate": 1.6e-4, "warmup_steps": 1_500},
    },
    "1b_mamba": {
        "model": {"d_model": 2048, "n_layer": 48},
        "training": {"sequence_length": 4096, "max_steps": 100_000, "learning_rate": 2e-4, "warmup_steps": 1_000},
    },
    "tiny": {
        "model": {"d_model": 128, "n_layer": 4, "vocab_size": 257, "d_state": 8},
        "data": {"builtin": "python-stdlib"},
        "training": {
            "sequence_length": 256,
            "global_batch_size": 8,
            "max_steps": 500,
            "learning_rate": 5e-3,
            "warmup_steps": 20,
            "eval_interval": 100,
            "eval_sequences": 64,
        },
        "reporting": {"log_interval": 10},
        "checkpoint": {"interval": 50},
    },
}

#: Sequences per GPU and optimizer step of the large presets: the guide's batch_size 1 x accumulation 8.
_GUIDE_ACCUMULATION = 8

for _name in ("7b_mamba", "3b_mamba", "1b_mamba"):
    _PRESETS[_name]["training"] |= {"micro_batch_size": "auto", "gradient_accumulation_steps": _GUIDE_ACCUMULATION}


def names() -> list[str]:
    return list(_PRESETS)


def get(name: str) -> dict[str, Any]:
    """The raw configuration of a preset, to be merged under the user's.

    Raises:
        UserError: there is no such preset; the message names the nearest and all that exist.
    """
    if name in _PRESETS:
        return _PRESETS[name]
    near = difflib.get_close_matches(name, _PRESETS, n=1, cutoff=0.3)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise UserError(f"There is no preset {name!r}.{hint} Presets: {', '.join(_PRESETS)}.")
