"""`mamba-train`, and `train_deepspeed.py` with the guide's options: the same commands under both names.

Every option may be written with dashes or underscores. Mistakes end with exit 64 and one screen that says what to
do; nothing has been started by then.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from mamba_trainer.contract import Env, ExitCode, TrainerError, UserError

app = typer.Typer(
    help="Trains Mamba language models with DeepSpeed.",
    no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip


#: What click exits with when it cannot read the command line.
_USAGE = 2


def _option(name: str, help: str, **settings: Any) -> Any:
    """An option in both spellings: --num-gpus and the guide's --num_gpus."""
    dashed = f"--{name}"
    names = [dashed] if "-" not in name else [dashed, f"--{name.replace('-', '_')}"]
    return typer.Option(*names, help=help, show_default=False, **settings)


@app.command()
def run(
    preset: Annotated[str | None, _option("preset", "7b_mamba, 3b_mamba, 1b_mamba or tiny.")] = None,
    config: Annotated[Path | None, _option("config", "YAML file: the guide's keys, or any of ours.")] = None,
    num_gpus: Annotated[int | None, _option("num-gpus", "GPUs in all; CPU processes where there is none.")] = None,
    data: Annotated[Path | None, _option("data", "Directory made by `prepare`, or a Megatron .bin/.idx stem.")] = None,
    checkpoint_dir: Annotated[Path | None, _option("checkpoint-dir", "Where checkpoints go (./checkpoints).")] = None,
    load_checkpoint: Annotated[
        str | None, _option("load-checkpoint", "auto (the newest that verifies), none, or the path of one.")
    ] = None,
    deepspeed_config: Annotated[
        Path | None, _option("deepspeed-config", "Your own DeepSpeed JSON, merged over the generated one.")
    ] = None,
    max_steps: Annotated[int | None, _option("max-steps", "Optimizer steps.")] = None,
    port: Annotated[int | None, _option("port", "Rendezvous port; a busy one is replaced.", min=1, max=65_535)] = None,
    profile: Annotated[int | None, _option("profile", "Trace this many steps with torch.profiler.")] = None,
    settings: Annotated[list[str] | None, _option("set", "Any option, as GROUP.OPTION=VALUE (repeatable).")] = None,
    dry_run: Annotated[bool, _option("dry-run", "Check everything and print the plan; train nothing.")] = False,
    check_memory: Annotated[bool, _option("check-memory", "Print what fits in how much memory.")] = False,
    gpu: Annotated[str | None, _option("gpu", "With --dry_run or --check_memory: plan for this card.")] = None,
    local_rank: Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)] = None,
) -> None:
    """Train: checks, plans, says what it is about to do, and trains; resumes by itself."""
    from mamba_trainer.resolve import Request, resolve

    if gpu is not None and not (dry_run or check_memory):
        raise UserError("--gpu names other hardware than this machine's: use it with --dry_run or --check_memory.")
    if num_gpus is None and _started_as_rank():
        num_gpus = int(os.environ["WORLD_SIZE"])  # who started the ranks has decided
    request = Request(
        preset=preset, config=config, num_gpus=num_gpus, deepspeed_config=deepspeed_config,
        load_checkpoint=load_checkpoint, data=data, checkpoint_dir=checkpoint_dir, max_steps=max_steps,
        profile=profile, settings=settings or [], hardware=_named(gpu, num_gpus),
    )  # fmt: skip
    if check_memory:
        _print_memory(request)
        return
    resolved = resolve(request)
    if _started_as_rank():
        _run_as_rank(resolved)
    _check(resolved, dry_run=dry_run, elsewhere=gpu is not None)
    _print_plan(resolved)
    if dry_run:
        return
    from mamba_trainer.start import start

    raise typer.Exit(start(resolved, port))


