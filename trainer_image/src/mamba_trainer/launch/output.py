"""What ranks print: passed on as it comes, with the last lines kept for the termination message.

A thread for each rank reads its pipe, so that a blocked terminal holds up the output and never the launcher.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from typing import IO

_KEPT_LINES = 100
_KEPT_LINE_CHARS = 500
_STDERR = 2


class RankOutput:
    """The pipe of one rank. With a prefix whole lines are passed on, without one every byte as it comes."""

    def __init__(self, pipe: IO[bytes], prefix: str) -> None:
        self._pipe = pipe
        self._prefix = prefix.encode()
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._thread = threading.Thread(target=self._pump, name=f"output {prefix}", daemon=True)
        self._thread.start()

    def last_lines(self) -> str:
        return "\n".join(self._lines)

    def drain(self, seconds: float) -> None:
        """Wait for what the rank left in the pipe; bounded, as a stray child may still hold it open."""
        self._thread.join(seconds)

    def _pump(self) -> None:
        rest = b""
        with self._pipe:
            while chunk := os.read(self._pipe.fileno(), 65536):
                if not self._prefix:
                    write_stderr(chunk)
                *lines, rest = (rest + chunk).split(b"\n")
                self._take(lines)
        self._take([rest] if rest else [])

    def _take(self, lines: list[bytes]) -> None:
        # A progress bar redraws one line many times; what it showed last is enough.
        self._lines.extend(
            line.rsplit(b"\r", 1)[-1].decode(errors="replace")[:_KEPT_LINE_CHARS] for line in map(_unreturned, lines)
        )
        if self._prefix:
            write_stderr(b"".join(self._prefix + line + b"\n" for line in lines))


def _unreturned(line: bytes) -> bytes:
    return line.rstrip(b"\r")


def say(text: str) -> None:
    """One line from the launcher to the person who watches."""
    write_stderr(f"launcher: {text}\n".encode())


def write_stderr(data: bytes) -> None:
    # A reader that went away (`| head`, a closed terminal) must not end training.
    try:
        sys.stderr.flush()
        while data:
            data = data[os.write(_STDERR, data) :]
    except OSError:
        return
