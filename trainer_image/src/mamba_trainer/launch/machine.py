"""What the kernel says about this machine or container: processors to use, out-of-memory kills so far."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Cores of the affinity mask, less if the control group has a quota: a pod sees all cores of its node."""
    cores = len(os.sched_getaffinity(0))
    quota, _, period = _read(_control_group() / "cpu.max").strip().partition(" ")
    return max(1, min(cores, int(quota) // int(period))) if quota.isdecimal() else cores


def out_of_memory_kills() -> int:
    """A counter that rises when the kernel kills for memory, in our control group or else on the machine."""
    text = _read(_control_group() / "memory.events") or _read(Path("/proc/vmstat"))
    return sum(int(line.split()[1]) for line in text.splitlines() if line.split()[0] == "oom_kill")


def _control_group() -> Path:
    unified = [line[3:] for line in _read(Path("/proc/self/cgroup")).splitlines() if line.startswith("0::")]
    return _CGROUPS / (unified[0].strip("/") if unified else "")


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
