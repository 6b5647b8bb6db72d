"""One rank: reads the resolved run, builds, resumes, trains, closes. Started by the launcher, by `deepspeed`, or
by `torchrun`.

Every end is an exit code of the contract and, through the report board, a reason and a message.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from mamba_trainer.contract import DeviceOutOfMemory, Env, ExitCode, Phase, TrainerError, UserError
from mamba_trainer.report import RankReporter, install_stack_dump
from mamba_trainer.run import Run
from mamba_trainer.stop import StopRequest

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # read when torch first allocates


def main(load: Callable[[], Run]) -> None:
    """Trains what `load` returns. Never returns itself: a rank whose peers are gone would hang in the clean-up."""
    install_stack_dump()
    reporter = RankReporter.from_env()
    code = _guarded(load, reporter)
    reporter.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _guarded(load: Callable[[], Run], reporter: RankReporter) -> int:
    try:
        _train(load, reporter)
    except TrainerError as error:
        reporter.fail(error.reason, str(error))
        _tell(str(error))
        return error.exit_code
    except BaseException as error:
        if _is_peer_lost(error):
            message = f"Another rank is gone: {str(error).splitlines()[0]}"
            reporter.fail("PeerLost", message)
            _tell(message)
            return ExitCode.PEER_LOST
        trace = traceback.format_exc()
        reporter.fail("Failure", trace[-2000:])
        sys.stderr.write(trace)
        return ExitCode.FAILURE
    reporter.update(phase=Phase.DONE)
    return ExitCode.DONE


def _train(load: Callable[[], Run], reporter: RankReporter) -> None:
    # Before the long imports: a stop that arrives during them is no failure.
    stop = StopRequest(_leave)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    run = load()
    # Else DeepSpeed looks for one itself and warns where it finds none.
    os.environ.setdefault("DS_ACCELERATOR", run.plan.device)
    import torch

    from mamba_trainer.session import train

    try:
        train(run, reporter, stop)
    except torch.OutOfMemoryError as error:
        raise DeviceOutOfMemory(_explain_out_of_memory(error, run)) from error


def _leave() -> NoReturn:
    """In a signal handler, and perhaps within an import: nothing but system calls."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"stopped on request before the first step: there is nothing to save\n")
    os._exit(ExitCode.SAVED_AND_STOPPED)


def _tell(message: str) -> None:
    """Once a job: rank 0 speaks to the person, the others through the report board."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(message, file=sys.stderr, flush=True)


def _is_peer_lost(error: BaseException) -> bool:
    """A collective failed because another rank is gone: gloo and NCCL say so in these words."""
    import torch

    words = ("Connection closed by peer", "Connection reset by peer", "Socket closed", "remote process exited")
    return isinstance(error, (RuntimeError, torch.distributed.DistBackendError)) and any(w in str(error) for w in words)


def _explain_out_of_memory(error: BaseException, run: Run) -> str:
    """What was live, and the next setting down that should fit: the launcher goes on with it on one machine."""
    from mamba_trainer.engine import memory_of_failure
    from mamba_trainer.plan import gigabytes, smaller_plan

    lines = [f"The GPU ran out of memory in {run.plan.mode}, micro-batch {run.plan.micro_batch_size}."]
    lines.append(memory_of_failure(error))
    if (plan := smaller_plan(run.config, run.hardware, run.plan)) is not None:
        lines.append(
            f"  Needs less, with the same batch and ZeRO stage: micro-batch {plan.micro_batch_size}, {plan.mode} "
            f"({gigabytes(plan.gpu_total)} planned instead of {gigabytes(run.plan.gpu_total)})."
        )
    else:
        lines.append(
            "  Nothing within this ZeRO stage needs less: use more GPUs, a higher stage or offload "
            "(`mamba-train run --check_memory` shows what fits this card)."
        )
    return "\n".join(lines)


def _from_command_line() -> Run:
    path = sys.argv[1] if len(sys.argv) > 1 else os.environ.get(Env.CONFIG)
    if not path:
        raise UserError(
            f"No run given and {Env.CONFIG} is not set: start with `mamba-train run` or launch_deepspeed.sh."
        )
    return Run.read(Path(path))


if __name__ == "__main__":
    main(_from_command_line)
