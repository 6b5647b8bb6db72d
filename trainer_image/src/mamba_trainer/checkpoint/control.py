"""How ranks agree: over the host (gloo), with the timeout of the group, never by each looking at the disk.

Two ranks that decide by what they see may decide differently and then wait for each other for ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from mamba_trainer.contract import PeerLost, TrainerError

T = TypeVar("T")


class Control:
    """Agreement among all ranks of `group`."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in rank order, on every rank. Nobody passes before everybody came."""
        values: list[Any] = [None] * self.world_size
        self._collective(lambda: dist.all_gather_object(values, value, group=self._group))
        return values

    def on_rank_zero(self, function: Callable[[], T]) -> T:
        """Runs `function` on rank 0 alone; every rank returns its value or raises its error."""
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = function()
            except (TrainerError, OSError) as error:
                outcome[1] = error
        self._collective(
            lambda: dist.broadcast_object_list(outcome, src=dist.get_global_rank(self._group, 0), group=self._group)
        )
        value, failure = outcome
        if failure is not None:
            raise failure
        result: T = value
        return result

    @staticmethod
    def _collective(call: Callable[[], object]) -> None:
        try:
            call()
        except RuntimeError as error:
            raise PeerLost(f"A rank was lost while the ranks agreed on a checkpoint: {error}") from error