@app.command()
def rehearse(
    num_gpus: Annotated[int, _option("num-gpus", "GPUs of the machine that is rehearsed.")],
    gpu_memory: Annotated[str, _option("gpu-memory", "Usable memory of each, as 24.5GB or 22.8GiB.")],
    preset: Annotated[str | None, _option("preset", "7b_mamba, 3b_mamba, 1b_mamba or tiny.")] = None,
    config: Annotated[Path | None, _option("config", "YAML file, as for `run`.")] = None,
    settings: Annotated[list[str] | None, _option("set", "Any option, as GROUP.OPTION=VALUE (repeatable).")] = None,
) -> None:
    """Run one real rank of N under a memory cap, on one device: planned against measured peak memory."""
    from mamba_trainer import summary
    from mamba_trainer.console import out
    from mamba_trainer.rehearse import machine, rehearse
    from mamba_trainer.resolve import Request, resolve

    resolved = resolve(
        Request(
            preset=preset, config=config, num_gpus=num_gpus, load_checkpoint="none", settings=settings or [],
            hardware=machine(num_gpus, gpu_memory),
        )
    )  # fmt: skip
    _print_plan(resolved)
    out.print(summary.render_rehearsal(resolved.plan, rehearse(resolved.config, resolved.plan)))


@app.command()
def prepare(
    source: Annotated[
        str, typer.Argument(help="Text, .jsonl, .parquet, a folder, a saved HF dataset, or python-stdlib.")
    ],
    out_dir: Annotated[Path, typer.Argument(help="Directory to write.")],
    tokenizer: Annotated[
        str, _option("tokenizer", "byte, bpe:N, or the path of a tokenizer.json or its folder.")
    ] = "byte",
    eot_token: Annotated[
        str | None, _option("eot-token", "The tokenizer's end-of-text token, if it names none.")
    ] = None,
    validation_fraction: Annotated[float, _option("validation-fraction", "Share of documents held out (0.01).")] = 0.01,
    text_field: Annotated[str, _option("text-field", "Field of jsonl, column of parquet (text).")] = "text",
    include: Annotated[list[str] | None, _option("include", "Files of a folder, as patterns (repeatable).")] = None,
    workers: Annotated[int | None, _option("workers", "Processes (all cores).")] = None,
) -> None:
    """Turn text into memory-mapped tokens, once."""
    from mamba_trainer.console import prepare_with_progress

    prepare_with_progress(
        source, out_dir, tokenizer=tokenizer, eot_token=eot_token, validation_fraction=validation_fraction,
        text_field=text_field, include=include or ("*",), workers=workers,
    )  # fmt: skip


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="checkpoints/step_N or checkpoints/final.")],
    out_dir: Annotated[Path, typer.Argument(help="Directory to write.")],
    format: Annotated[str, _option("format", "hf (MambaForCausalLM), mamba_ssm, or ours.")] = "hf",
    dtype: Annotated[str, _option("dtype", "fp32, bf16 or fp16.")] = "fp32",
    tokenizer: Annotated[Path | None, _option("tokenizer", "tokenizer.json to put beside the weights.")] = None,
) -> None:
    """Write a checkpoint's weights for Hugging Face or mamba_ssm."""
    from mamba_trainer import convert

    convert.export(checkpoint, out_dir, format, dtype=dtype, tokenizer=tokenizer)
    print(f"exported {checkpoint} to {out_dir} ({format}, {dtype})")


@app.command(name="import")
def import_(
    source: Annotated[Path, typer.Argument(help="Folder of a Hugging Face or mamba_ssm Mamba model.")],
    out_dir: Annotated[Path, typer.Argument(help="Directory to write.")],
) -> None:
    """Read published weights, to train on from them (--set checkpoint.initial_weights=OUT_DIR)."""
    from mamba_trainer import convert

    convert.import_(source, out_dir)
    print(f"imported {source} to {out_dir}: train from it with --set checkpoint.initial_weights={out_dir}")


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(help="A checkpoint (step_N, final), or an exported folder.")],
    prompt: Annotated[str, _option("prompt", "Text to continue.")] = "def ",
    data: Annotated[Path | None, _option("data", "Prepared dataset, for its tokenizer.")] = None,
    max_new_tokens: Annotated[int, _option("max-new-tokens", "Tokens to add (200).", min=0)] = 200,
    temperature: Annotated[float, _option("temperature", "0 takes the likeliest (0.8).", min=0)] = 0.8,
    top_k: Annotated[int, _option("top-k", "Choose among the k likeliest; 0: all (50).", min=0)] = 50,
    top_p: Annotated[float, _option("top-p", "Choose within this probability mass (1).", min=0, max=1)] = 1.0,
    seed: Annotated[int, _option("seed", "Seed of the choice.", min=0, max=2**63 - 1)] = 0,
) -> None:
    """Continue a text, with the recurrent step: constant time and memory per token."""
    from mamba_trainer.sample import stream_text

    for piece in stream_text(model, prompt, data=data, max_new_tokens=max_new_tokens, temperature=temperature,
                             top_k=top_k, top_p=top_p, seed=seed):  # fmt: skip
        print(piece, end="", flush=True)
    print()


