from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mamba_trainer.config import Schedule, TrainingConfig
from mamba_trainer.schedule import learning_rate


def rates(**options: Any) -> list[float]:
    options = {
        "max_steps": 100,
        "warmup_steps": 10,
        "learning_rate": 1.0,
        "min_learning_rate_ratio": 0.1,
    } | options
    training = TrainingConfig.model_validate(options)
    return [learning_rate(step, training) for step in range(training.max_steps + 1)]


@pytest.mark.parametrize("schedule", Schedule)
def test_warm_up_is_a_line_to_the_peak_and_the_end_is_the_minimum(schedule: Schedule) -> None:
    got = rates(schedule=schedule)
    assert got[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert got[10] == pytest.approx(1.0)
    assert got[100] == pytest.approx(0.1)


def test_half_way_is_half_the_drop_for_cosine_and_linear() -> None:
    assert rates(schedule="cosine")[55] == pytest.approx(0.55)
    assert rates(schedule="linear")[55] == pytest.approx(0.55)
    assert rates(schedule="cosine")[32] > rates(schedule="linear")[32]


def test_wsd_stays_at_the_peak_until_its_last_part() -> None:
    got = rates(schedule="wsd", decay_fraction=0.5)
    assert got[10:56] == pytest.approx([1.0] * 46)
    assert got[78] == pytest.approx(0.54)
    assert rates(schedule="wsd", decay_fraction=0)[100] == 1.0


@given(
    schedule=st.sampled_from(Schedule),
    max_steps=st.integers(1, 60),
    warmup=st.integers(0, 60),
    ratio=st.floats(0, 1),
    decay=st.floats(0, 1),
)
def test_a_rate_rises_only_in_the_warm_up_and_stays_within_bounds(
    schedule: Schedule, max_steps: int, warmup: int, ratio: float, decay: float
) -> None:
    warmup = min(warmup, max_steps)
    got = rates(
        schedule=schedule,
        max_steps=max_steps,
        warmup_steps=warmup,
        min_learning_rate_ratio=ratio,
        decay_fraction=decay,
    )
    assert all(0 <= rate <= 1 for rate in got)
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(got[warmup:]))
