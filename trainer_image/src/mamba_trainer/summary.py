"""The one screen that a run shows before it starts, and the memory table, for a person at a terminal.

Says what is about to happen, what it takes and where things go. Deterministic: same plan, same screen.
"""

from __future__ import annotations

from collections.abc import Iterator
from io import StringIO
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from mamba_trainer.config import TrainerConfig
from mamba_trainer.plan import Hardware, MemoryTable, Term, TrainingPlan, gigabytes

if TYPE_CHECKING:
    from mamba_trainer.rehearse import Rehearsal

#: Width of the bar of a memory term.
_BAR = 24


def render(config: TrainerConfig, plan: TrainingPlan, hardware: Hardware) -> Group:
    """What a run is about to do: one screen of 80 columns."""
    return Group(_facts(config, plan, hardware), Text(), _memory(plan), *_reasons(plan))


def render_rehearsal(plan: TrainingPlan, measured: Rehearsal) -> Group:
    """What one real rank took, beside what was planned for it."""
    peak, planned = measured.peak_allocated, plan.gpu_allocated
    if plan.device == "cuda":
        off, reserved = f"{peak / planned - 1:+.1%}", gigabytes(measured.peak_reserved)
        facts = [
            f"Measured   {gigabytes(peak)} allocated at the peak, planned {gigabytes(planned)} ({off})",
            f"Reserved   {reserved} by PyTorch; {gigabytes(measured.after_start)} allocated after the start",
        ]
    else:
        facts = [f"Measured   {gigabytes(peak)} resident at the peak of this process"]
    facts.append(f"Last step  {measured.step_seconds:.2f} s of compute; nothing was communicated")
    lines = [Text(), *map(Text, facts)]
    return Group(*lines)


def to_text(renderable: RenderableType, *, width: int = 80) -> str:
    """For a log file, or a terminal without colours."""
    console = Console(file=StringIO(), width=width, color_system=None, highlight=False, emoji=False)
    console.print(renderable)
    assert isinstance(console.file, StringIO)
    return "".join(f"{line.rstrip()}\n" for line in console.file.getvalue().splitlines())


def _facts(config: TrainerConfig, plan: TrainingPlan, hardware: Hardware) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _lines(config, plan, hardware):
        table.add_row(name, Text(value))  # Text: brackets in a path are no markup
    return table


def _lines(config: TrainerConfig, plan: TrainingPlan, hardware: Hardware) -> Iterator[tuple[str, str]]:
    model, training, tokens = config.model, config.training, plan.tokens_per_step
    preset = f"{config.preset}: " if config.preset else ""
    shape = f"d_model {model.d_model}, {model.n_layer} layers, vocabulary {model.padded_vocab_size:,}"
    yield "Model", f"{preset}Mamba-1, {plan.parameters:,} parameters ({shape})"
    yield "Machine", _machine(plan, hardware)
    yield "Mode", f"{plan.mode}; {_arithmetic(config, plan)}; {plan.scan_backend} scan"
    ranks = f"{plan.world_size} rank{_plural(plan.world_size)}"
    yield (
        "Batch",
        f"{training.global_batch_size} sequences = micro-batch {plan.micro_batch_size} "
        f"x {plan.accumulation_steps} accumulation x {ranks}",
    )
    yield (
        "Steps",
        f"{training.max_steps:,} of {tokens:,} tokens each, {_count(tokens * training.max_steps)} in all; "
        f"sequences of {training.sequence_length:,}",
    )
    yield "Host memory", _host(plan)
    yield "Checkpoint", _checkpoint(config, plan, hardware)
    yield from zip(("Where", *[""] * 3), _where(config), strict=False)


def _where(config: TrainerConfig) -> Iterator[str]:
    yield f"checkpoints: {config.checkpoint.directory.absolute()}"
    if config.data.path is not None or config.data.builtin is not None:
        yield f"data: {config.data.path.absolute() if config.data.path else config.data.builtin}"
    if config.reporting.jsonl is not None:
        yield f"log: {config.reporting.jsonl.absolute()}"
    if config.reporting.status_port is not None:
        yield f"status and metrics: port {config.reporting.status_port}"


