"""From a resolved run to a trained model, on one rank: the parts are put together here and nowhere else."""

from __future__ import annotations

import os
from pathlib import Path

import torch.distributed as dist

from mamba_trainer import engine as engines
from mamba_trainer.callbacks.checkpoint import SaveCheckpoints
from mamba_trainer.callbacks.evaluate import Evaluate
from mamba_trainer.callbacks.profiler import Profile
from mamba_trainer.callbacks.progress import Progress
from mamba_trainer.callbacks.stability import Stability
from mamba_trainer.checkpoint.manager import CheckpointManager
from mamba_trainer.config import TrainerConfig
from mamba_trainer.contract import Env, Phase, UserError
from mamba_trainer.data.dataset import check_vocabulary, open_datasets
from mamba_trainer.loop import Callback, StopRequest, Trainer
from mamba_trainer.report import RankReporter
from mamba_trainer.run import Run


def train(run: Run, reporter: RankReporter, stop: StopRequest) -> None:
    """Trains `run` to its end, resuming from its newest verified checkpoint.

    Raises:
        TrainerError: see `contract`; each names its exit code.
    """
    config, plan = run.config, run.plan
    if config.data.path is None:
        raise UserError("There is no data: set data.path to a directory made by `mamba-train prepare`.")
    training, validation = open_datasets(
        config.data.path, config.data.validation_path, config.training.sequence_length
    )
    advice = check_vocabulary(training, config.model.vocab_size)
    device = engines.local_device()
    control = engines.initialize_distributed(device)
    rank = dist.get_rank()
    if dist.get_world_size() != plan.world_size:
        raise UserError(f"The run is planned for {plan.world_size} ranks, but {dist.get_world_size()} were started.")
    if advice and rank == 0:
        print(advice, flush=True)
    reporter.update(phase=Phase.LOADING)
    engine = engines.create(config, plan, device)
    manager = CheckpointManager(
        config.checkpoint.directory,
        engine.deepspeed,
        control_group=control,
        attempt=int(os.environ.get(Env.ATTEMPT, "0")),
        keep=config.checkpoint.keep,
        config_hash=config.fingerprint(),
    )
    callbacks: list[Callback] = [
        Progress(rank, reporter, config.model.flops_per_token(), run.hardware.peak_flops),
        Stability(reporter),
        *([Evaluate(validation, reporter)] if validation is not None else []),
        SaveCheckpoints(manager, reporter, rank),
        *([Profile(config.reporting.profile_steps, config.checkpoint.directory / "profile")] if config.reporting.profile_steps and rank == 0 else []),
    ]  # fmt: skip
    trainer = Trainer(config, plan, engine, training, stop, callbacks)
    try:
        _resume(config, manager, trainer, reporter)
        trainer.run()
        dist.barrier(group=control)
    finally:
        for callback in callbacks:
            callback.close()


def _resume(config: TrainerConfig, manager: CheckpointManager, trainer: Trainer, reporter: RankReporter) -> None:
    wanted = config.checkpoint.load
    if wanted == "none":
        return
    state = manager.resume("auto" if wanted == "auto" else Path(wanted))
    if state is None:
        return
    trainer.engine.loaded()
    trainer.step = trainer.resumed_from = state.step
    trainer.samples = state.data_position
    reporter.update(step=state.step, resumed_from_step=state.step, last_checkpoint_step=state.step)
    if dist.get_rank() == 0:
        print(f"resumed from {state.path} at step {state.step}", flush=True)
