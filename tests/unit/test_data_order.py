"""The training order: every sample once per epoch, wherever a run stops and however many ranks go on."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_trainer.data.order import SampleOrder

sizes = st.integers(1, 3_000)
seeds = st.integers(0, 2**63 - 1)
world_sizes = st.sampled_from([1, 2, 3, 4, 6, 8])

#: Divisible by every world size above.
GLOBAL_BATCH = 24


def epoch(order: SampleOrder, number: int) -> np.ndarray:
    start = number * order.num_samples
    return order.samples_at(np.arange(start, start + order.num_samples))


@given(sizes, seeds, st.integers(0, 1_000))
def test_every_epoch_visits_every_sample_exactly_once(num_samples, seed, number):
    visited = epoch(SampleOrder(num_samples, seed), number)
    assert np.array_equal(np.sort(visited), np.arange(num_samples))


@given(sizes, seeds, st.integers(0, 10**9), st.lists(world_sizes, min_size=1, max_size=5))
def test_a_run_resumed_with_other_world_sizes_goes_on_with_the_same_global_batches(num_samples, seed, position, worlds):
    uninterrupted = SampleOrder(num_samples, seed).samples_at(
        np.arange(position, position + GLOBAL_BATCH * len(worlds))
    )
    resumed = []
    for world_size in worlds:
        order = SampleOrder(num_samples, seed)  # nothing but the position survives a restart
        shares = [order.batch_for(position, GLOBAL_BATCH, rank, world_size) for rank in range(world_size)]
        assert {len(share) for share in shares} == {GLOBAL_BATCH // world_size}
        resumed += shares
        position += GLOBAL_BATCH
    assert np.array_equal(np.concatenate(resumed), uninterrupted)


@given(sizes, seeds, st.integers(0, 10**12))
def test_one_position_and_many_positions_agree(num_samples, seed, position):
    order = SampleOrder(num_samples, seed)
    assert order.sample_at(position) == order.samples_at(np.array([position]))[0]
    assert 0 <= order.sample_at(position) < num_samples


@settings(max_examples=25)
@given(st.integers(200, 3_000), seeds)
def test_epochs_and_seeds_differ_and_samples_are_spread_evenly(num_samples, seed):
    order = SampleOrder(num_samples, seed)
    first, second, other = epoch(order, 0), epoch(order, 1), epoch(SampleOrder(num_samples, seed + 1), 0)
    for one, another in ((first, second), (first, other), (first, np.arange(num_samples))):
        # Two independent permutations agree at one place on average.
        assert (one == another).sum() < 15
    # Rank correlation of an independent permutation has a standard deviation of 1 / sqrt(n).
    assert abs(np.corrcoef(first, np.arange(num_samples))[0, 1]) < 6 / np.sqrt(num_samples)


def test_every_order_of_four_samples_occurs_about_equally_often():
    epochs = [tuple(epoch(SampleOrder(4, 0), number)) for number in range(2_400)]
    orders, counts = np.unique(epochs, axis=0, return_counts=True)
    assert len(orders) == 24
    assert counts.min() > 40
    assert counts.max() < 180


def test_the_order_is_the_same_on_every_machine_and_in_every_version():
    """Resumed runs depend on it: a change here repeats and misses samples of runs under way."""
    positions = np.array([0, 1, 2, 999, 1_000, 10**12])
    assert SampleOrder(1_000, 7).samples_at(positions).tolist() == [957, 941, 267, 954, 620, 903]


def test_a_hundred_billion_samples_need_no_memory():
    order = SampleOrder(10**11, 3)
    ids = order.batch_for(5 * 10**11 - 4, 8)
    assert len(set(ids)) == 8
    assert max(ids) > 2**32


def test_a_batch_that_ranks_cannot_share_equally_is_refused():
    with pytest.raises(ValueError, match="cannot be shared by 3 ranks"):
        SampleOrder(10, 0).batch_for(0, 8, 0, 3)