@app.command()
def verify(
    directory: Annotated[Path, typer.Argument(help="A checkpoint, or a folder of them.")] = Path("checkpoints"),
) -> None:
    """Check checkpoints against their manifests: every file, size and SHA-256."""
    from mamba_trainer.checkpoint.inspection import inspect

    sound = True
    for finding in inspect(directory):
        print(finding, flush=True)
        sound &= finding.sound
    raise typer.Exit(ExitCode.DONE if sound else ExitCode.NO_VALID_CHECKPOINT)


@app.command(hidden=True)
def pod() -> None:
    """PID 1 of a pod: launch what the environment describes (see `contract.Env`)."""
    from mamba_trainer import launch

    command = [sys.executable, "-m", "mamba_trainer.main"]
    raise typer.Exit(launch.run(launch.LaunchSpec.in_pod(command, status_port=9400)))


def _started_as_rank() -> bool:
    """By `deepspeed` or `torchrun`, which set all of these: a single one is a leftover in somebody's shell."""
    return os.environ.keys() >= {"RANK", "WORLD_SIZE", "MASTER_ADDR"} and Env.CONFIG not in os.environ


def _named(gpu: str | None, num_gpus: int | None) -> Any:
    if gpu is None:
        return None
    from mamba_trainer.plan.cards import named

    return named(gpu, num_gpus or 1)


def _check(resolved: Any, *, dry_run: bool, elsewhere: bool) -> None:
    """A mistake must not stand below a screen of plan. What is on this machine says nothing about another."""
    from mamba_trainer import preflight
    from mamba_trainer.resolve import check_output

    if not dry_run:
        preflight.require_data(resolved.config)
    if not elsewhere:
        preflight.check(resolved)
    if not dry_run:
        check_output(resolved)


def _print_plan(resolved: Any) -> None:
    from mamba_trainer import deepspeed_config, summary
    from mamba_trainer.console import out

    out.print(summary.render(resolved.config, resolved.plan, resolved.hardware))
    for line in deepspeed_config.differences(resolved.config, resolved.plan):
        out.print(f"your DeepSpeed configuration: {line}", markup=False)


def _print_memory(request: Any) -> None:
    from mamba_trainer import summary
    from mamba_trainer.console import out
    from mamba_trainer.resolve import resolve_memory

    out.print(summary.render_memory(resolve_memory(request)))


def _run_as_rank(resolved: Any) -> None:
    """Trains as one rank of a gang that somebody else watches. Never returns."""
    from mamba_trainer import main as rank
    from mamba_trainer.start import load_as_rank

    if os.environ["RANK"] == "0":
        _print_plan(resolved)
    rank.main(lambda: load_as_rank(resolved))


def _run(arguments: Sequence[str] | None, name: str) -> NoReturn:
    """Runs a command; an end with a known cause becomes its message and its exit code."""
    try:
        app(arguments, prog_name=name)
    except TrainerError as error:
        if not _started_as_rank() or os.environ["RANK"] == "0":  # the same mistake is not told by every rank
            print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except SystemExit as error:
        # click ends with 2 for an option that does not exist: a bad request like any other.
        sys.exit(ExitCode.USER_ERROR if error.code == _USAGE else error.code)
    raise AssertionError("a command always exits")


def main(arguments: Sequence[str] | None = None) -> None:
    _run(arguments, "mamba-train")


def train_deepspeed(arguments: Sequence[str] | None = None) -> None:
    """`train_deepspeed.py`: `mamba-train run` without a subcommand."""
    given = sys.argv[1:] if arguments is None else arguments
    _run(["run", *given], "train_deepspeed.py")
