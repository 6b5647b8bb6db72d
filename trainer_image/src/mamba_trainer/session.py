"""From a resolved run to a trained model, on one rank: the parts are put together here and nowhere else."""

from __future__ import annotations

import os
from pathlib import Path

import torch.distributed as dist

from mamba_trainer import engine as engines
from mamba_trainer.callbacks.checkpoint import SaveCheckpoints
from mamba_trainer.callbacks.evaluate import Evaluate
from mamba_trainer.callbacks.monitor import Monitor
from mamba_trainer.callbacks.profiler import Profile
from mamba_trainer.callbacks.progress import Progress
from mamba_trainer.callbacks.stability import Stability
from mamba_trainer.checkpoint.manager import CheckpointManager
from mamba_trainer.config import TrainerConfig
from mamba_trainer.contract import Env, Phase, UserError
from mamba_trainer.data.dataset import check_vocabulary, open_datasets
from mamba_trainer.loop import Callback, Trainer
from mamba_trainer.preflight import require_fresh_folder
from mamba_trainer.report import RankReporter
from mamba_trainer.run import Run
from mamba_trainer.stop import StopRequest


def train(run: Run, reporter: RankReporter, stop: StopRequest) -> None:
    """Trains `run` to its end, resuming from its newest verified checkpoint.

    Raises:
        TrainerError: see `contract`; each names its exit code.
    """
    config, plan = run.config, run.plan
    if config.data.path is None:
        raise UserError("There is no data: set data.path to a directory made by `mamba-train prepare`.")
    training, validation = open_datasets(config.data.path, config.data.validation_path, config.training.sequence_length)
    check_vocabulary(training, config.model.vocab_size)
    device = engines.local_device()
    control = engines.initialize_distributed(device)
    rank = dist.get_rank()
    if dist.get_world_size() != plan.world_size:
        raise UserError(f"The run is planned for {plan.world_size} ranks, but {dist.get_world_size()} were started.")
    reporter.update(phase=Phase.LOADING)
    engine = engines.create(config, plan, device)
    manager = CheckpointManager(
        config.checkpoint.directory,
        engine.deepspeed,
        control_group=control,
        attempt=_attempt(),
        keep=config.checkpoint.keep,
        config_hash=config.fingerprint(),
        log=lambda message: print(message, flush=True),
        expected_bytes=plan.checkpoint_bytes,
        shard_layout=run.shard_layout(),
        model=config.model.model_dump(mode="json"),
    )
    callbacks: list[Callback] = [
        Progress(rank, reporter, config.model.flops_per_token(), run.hardware.peak_flops),
        Stability(reporter),
    ]
    evaluate = None if validation is None else Evaluate(validation, reporter)
    if evaluate is not None:
        callbacks.append(evaluate)
    callbacks += [Monitor(evaluate), SaveCheckpoints(manager, reporter, rank)]
    if config.reporting.profile_steps and rank == 0:
        callbacks.append(Profile(config.reporting.profile_steps, config.checkpoint.directory / "profile"))
    trainer = Trainer(config, plan, engine, training, stop, callbacks)
    try:
        if _resume(config, manager, trainer, reporter):
            trainer.run()
        dist.barrier(group=control)
    finally:
        for callback in callbacks:
            callback.close()


def _resume(config: TrainerConfig, manager: CheckpointManager, trainer: Trainer, reporter: RankReporter) -> bool:
    """Brings the trainer to its newest checkpoint; False: the run was complete already."""
    wanted = config.checkpoint.load
    if wanted == "none" and _attempt() == 0:
        require_fresh_folder(config)
        return True
    state = manager.resume("auto" if wanted in ("auto", "none") else Path(wanted))
    reporter.update(quarantined_checkpoints=manager.quarantined, resumed_from_step=0)
    if state is None:
        return True
    reporter.update(step=state.step, resumed_from_step=state.step, last_checkpoint_step=state.step)
    if state.finished:
        _say(f"{state.path} is complete and verified (step {state.step}): there is nothing left to train")
        return False
    trainer.engine.loaded()
    trainer.step = trainer.resumed_from = state.step
    trainer.samples = state.data_position
    _say(f"resumed from {state.path} at step {state.step}")
    return True


def _attempt() -> int:
    return int(os.environ.get(Env.ATTEMPT, "0"))


def _say(message: str) -> None:
    if dist.get_rank() == 0:
        print(message, flush=True)
