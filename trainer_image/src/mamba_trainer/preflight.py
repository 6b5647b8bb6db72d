"""What else can be wrong with a run, found before it prints its plan and before any process is started.

`resolve` judges the configuration; here it meets what is on disk and installed. Ranks check again what they use.
"""

from __future__ import annotations

from pathlib import Path

from mamba_trainer.config import TrainerConfig
from mamba_trainer.contract import UserError
from mamba_trainer.run import Run


def check(run: Run) -> None:
    """
    Raises:
        UserError: data, initial weights, scan backend or checkpoint cannot serve this run.
    """
    check_data(run.config)
    _check_scan(run)
    _check_weights(run.config)
    _check_checkpoint(run)


def require_data(config: TrainerConfig) -> None:
    """
    Raises:
        UserError: the configuration names no data.
    """
    if config.data.path is None and config.data.builtin is None:
        raise UserError(
            "There is no data to train on. Prepare a text, jsonl, parquet or source folder once, then name it:\n"
            "  mamba-train prepare my-text.jsonl data/mine --tokenizer tokenizer.json\n"
            "  ... --data data/mine\n"
            "Or use text that is on every machine:  --set data.builtin=python-stdlib"
        )


def check_data(config: TrainerConfig) -> str | None:
    """Opens the data that the configuration names, if they are there by now; advice on the vocabulary, if any.

    Raises:
        UserError: they are missing, too short, of another vocabulary, or damaged.
    """
    from mamba_trainer.data.dataset import check_vocabulary, open_datasets

    if config.data.path is None:
        return None
    training, _ = open_datasets(config.data.path, config.data.validation_path, config.training.sequence_length)
    return check_vocabulary(training, config.model.vocab_size)


def require_fresh_folder(config: TrainerConfig) -> None:
    """
    Raises:
        UserError: a run that is to start afresh would find checkpoints of another one.
    """
    from mamba_trainer.checkpoint.commit import candidates

    if candidates(config.checkpoint.directory):
        raise UserError(
            f"{config.checkpoint.directory} holds checkpoints, and load is none: a fresh start would mix two runs. "
            "Choose another folder with --checkpoint_dir, or resume with --load_checkpoint auto."
        )


def _check_scan(run: Run) -> None:
    name = run.config.training.scan_backend
    if name == "auto":
        return
    import torch

    from mamba_trainer import scan

    scan.choose(name, run.config.model, torch.device(run.plan.device))


def _check_weights(config: TrainerConfig) -> None:
    if config.checkpoint.initial_weights is None:
        return
    from mamba_trainer.convert.weights import open_folder

    try:
        open_folder(config.checkpoint.initial_weights).only(config.model.parameter_shapes())
    except UserError as error:
        raise UserError(f"{error}\nInitial weights are a folder that `mamba-train import` has written.") from None


def _check_checkpoint(run: Run) -> None:
    """Reads manifests only: ranks verify the files, and set aside what is damaged."""
    wanted = run.config.checkpoint.load
    if wanted == "none":
        require_fresh_folder(run.config)
        return
    from mamba_trainer.checkpoint import resume
    from mamba_trainer.checkpoint.commit import candidates
    from mamba_trainer.checkpoint.verify import BadCheckpoint, read_manifest

    facts = resume.RunFacts(run.plan.world_size, run.plan.zero_stage, run.config.fingerprint(), run.shard_layout())
    if wanted != "auto":
        _require_checkpoint(Path(wanted), run.config)
    for folder in candidates(run.config.checkpoint.directory) if wanted == "auto" else [Path(wanted)]:
        try:
            found = read_manifest(folder)
        except BadCheckpoint:
            continue
        problem = resume.mismatch(folder, found, facts) if wanted == "auto" else resume.refusal(folder, found, facts)
        if problem is not None:
            raise UserError(problem)
        return


def _require_checkpoint(folder: Path, config: TrainerConfig) -> None:
    """What was asked for by name is one checkpoint, and of this model; whether it is sound, the ranks find out."""
    from mamba_trainer.checkpoint import layout
    from mamba_trainer.checkpoint.commit import candidates
    from mamba_trainer.checkpoint.verify import BadCheckpoint, read_manifest

    if not folder.is_dir():
        raise UserError(f"There is no checkpoint {folder}.")
    if inside := candidates(folder):
        raise UserError(
            f"{folder} holds checkpoints, and is none itself. The newest that verifies: --load_checkpoint auto "
            f"--checkpoint_dir {folder}\nJust one of them: --load_checkpoint {inside[0]}"
        )
    if not layout.is_checkpoint(folder.resolve().name):
        raise UserError(f"{folder} is not a checkpoint: name a folder step_N or final.")
    try:
        saved = read_manifest(folder).extra.get("model", {})
    except BadCheckpoint:
        return
    ours = config.model.model_dump(mode="json")
    if different := [
        f"  {name}: {saved[name]}, here {ours[name]}" for name in ours if saved.get(name, ours[name]) != ours[name]
    ]:
        raise UserError("\n".join([f"{folder} was saved with another model:", *different]))
