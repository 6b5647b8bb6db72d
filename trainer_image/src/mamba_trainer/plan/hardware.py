"""Looks at the machine at hand. The only module of `plan` that reads anything outside the process.

GPUs are read through NVML where nvidia-ml-py is installed: it says what is free now and creates no CUDA
context, which would hold half a gigabyte of every GPU for as long as the launcher lives. PyTorch is the
second choice, and never asked for free memory, because that would create one."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from mamba_trainer.config import Precision
from mamba_trainer.plan import cards
from mamba_trainer.plan.schema import ALL_PRECISIONS, Hardware

#: Share of a card's total that is free on an idle one, where only the total is known.
_FREE_OF_TOTAL = 0.985

_CGROUP = Path("/sys/fs/cgroup")


class _Gpu(NamedTuple):
    name: str
    usable_bytes: int
    #: (major, minor) compute capability.
    capability: tuple[int, int]


def detect(checkpoint_directory: Path, nodes: int = 1) -> Hardware:
    """The machine at hand; `nodes` alike it. Of unequal GPUs the one with the least free memory counts."""
    gpus = _nvml_gpus() if importlib.util.find_spec("pynvml") else None
    if gpus is None:
        gpus = _torch_gpus()
    machine = Hardware(
        gpus=0,
        nodes=nodes,
        host_bytes=_host_bytes(),
        disk_bytes=free_disk(checkpoint_directory),
        cpu_count=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        precisions=_cpu_precisions() if not gpus else ALL_PRECISIONS,
        fused_scan=False,
    )
    return machine.model_copy(update=_gpu_facts(gpus)) if gpus else machine


def _gpu_facts(gpus: list[_Gpu]) -> dict[str, Any]:
    smallest = min(gpus, key=lambda gpu: gpu.usable_bytes)
    card = cards.from_product_name(smallest.name)
    old = min(gpu.capability for gpu in gpus) < (8, 0)
    kernels = ("selective_scan_cuda", "causal_conv1d_cuda")
    return {
        "gpus": len(gpus),
        "name": card.name if card else smallest.name,
        "gpu_bytes": smallest.usable_bytes,
        "peak_flops": card.peak_flops if card else None,
        "memory_bandwidth": card.bandwidth if card else None,
        "precisions": (Precision.FP16, Precision.FP32) if old else ALL_PRECISIONS,
        "fused_scan": all(importlib.util.find_spec(kernel) for kernel in kernels),
    }


def _nvml_gpus() -> list[_Gpu] | None:
    """GPUs that CUDA would show us, or None where NVML cannot answer."""
    pynvml = importlib.import_module("pynvml")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return [_read_nvml(pynvml, handle) for handle in _visible_handles(pynvml)]
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def _visible_handles(pynvml: Any) -> list[Any]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    handles = []
    for entry in filter(None, (part.strip() for part in visible.split(","))):
        if entry.isdigit():
            handles.append(pynvml.nvmlDeviceGetHandleByIndex(int(entry)))
        elif entry.startswith(("GPU-", "MIG-")):
            handles.append(pynvml.nvmlDeviceGetHandleByUUID(entry))
        else:
            break  # as CUDA does: an invalid entry hides itself and all after it
    return handles


def _read_nvml(pynvml: Any, handle: Any) -> _Gpu:
    name = pynvml.nvmlDeviceGetName(handle)
    return _Gpu(
        name=name if isinstance(name, str) else name.decode(),
        usable_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).free),
        capability=tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
    )


def _torch_gpus() -> list[_Gpu]:
    if importlib.util.find_spec("torch") is None:
        return []
    torch = importlib.import_module("torch")
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        usable = int(_FREE_OF_TOTAL * properties.total_memory)
        gpus.append(_Gpu(properties.name, usable, (properties.major, properties.minor)))
    return gpus


def _cpu_precisions() -> tuple[Precision, ...]:
    """fp16 only where this CPU's kernels have it, which is what DeepSpeed asks as well."""
    if importlib.util.find_spec("torch") is None:
        return ALL_PRECISIONS
    torch = importlib.import_module("torch")
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", None)
    return ALL_PRECISIONS if supported is not None and supported() else (Precision.BF16, Precision.FP32)


def _host_bytes() -> int | None:
    """Memory that we could take now: what Linux calls available, within the limit of our container."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    fields = {key: value for key, _, value in (line.partition(":") for line in lines)}
    available = fields.get("MemAvailable")
    if available is None:
        return None
    limits = [int(available.split()[0]) * 1024, _left_in_container()]
    return min(limit for limit in limits if limit is not None)


def _left_in_container() -> int | None:
    """Limit less working set, as the kubelet counts it (cgroup v2); None: no limit."""
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        if limit == "max":
            return None
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
        return max(0, int(limit) - used + int(stat["inactive_file"]))
    except (OSError, ValueError, KeyError):
        return None


def free_disk(directory: Path) -> int | None:
    """Free space where `directory` is or will be made."""
    directory = directory.absolute()
    existing = next((path for path in (directory, *directory.parents) if path.exists()), None)
    return shutil.disk_usage(existing).free if existing else None
