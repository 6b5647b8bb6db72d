"""A request to stop, as a signal handler leaves it. Free of torch: it must be in place before torch is imported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class StopRequest:
    """Set by a signal on any rank; read by the loop at the end of a step.

    Until the first step there is nothing to save, and building or loading may take minutes: `leave` ends the rank.
    """

    def __init__(self, leave: Callable[[], object] = lambda: None) -> None:
        self.requested = False
        self._leave = leave
        self._training = False

    def __call__(self, *_: Any) -> None:
        self.requested = True
        if not self._training:
            self._leave()

    def training_begins(self) -> None:
        self._training = True
