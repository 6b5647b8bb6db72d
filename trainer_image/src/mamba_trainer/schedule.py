"""Learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from mamba_trainer.config import Schedule, TrainingConfig


def learning_rate(step: int, training: TrainingConfig) -> float:
    """The rate of optimizer step `step` (from 0): linear warm-up, then the schedule down to the minimum."""
    peak, floor = training.learning_rate, training.learning_rate * training.min_learning_rate_ratio
    if step < training.warmup_steps:
        return peak * (step + 1) / training.warmup_steps
    remaining = max(1, training.max_steps - training.warmup_steps)
    progress = min(1.0, (step - training.warmup_steps) / remaining)
    match training.schedule:
        case Schedule.COSINE:
            return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))
        case Schedule.LINEAR:
            return peak + (floor - peak) * progress
        case Schedule.WSD:
            decay = training.decay_fraction
            return floor + (peak - floor) * min(1.0, (1 - progress) / decay) if decay else peak
