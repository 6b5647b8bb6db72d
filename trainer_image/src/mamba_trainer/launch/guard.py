"""Kills the ranks of a launcher that died without a word (SIGKILL, the kernel's out-of-memory killer).

A process of its own that the launcher starts first, as nothing else can act after SIGKILL: it reads `+pid`
and `-pid` lines from the launcher and, when the pipe closes, kills the process groups still listed. A
parent-death signal would reach the ranks but not the processes that they started. Run as a bare script: it
imports nothing of this package, so it starts at once and stays small.
"""

from __future__ import annotations

import os
import signal
import sys

_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> None:
    # `systemctl stop` signals a whole control group; the guard's part begins when the launcher is gone.
    for signum in _IGNORED:
        signal.signal(signum, signal.SIG_IGN)
    groups: set[int] = set()
    for line in sys.stdin:
        act = groups.add if line[0] == "+" else groups.discard
        act(int(line[1:]))
    for group in groups:
        try:
            os.killpg(group, signal.SIGKILL)
        except ProcessLookupError:
            continue


if __name__ == "__main__":
    main()
