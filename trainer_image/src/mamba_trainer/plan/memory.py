"""Bytes of a rank and of a node for one mode: what DeepSpeed, our engine and autograd allocate, term by term.

A rank's memory is not one sum: activations, optimizer transients and the loss do not live at the same time.
Each phase of a step is summed, and the largest is the peak; so every term shown is there at that moment.

Follows DeepSpeed 0.19 (`stage_1_and_2.py`, `stage3.py`, `fused_optimizer.py`) and `engine.py`. N = ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from mamba_trainer.config import Precision, TrainerConfig
from mamba_trainer.plan import activations
from mamba_trainer.plan.schema import Hardware, HostTerm, Sizes, Term

#: CUDA context, cuBLAS, NCCL and Triton of a rank. Assumed; a rehearsal measures it.
GPU_CONTEXT_BYTES = 1_000_000_000
#: Resident host memory of a rank with torch and DeepSpeed imported; with CUDA and NCCL up, assumed.
CPU_PROCESS_BYTES = 600_000_000
GPU_PROCESS_BYTES = 3_000_000_000
#: What the allocator holds beside live tensors, as a share of what comes and goes in a step. From reserved
#: against allocated bytes of rehearsals with expandable segments (5 to 13 % of the total, nothing of it in
#: static tensors).
FRAGMENTATION = 0.2

#: DeepSpeed flattens gradients of ZeRO-0 in pieces of this many elements (`MEMORY_OPT_ALLREDUCE_SIZE`).
_ZERO0_ALLREDUCE_ELEMENTS = 500_000_000

_PHASES = ("backward pass", "loss", "embedding's backward", "optimizer step")


Stage = Literal[0, 1, 2, 3]
ScanName = Literal["torch", "mamba_ssm"]


class Mode(NamedTuple):
    """One way to run a job: what the plan chooses between."""

    zero_stage: Stage
    offload_optimizer: bool
    offload_parameters: bool
    recompute_every: int
    micro_batch: int


class Footprint(NamedTuple):
    """Memory of one mode."""

    gpu: dict[Term, int]
    phase: str
    host: dict[HostTerm, int]

    @property
    def gpu_total(self) -> int:
        return sum(self.gpu.values())

    @property
    def host_total(self) -> int:
        return sum(self.host.values())


@dataclass(frozen=True)
class Job:
    """What of configuration and machine decides memory, worked out once for all modes."""

    config: TrainerConfig
    on_gpu: bool
    precision: Precision
    backend: ScanName
    world: int
    ranks_per_node: int
    elements: int
    block_elements: int
    largest_in_block: int
    largest_parameter: int
    persistent_elements: int
    fp32_elements: int  # A_log, D and dt bias, which have a replicated fp32 copy under 16-bit weights
    sizes: Sizes

    @property
    def width(self) -> int:
        return 4 if self.precision is Precision.FP32 else 2

    @property
    def master_width(self) -> int:
        return 2 if self.config.parallelism.master_dtype == "bf16" else 4

    @property
    def batch_per_rank(self) -> int:
        return self.config.training.global_batch_size // self.world

    @property
    def group_elements(self) -> int:
        """Elements of the largest optimizer group, in which DeepSpeed flattens and converts."""
        return min(self.elements, max(self.sizes.param_group_elements, self.largest_parameter))

    @property
    def group_count(self) -> int:
        """Groups are filled with whole parameters, so the last half matrix or so of each stays empty."""
        return math.ceil(self.elements / max(1, self.group_elements - self.largest_in_block // 2))


def make_job(config: TrainerConfig, hardware: Hardware, precision: Precision, backend: ScanName) -> Job:
    model, world = config.model, config.parallelism.num_gpus
    block = {name: math.prod(shape) for name, shape in model.block_shapes().items()}
    embedding = model.padded_vocab_size * model.d_model
    copies = 1 if model.tie_embeddings else 2
    elements = model.n_layer * sum(block.values()) + model.d_model + copies * embedding
    sizes = _sizes(config, elements, sum(block.values()), embedding)
    small = sum(size for size in block.values() if size <= sizes.persistence_threshold)
    return Job(
        config=config,
        on_gpu=hardware.device == "cuda",
        precision=precision,
        backend=backend,
        world=world,
        ranks_per_node=math.ceil(world / hardware.nodes),
        elements=elements,
        block_elements=sum(block.values()),
        largest_in_block=max(block.values()),
        largest_parameter=max(embedding, *block.values()),
        persistent_elements=model.n_layer * small + model.d_model,
        fp32_elements=model.n_layer * (block["mixer.A_log"] + block["mixer.D"] + block["mixer.dt_proj.bias"]),
        sizes=sizes,
    )


def _sizes(config: TrainerConfig, elements: int, block: int, embedding: int) -> Sizes:
    model = config.model
    return Sizes(
        # 100 MB in 16 bit: large enough for full bandwidth, small enough for 24 GB cards.
        reduce_bucket_elements=min(50_000_000, elements),
        allgather_bucket_elements=500_000_000,
        prefetch_elements=block,
        sub_group_elements=100_000_000,
        # Keeps A_log, D, convolution, biases and norms resident, which the many small gathers would cost more
        # for.
        persistence_threshold=model.d_inner * max(model.d_state, model.d_conv),
        max_live_parameters=max(2 * block, embedding),
        # Small groups keep start-up copies and a step's fp32 gradients small, but each cut of a group makes
        # ZeRO-2 hold another matrix whole: groups half as large would cost the 7b 3 GB on 4 to 8 GPUs.
        param_group_elements=1_000_000_000,
    )


def footprint(job: Job, mode: Mode) -> Footprint:
    """Memory of a rank at its peak, and of its node."""
    static = _static_terms(job, mode)
    phases = dict(zip(_PHASES, _phase_terms(job, mode), strict=True))
    by_phase = {name: static | terms for name, terms in phases.items()}
    peak_phase = max(by_phase, key=lambda name: sum(_with_overhead(job, by_phase[name]).values()))
    gpu = _with_overhead(job, by_phase[peak_phase])
    ordered = {term: gpu.get(term, 0) for term in Term}
    host = _offloaded_terms(job, mode)
    each = GPU_PROCESS_BYTES if job.on_gpu else sum(ordered.values())
    host[HostTerm.PROCESSES] = job.ranks_per_node * each
    return Footprint(ordered, peak_phase, host)


def _with_overhead(job: Job, terms: dict[Term, int]) -> dict[Term, int]:
    moving = (Term.STEP, Term.GATHERED, Term.KEPT, Term.LAYER, Term.LOSS)
    return terms | {
        Term.CONTEXT: GPU_CONTEXT_BYTES if job.on_gpu else CPU_PROCESS_BYTES,
        Term.FRAGMENTATION: int(FRAGMENTATION * sum(terms.get(term, 0) for term in moving)),
    }


def _static_terms(job: Job, mode: Mode) -> dict[Term, int]:
    width, share = job.width, job.elements / job.world
    exact = 4 * job.fp32_elements if width == 2 else 0
    if mode.zero_stage < 3:
        weights = job.elements * width
    else:
        weights = job.persistent_elements * width + (0 if mode.offload_parameters else int(share * width))
    return {
        Term.WEIGHTS: weights + exact,
        Term.OPTIMIZER: 0 if mode.offload_optimizer else _optimizer_bytes(job, mode),
    }


def _optimizer_bytes(job: Job, mode: Mode) -> int:
    """Master weights and both moments of one rank."""
    per_element = 3 * job.master_width
    if job.precision is Precision.FP32 and mode.zero_stage in (0, 3) and not mode.offload_optimizer:
        per_element = 8  # the weights themselves are the master
    return int(per_element * job.elements / (job.world if mode.zero_stage else 1))


def _phase_terms(job: Job, mode: Mode) -> Iterator[dict[Term, int]]:
    """What comes and goes, in the order of _PHASES."""
    model, length = job.config.model, job.config.training.sequence_length
    batch, width, every = mode.micro_batch, job.width, mode.recompute_every
    tokens = batch * length
    saved = activations.saved_by_block(model, job.backend, batch, length, width)
    temporaries = activations.block_temporaries(model, job.backend, batch, length, width)
    boundaries = math.ceil(model.n_layer / every) if every else 0
    kept = boundaries * activations.boundary(model, tokens, width) if every else model.n_layer * saved
    head = activations.head_gradient(model, width)
    zero3 = mode.zero_stage == 3
    stored, in_flight = _gradient_bytes(job, mode), _in_flight_bytes(job, mode)

    yield {
        Term.GRADIENTS: stored,
        Term.BUCKETS: in_flight,
        Term.GATHERED: 2 * job.block_elements * width if zero3 else 0,
        Term.KEPT: kept,
        Term.LAYER: temporaries + every * saved,
        Term.LOSS: head,
    }
    yield {
        Term.GRADIENTS: stored,
        Term.BUCKETS: in_flight,
        Term.GATHERED: head + job.block_elements * width if zero3 else 0,
        Term.KEPT: kept,
        Term.LOSS: activations.loss_forward(model, tokens, width, fp16=job.precision is Precision.FP16),
    }
    # The norm of a gradient is taken in fp64, a copy of the part that this rank owns.
    norm = 8 * math.ceil(job.largest_parameter / (job.world if mode.zero_stage else 1))
    yield {Term.GRADIENTS: stored, Term.BUCKETS: in_flight, Term.LOSS: 3 * head, Term.STEP: norm}
    yield {Term.GRADIENTS: stored, Term.STEP: max(_step_bytes(job, mode), norm)}


def _gradient_bytes(job: Job, mode: Mode) -> int:
    """Accumulated gradients of one rank on its device."""
    width = job.width
    match mode.zero_stage:
        case 0 | 1:
            return job.elements * width
        case 2:
            if mode.offload_optimizer:
                return 0
            # The sum so far, and the buffer into which the next micro-batch is reduced.
            return (2 if _accumulates(job, mode) else 1) * elements_in_partition(job) * width
        case _:
            return 0 if mode.offload_optimizer else math.ceil(job.elements / job.world) * width


def _accumulates(job: Job, mode: Mode) -> bool:
    return job.batch_per_rank > mode.micro_batch


def elements_in_partition(job: Job) -> int:
    """Elements of all parameters of which a rank owns some part: ZeRO-2 keeps their whole gradients.

    Each group is cut into N equal parts, and the parameter at a cut belongs to both sides. Groups are alike,
    so one rank meets unlucky cuts in all of them: counted is one large matrix per group, once the embedding.
    """
    if job.world == 1:
        return job.elements
    shared = (job.group_count - 1) * job.largest_in_block + job.largest_parameter
    return min(job.elements, math.ceil(job.elements / job.world) + shared)


def _in_flight_bytes(job: Job, mode: Mode) -> int:
    """Reduction buffers, and gradients on their way into them."""
    bucket = job.sizes.reduce_bucket_elements * job.width
    block = job.block_elements * job.width
    match mode.zero_stage:
        case 0:
            return 0
        case 1:
            buffers = bucket
        case 2:
            buffers = 2 * bucket + block  # overlapped: one fills while the other is reduced
        case _:
            buffers = 2 * bucket + block  # the bucket, and its copy interleaved for reduce-scatter
    if mode.offload_optimizer and mode.zero_stage < 3:
        buffers += job.largest_parameter * job.width
    return buffers


def _step_bytes(job: Job, mode: Mode) -> int:
    """What the optimizer step allocates beside the accumulated gradients."""
    width, master = job.width, job.master_width
    if mode.offload_optimizer:
        return 0
    if mode.zero_stage == 0:
        flatten = min(job.elements, _ZERO0_ALLREDUCE_ELEMENTS) * width
        if job.precision is Precision.FP32:
            return flatten
        # fp32 gradients of everything and the copy of one group; the 16-bit ones go as they are converted.
        return max(flatten, 4 * (job.elements + job.group_elements) - width * (job.elements - job.group_elements))
    converted = 0 if width == master else master
    piece = math.ceil(job.group_elements / job.world)
    if mode.zero_stage == 3:
        piece = min(piece, job.sizes.sub_group_elements + math.ceil(job.largest_parameter / job.world))
    return (width + converted) * piece


def _offloaded_terms(job: Job, mode: Mode) -> dict[HostTerm, int]:
    """Host memory of a node that offload takes: the parts of all its ranks."""
    terms = dict.fromkeys(HostTerm, 0)
    ranks, share, width = job.ranks_per_node, job.elements / job.world, job.width
    if mode.offload_parameters:
        terms[HostTerm.PARAMETERS] = ranks * _pinned(job, share * width, pieces=job.group_count)
    if not mode.offload_optimizer:
        return terms
    terms[HostTerm.OPTIMIZER] = ranks * _optimizer_bytes(job, mode)
    master = job.master_width
    if mode.zero_stage == 3:
        pieces = math.ceil(share / min(job.sizes.sub_group_elements, job.group_elements / job.world))
        terms[HostTerm.GRADIENTS] = ranks * (
            _pinned(job, share * master, pieces) + _pinned(job, share * width, pieces=1)
        )
        return terms
    groups = job.group_count
    accumulated = elements_in_partition(job) * width if _accumulates(job, mode) and master == 4 else 0
    terms[HostTerm.GRADIENTS] = ranks * (_pinned(job, share * master, groups) + accumulated)
    terms[HostTerm.BUFFERS] = ranks * (
        _pinned(job, share * width, groups)
        + _pinned(job, job.largest_parameter * width, pieces=1)
        + _pinned(job, share * master, groups)  # masters are pinned too: what rounding adds to them
        - int(share * master)
    )
    return terms


def _pinned(job: Job, total: float, pieces: int) -> int:
    """Bytes that `pieces` equal pinned buffers take: PyTorch rounds each up to a power of two."""
    if not job.on_gpu or total < 1:
        return int(total)
    return pieces * (1 << math.ceil(math.log2(max(1.0, total / pieces))))


def checkpoint_bytes(job: Job, mode: Mode) -> int:
    """One checkpoint: weights, masters and moments of all ranks."""
    optimizer = 3 * job.master_width
    if job.precision is Precision.FP32 and mode.zero_stage == 0:
        optimizer = 8
    return job.elements * (job.width + optimizer)
