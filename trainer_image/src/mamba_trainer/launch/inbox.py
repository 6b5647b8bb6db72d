"""Signals to the launcher, noted in a handler and answered by its loop."""

from __future__ import annotations

import os
import select
import signal
from types import FrameType

#: A closed terminal (SIGHUP) is a reason to save and stop, not to die.
_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class SignalInbox:
    """A context in which stop signals are noted and, like the end of a child, wake the loop."""

    def __init__(self) -> None:
        self._received: list[int] = []
        self._before: dict[int, object] = {}

    def __enter__(self) -> SignalInbox:
        self._read_end, self._write_end = os.pipe()
        for end in (self._read_end, self._write_end):
            os.set_blocking(end, False)
        self._wakeup_before = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._handle(signal.SIGCHLD, lambda signum, frame: None)
        for signum in _STOPS:
            # A shell that starts a job with `&` or `nohup` ignores signals for it on purpose.
            if signum == signal.SIGTERM or signal.getsignal(signum) is not signal.SIG_IGN:
                self._handle(signum, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._read_end)
        os.close(self._write_end)

    def wait(self, seconds: float) -> None:
        """Return after `seconds`, or as soon as a signal arrived."""
        if select.select([self._read_end], [], [], max(0.0, seconds))[0]:
            os.read(self._read_end, 4096)

    @property
    def stop_requested(self) -> bool:
        return bool(self._received)

    @property
    def interrupted(self) -> bool:
        """Ctrl-C came twice: end at once."""
        return self._received.count(signal.SIGINT) > 1

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self._received.append(signum)

    def _handle(self, signum: int, handler: object) -> None:
        before = signal.signal(signum, handler)  # type: ignore[arg-type]
        self._before[signum] = signal.SIG_DFL if before is None else before
