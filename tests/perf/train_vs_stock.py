"""Ours beside stock mamba_ssm + DeepSpeed on one GPU: same initial weights, same data, same order.

    python tests/perf/train_vs_stock.py --preset 1b_mamba --data DIR --steps 300 --out OUT

Trains three times: stock with seeds 0 and 1 (which define the band of what a seed changes) and ours with seed 0.
A seed draws the initial weights; data and order are the same in all runs. Each run is a process of its own, forked
before CUDA is touched. Writes OUT/PRESET.json with losses and step times, and prints medians and ratios.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import statistics
import time
import traceback
from pathlib import Path
from typing import Any

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asking for devices must not create a CUDA context before the fork
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import deepspeed
import torch

from mamba_trainer import engine as engines
from mamba_trainer.config import TrainerConfig, lay_over, parse_config
from mamba_trainer.data.dataset import TokenDataset
from mamba_trainer.init import initial_value
from mamba_trainer.loop import Callback, StepResult, StopRequest, Trainer
from mamba_trainer.plan import Hardware, plan_training
from mamba_trainer.plan.hardware import detect
from mamba_trainer.resolve import read_setting
from mamba_trainer.schedule import learning_rate


class Record(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        self.losses.append(result.loss)
        self.seconds.append(result.seconds)
        if result.step % 25 == 0 or result.step < 4:
            print(f"  step {result.step} loss {result.loss:.4f} grad {result.gradient_norm:.3f}", flush=True)


def ours(config: TrainerConfig, hardware: Hardware, data: Path) -> dict[str, Any]:
    plan = plan_training(config, hardware)
    print(f"ours: ZeRO-{plan.zero_stage}, micro-batch {plan.micro_batch_size} x {plan.accumulation_steps}, "
          f"recompute every {plan.recompute_every}", flush=True)  # fmt: skip
    device = engines.local_device()
    engines.initialize_distributed(device)
    engine = engines.create(config, plan, device)
    record = Record()
    dataset = TokenDataset.open(data, "train", config.training.sequence_length)
    Trainer(config, plan, engine, dataset, StopRequest(), [record]).run()
    return _result(record, engine.scan_backend)


def stock(config: TrainerConfig, hardware: Hardware, data: Path) -> dict[str, Any]:
    """MambaLMHeadModel as its authors ship it, under DeepSpeed ZeRO-2 bf16, with the usual cross entropy."""
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    device = engines.local_device()
    engines.initialize_distributed(device)
    shape = config.model
    model = MambaLMHeadModel(
        MambaConfig(d_model=shape.d_model, n_layer=shape.n_layer, vocab_size=shape.vocab_size,
                    rms_norm=True, residual_in_fp32=True, fused_add_norm=True),
        device=device, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(name, shape, config.training.seed, device))
    training = config.training
    micro = int(training.micro_batch_size)
    groups = engines.parameter_groups(model.named_parameters(), training.weight_decay, 10**12)
    optimizer = torch.optim.AdamW(groups, lr=training.learning_rate, betas=(training.beta1, training.beta2), fused=True)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": training.global_batch_size // micro,
            "gradient_clipping": training.gradient_clipping, "bf16": {"enabled": True},
            "zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True, "steps_per_print": None,
        },
    )  # fmt: skip
    from mamba_trainer.data.order import SampleOrder

    dataset = TokenDataset.open(data, "train", training.sequence_length)
    order = SampleOrder(len(dataset), config.data.seed)
    record = Record()
    for step in range(training.max_steps):
        started = time.perf_counter()
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate(step, training)
        ids = order.batch_for(step * training.global_batch_size, training.global_batch_size)
        total = torch.zeros((), device=device)
        for first in range(0, len(ids), micro):
            window = torch.from_numpy(dataset.batch(ids[first : first + micro])).to(device)
            logits = engine(window[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())
            engine.backward(loss)
            engine.step()
            total += loss.detach()
            del logits, loss
        mean = float(total) * micro / len(ids)
        norm = float(engine.get_global_grad_norm() or 0.0)
        result = StepResult(step + 1, mean, 0.0, norm, True, 0, time.perf_counter() - started)
        record.on_step_end(None, result)  # type: ignore[arg-type]
    return _result(record, "stock")


def _result(record: Record, scan: str) -> dict[str, Any]:
    return {
        "scan": scan, "losses": record.losses, "seconds": record.seconds,
        "peak_allocated": torch.cuda.max_memory_allocated(), "peak_reserved": torch.cuda.max_memory_reserved(),
    }  # fmt: skip


def _child(function: Any, config: TrainerConfig, data: Path, results: Any) -> None:
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29513",
    }
    try:
        results.put(function(config, detect(Path.cwd()), data))
    except BaseException:
        results.put(traceback.format_exc())
    results.close()
    results.join_thread()
    os._exit(0)


def _preloaded_context() -> Any:
    """Imports what every run needs once; forks are safe as long as that has not touched CUDA."""
    try:
        import mamba_ssm.models.mixer_seq_simple  # noqa: F401
    except ImportError:
        print("mamba_ssm is not installed: only runs of ours with the torch scan will work", flush=True)
    return mp.get_context("spawn" if torch.cuda.is_initialized() else "fork")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--sequences", type=int, default=2, help="per optimizer step")
    parser.add_argument("--micro", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--runs", default="stock:0,ours:0,stock:1", help="comma-separated stock:SEED and ours:SEED")
    parser.add_argument("--set", dest="settings", action="append", default=[], help="GROUP.OPTION=VALUE")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    context = _preloaded_context()
    report: dict[str, Any] = {"preset": options.preset, "sequences": options.sequences, "micro": options.micro}
    for run in options.runs.split(","):
        kind, _, seed = run.partition(":")
        training = {
            "global_batch_size": options.sequences,
            "micro_batch_size": options.micro,
            "seed": int(seed),
            "max_steps": options.steps,
            "warmup_steps": min(50, options.steps),
            "learning_rate": options.learning_rate,
        }
        raw = lay_over(
            {"preset": options.preset},
            {"training": training, "parallelism": {"num_gpus": 1, "precision": "bf16"}},
        )
        for setting in options.settings:
            raw = lay_over(raw, read_setting(setting))
        config = parse_config(raw)
        print(f"{options.preset} {run}", flush=True)
        results = context.Queue()
        started = time.perf_counter()
        child = context.Process(target=_child, args=(ours if kind == "ours" else stock, config, options.data, results))
        child.start()
        report[run] = results.get()
        child.join()
        if isinstance(report[run], str):
            print(report[run], flush=True)
            continue
        losses, seconds = report[run]["losses"], report[run]["seconds"][3:]
        pace = config.tokens_per_step / statistics.median(seconds or [float("nan")])
        print(
            f"{options.preset} {run}: loss {losses[0]:.4f} -> {statistics.mean(losses[-20:]):.4f}, median {pace:,.0f} "
            f"tok/s, peak {report[run]['peak_allocated'] / 1e9:.1f} GB, {time.perf_counter() - started:.0f} s in all",
            flush=True,
        )
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"{options.preset}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
