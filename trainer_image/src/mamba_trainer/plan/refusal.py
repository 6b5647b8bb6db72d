"""What to say when a job does not fit: the numbers, the term that is too big, and what would fit."""

from __future__ import annotations

from collections.abc import Iterator

from mamba_trainer.config import TrainerConfig
from mamba_trainer.contract import UserError
from mamba_trainer.plan import cards
from mamba_trainer.plan.choice import HEADROOM, Candidate, Search, host_fits, search
from mamba_trainer.plan.memory import Mode
from mamba_trainer.plan.schema import Hardware, HostTerm, gigabytes, recompute_words

_GPU_COUNTS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


def describe(mode: Mode) -> str:
    """As a user sets it: `zero_stage 3, offload_optimizer cpu, recompute every 3 blocks, micro-batch 1`."""
    parts = [f"zero_stage {mode.zero_stage}"]
    parts += ["offload_optimizer cpu"] if mode.offload_optimizer else []
    parts += ["offload_parameters cpu"] if mode.offload_parameters else []
    return ", ".join([*parts, recompute_words(mode.recompute_every), f"micro-batch {mode.micro_batch}"])


def refuse(config: TrainerConfig, hardware: Hardware, failed: Search) -> UserError:
    """The error for a search that found nothing."""
    nearest = min(failed.tried, key=lambda candidate: _excess(candidate, hardware))
    where = _where(config, hardware)
    lines = [f"{failed.job.elements / 1e9:.2f}B parameters do not fit on {where} (estimate)."]
    if len(failed.tried) > 1:
        lines.append(f"Of the {len(failed.tried)} modes that your settings allow, this one comes nearest:")
    lines += [f"  {describe(nearest.mode)}", *_numbers(nearest, hardware)]
    proposals = list(_proposals(config, hardware))
    if proposals:
        lines += ["What fits:", *(f"  - {text}" for text in proposals)]
    else:
        lines.append("No mode fits, on up to 128 GPUs of this kind or on any card we know: use a smaller model.")
    return UserError("\n".join(lines))


def _where(config: TrainerConfig, hardware: Hardware) -> str:
    count = config.parallelism.num_gpus
    if hardware.device == "cpu":
        return f"{count} CPU process{'es' if count > 1 else ''}"
    return f"{count} x {hardware.name}" + (f" ({gigabytes(hardware.gpu_bytes)} usable)" if hardware.gpu_bytes else "")


def _excess(candidate: Candidate, hardware: Hardware) -> float:
    """How far over its budgets a mode is; GPU memory first, for it is harder to add."""
    memory = candidate.footprint
    gpu = memory.gpu_total / hardware.gpu_bytes if hardware.gpu_bytes else 0.0
    host = memory.host_total / hardware.host_bytes if hardware.host_bytes else 0.0
    return max(gpu - 1, 0.0) * 10 + max(host - 1, 0.0)


def _numbers(candidate: Candidate, hardware: Hardware) -> Iterator[str]:
    memory = candidate.footprint
    if hardware.gpu_bytes is not None and memory.gpu_total > (1 - HEADROOM) * hardware.gpu_bytes:
        terms = sorted(memory.gpu.items(), key=lambda item: -item[1])
        listed = ", ".join(f"{term} {gigabytes(size)}" for term, size in terms[:5] if size)
        usable = gigabytes(hardware.gpu_bytes)
        yield f"  GPU: needs {gigabytes(memory.gpu_total)} of {usable}, at its peak in the {memory.phase}."
        if memory.gpu_total <= hardware.gpu_bytes:
            yield f"  That leaves less than the {HEADROOM:.0%} that an estimate must leave free."
        yield f"  Too big: {terms[0][0]}. Largest terms: {listed}."
    if not host_fits(memory, hardware) and hardware.host_bytes is not None:
        terms_host = sorted(memory.host.items(), key=lambda item: -item[1])
        listed = ", ".join(f"{term} {gigabytes(size)}" for term, size in terms_host if size)
        yield f"  Host: needs {gigabytes(memory.host_total)} of {gigabytes(hardware.host_bytes)} per node."
        yield f"  Too big: {_largest_of_host(memory.host, hardware)}. Terms: {listed}."


