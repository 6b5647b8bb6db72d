"""The training order: which sample comes when, as a pure function of a position.

The whole state of the data is one integer, the number of samples consumed since the start. Each epoch is
another permutation of all samples, computed and never stored: a Feistel network is a bijection on a power of
two, and walking its cycles until the value falls below `num_samples` makes it one on any number (Black and
Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). So a run may stop anywhere and go on with another
number of ranks: no sample is repeated or missed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class SampleOrder:
    num_samples: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError("an order needs at least one sample")

    def sample_at(self, position: int) -> int:
        return int(self.samples_at(np.array([position]))[0])

    def samples_at(self, positions: Ids) -> Ids:
        epochs, places = np.divmod(positions.astype(np.int64), self.num_samples)
        samples = np.empty_like(places)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            samples[inside] = _permute(places[inside], self.num_samples, _round_keys(self.seed, int(epoch)))
        return samples

    def batch_for(self, position: int, global_batch: int, rank: int = 0, world_size: int = 1) -> Ids:
        """This rank's contiguous share of the global batch that starts at `position`."""
        if global_batch % world_size:
            raise ValueError(f"a global batch of {global_batch} cannot be shared by {world_size} ranks")
        share = global_batch // world_size
        first = position + rank * share
        return self.samples_at(np.arange(first, first + share, dtype=np.int64))


def _round_keys(seed: int, epoch: int) -> NDArray[np.uint64]:
    digest = hashlib.blake2b(f"{seed}:{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _permute(values: Ids, size: int, keys: NDArray[np.uint64]) -> Ids:
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    permuted = _feistel(values.astype(np.uint64), half_bits, keys)
    # The domain is less than four times `size`, so a value needs fewer than four steps on average.
    while (outside := permuted >= size).any():
        permuted[outside] = _feistel(permuted[outside], half_bits, keys)
    return permuted.astype(np.int64)


def _feistel(values: NDArray[np.uint64], half_bits: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    bits = np.uint64(half_bits)
    mask = np.uint64((1 << half_bits) - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << bits) | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: every input bit moves every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