def _machine(plan: TrainingPlan, hardware: Hardware) -> str:
    if plan.device == "cpu":
        processes = f"{plan.world_size} CPU process{'es' if plan.world_size > 1 else ''}"
        return f"{processes} on {hardware.cpu_count} cores (no GPU)"
    nodes = f" on {hardware.nodes} nodes" if hardware.nodes > 1 else ""
    usable = f", {gigabytes(hardware.gpu_bytes)} usable on each" if hardware.gpu_bytes else ""
    return f"{plan.world_size} x {hardware.name}{nodes}{usable}"


def _arithmetic(config: TrainerConfig, plan: TrainingPlan) -> str:
    if config.parallelism.master_dtype == "bf16":
        return f"{plan.precision} with 16-bit master and moments"
    return str(plan.precision)


def _host(plan: TrainingPlan) -> str:
    if plan.host_total < 1e6:
        return "nothing beyond the processes"
    parts = ", ".join(f"{term} {gigabytes(size)}" for term, size in plan.host_memory.items() if size)
    known = f" of {gigabytes(plan.host_budget)} free" if plan.host_budget is not None else ""
    return f"{gigabytes(plan.host_total)}{known} per node ({parts}; estimate)"


def _checkpoint(config: TrainerConfig, plan: TrainingPlan, hardware: Hardware) -> str:
    interval = config.checkpoint.interval
    when = f"every {interval:,} steps" if interval else "at the end" if config.checkpoint.save_final else "on a stop"
    free = f"; {gigabytes(hardware.disk_bytes)} free" if hardware.disk_bytes is not None else ""
    return (
        f"{gigabytes(plan.checkpoint_bytes)} {when}, the newest {config.checkpoint.keep} kept "
        f"(up to {gigabytes(plan.disk_bytes)} of disk{free})"
    )


def _memory(plan: TrainingPlan) -> Group:
    budget = plan.gpu_budget
    what = "GPU" if plan.device == "cuda" else "process"
    used = gigabytes(plan.gpu_total) + (f" of {gigabytes(budget)}" if budget else "")
    title = f"Memory per {what}: {used} (estimate), at its peak in the {plan.peak_phase}"
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    scale = max(budget or 0, plan.gpu_total)
    for term, size in plan.gpu_memory.items():
        if size:
            table.add_row(f"  {_words(term, plan)}", gigabytes(size), "█" * round(_BAR * size / scale))
    if budget:
        free = budget - plan.gpu_total
        table.add_row("  free", gigabytes(free), f"{'░' * round(_BAR * free / scale)} {free / budget:.0%}")
    return Group(Text(title, style="bold"), table)


def _words(term: Term, plan: TrainingPlan) -> str:
    if term is Term.KEPT and plan.recompute_every:
        return "recompute boundaries"
    if term is Term.CONTEXT and plan.device == "cpu":
        return "process itself"
    return str(term)


def _reasons(plan: TrainingPlan) -> list[RenderableType]:
    if not plan.reasons:
        return []
    table = Table.grid(padding=(0, 1))
    for reason in plan.reasons:
        table.add_row("-", Text(reason))
    return [Text(), Text("Why", style="bold"), table]


def render_memory(table: MemoryTable) -> Group:
    """The table of `--check_memory`."""
    card = "CPU processes" if table.usable_bytes is None else f"{table.card} GPUs"
    usable = "" if table.usable_bytes is None else f" ({gigabytes(table.usable_bytes)} usable on each)"
    heading = (
        f"{table.preset or 'This model'}, {table.parameters:,} parameters, on 1 to 8 {card}{usable}\n"
        f"Estimated GB per {'process' if table.usable_bytes is None else 'GPU'}; * fits"
    )
    screen = Table(box=None, padding=(0, 1, 0, 0))
    screen.add_column("Mode", no_wrap=True)
    for cell in table.rows[0].cells:
        screen.add_column(f"{cell.gpus} ", justify="right", no_wrap=True)
    screen.add_column("host RAM", justify="right", no_wrap=True)
    for row in table.rows:
        cells = [f"{cell.gpu_bytes / 1e9:.1f}{'*' if cell.fits else ' '}" for cell in row.cells]
        screen.add_row(row.mode, *cells, f"<= {gigabytes(max(cell.host_bytes for cell in row.cells))}")
    notes = Table.grid(padding=(0, 1))
    for note in table.notes:
        notes.add_row("-", Text(note))
    return Group(Text(heading, style="bold"), Text(), screen, Text(), notes)


def _plural(count: int) -> str:
    return "" if count == 1 else "s"


def _count(number: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:,.0f}"