def _largest_of_host(host: dict[HostTerm, int], hardware: Hardware) -> str:
    largest = max(host, key=lambda term: host[term])
    return "weights, gradients and optimizer of each process" if hardware.device == "cpu" else largest


def _proposals(config: TrainerConfig, hardware: Hardware) -> Iterator[str]:
    """Nearest settings that fit, each of them searched for and found."""
    free = _without_wishes(config)
    if (found := search(free, hardware).chosen) is not None:
        ranks = "GPUs" if hardware.gpus else "processes"
        yield f"as many {ranks} with {describe(found.mode)}: {_need(found, hardware)}"
    if hardware.device == "cpu":
        yield from _fewer_processes(free, hardware)
        return
    for wishes, words in ((config, "your settings"), (free, "automatic settings")):
        if (more := _more_gpus(wishes, hardware)) is not None:
            yield f"{more[0]} of these GPUs, {words}: {describe(more[1].mode)}: {_need(more[1], hardware)}"
            break
    for wishes, words in ((config, "your settings"), (free, "automatic settings")):
        if (larger := _larger_card(wishes, hardware)) is not None:
            count = config.parallelism.num_gpus
            yield f"{count} x {larger[0]}, {words}: {describe(larger[1].mode)}: {_need(larger[1], hardware)}"
            break


def _need(candidate: Candidate, hardware: Hardware) -> str:
    memory = candidate.footprint
    host = f"{gigabytes(memory.host_total)} of host RAM"
    if hardware.device == "cpu":
        return host
    offloads = candidate.mode.offload_optimizer or candidate.mode.offload_parameters
    return f"{gigabytes(memory.gpu_total)} per GPU" + (f" and {host} per node" if offloads else "")


def _without_wishes(config: TrainerConfig) -> TrainerConfig:
    parallelism = config.parallelism.model_copy(
        update={"zero_stage": "auto", "offload_optimizer": "auto", "offload_parameters": "auto"}
    )
    training = config.training.model_copy(update={"recompute": "auto", "micro_batch_size": "auto"})
    return config.model_copy(update={"parallelism": parallelism, "training": training})


def _more_gpus(config: TrainerConfig, hardware: Hardware) -> tuple[int, Candidate] | None:
    batch, micro = config.training.global_batch_size, config.training.micro_batch_size
    for count in _GPU_COUNTS:
        if count <= config.parallelism.num_gpus or batch % (count * (1 if micro == "auto" else micro)):
            continue
        parallelism = config.parallelism.model_copy(update={"num_gpus": count})
        nodes = -(-count // max(hardware.gpus, 8))
        larger = hardware.model_copy(update={"nodes": max(nodes, hardware.nodes)})
        found = search(config.model_copy(update={"parallelism": parallelism}), larger).chosen
        if found is not None:
            return count, found
    return None


def _larger_card(config: TrainerConfig, hardware: Hardware) -> tuple[str, Candidate] | None:
    for card in cards.CARDS:
        if hardware.gpu_bytes is None or card.usable_bytes <= hardware.gpu_bytes:
            continue
        other = hardware.model_copy(update={"gpu_bytes": card.usable_bytes})
        if (found := search(config, other).chosen) is not None:
            return card.name, found
    return None


def _fewer_processes(config: TrainerConfig, hardware: Hardware) -> Iterator[str]:
    for count in range(config.parallelism.num_gpus - 1, 0, -1):
        if config.training.global_batch_size % count:
            continue
        parallelism = config.parallelism.model_copy(update={"num_gpus": count})
        found = search(config.model_copy(update={"parallelism": parallelism}), hardware).chosen
        if found is not None:
            yield f"{count} process{'es' if count > 1 else ''}: {_need(found, hardware)}"
            return
