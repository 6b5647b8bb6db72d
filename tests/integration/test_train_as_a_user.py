"""The commands as a user types them, in real processes that import everything anew."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launcher_harness import eventually
from mamba_trainer import cli
from mamba_trainer.checkpoint.verify import verify
from ranks import free_port
from trainer_harness import SEQUENCE, checkpoints, last_step, options, steps

BIN = Path(sys.executable).parent
SCRIPT = Path(__file__).parents[2] / "trainer_image" / "train_deepspeed.py"
STEPS = 40


def start(folder: Path, *command: object) -> subprocess.Popen[bytes]:
    environ = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    with (folder / "output").open("wb") as output:
        return subprocess.Popen(
            [str(word) for word in command], stdout=output, stderr=subprocess.STDOUT, cwd=folder, env=environ,
            start_new_session=True,
        )  # fmt: skip


class Finished:
    """A run with a status port and DeepSpeed's TensorBoard monitor, and what it answered on the way."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.answers: list[dict[str, Any]] = []
        self.metrics: list[str] = []
        port = free_port()
        monitor = {"tensorboard": {"enabled": True, "output_path": f"{folder}/tensorboard", "job_name": "run"}}
        (folder / "deepspeed.json").write_text(json.dumps(monitor))
        process = start(
            folder, BIN / "mamba-train", "run", *options(folder, steps=STEPS, reporting__status_port=port),
            "--deepspeed_config", folder / "deepspeed.json",
        )  # fmt: skip
        while process.poll() is None:
            try:
                self.answers.append(json.loads(_get(port, "status")))
                self.metrics.append(_get(port, "metrics").decode())
            except OSError:
                pass
            time.sleep(0.05)
        self.code = process.returncode
        self.text = (folder / "output").read_text()


def _get(port: int, what: str) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/{what}", timeout=2) as answer:
        body: bytes = answer.read()
        return body


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    run = Finished(tmp_path_factory.mktemp("finished"))
    assert run.code == 0, run.text
    yield run


def test_a_run_ends_with_a_verified_model_and_all_its_numbers(finished: Finished) -> None:
    assert verify(finished.folder / "checkpoints/final").step == STEPS
    rows = steps(finished.folder)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[-1]["loss"] < rows[0]["loss"] - 1
    assert all(row["applied"] and row["tokens_per_second"] > 0 and row["step_seconds"] > 0 for row in rows)


def test_a_run_says_what_it_will_do_how_it_goes_and_where_all_is(finished: Finished) -> None:
    text = finished.text
    plan, _, rest = text.partition("\nstep  1/40")
    assert "ZeRO-2" in plan and str(finished.folder / "checkpoints") in plan.replace("\n", "").replace(" ", "")
    assert "your DeepSpeed configuration: tensorboard.enabled: not set -> true" in plan
    assert re.search(r"^held-out  loss \d\.\d+  \d\.\d+ bits per byte", rest, re.MULTILINE)
    sample = rest.partition("The model continues `def `:\n\ndef ")[2]
    assert len(sample.partition("\n\n")[0]) > 20
    assert "mamba-train export" in rest and "mamba-train generate" in rest


def test_nothing_of_the_libraries_noise_reaches_the_user(finished: Finished) -> None:
    for noise in ("WARNING", "[INFO]", "accelerator", "Warning:", "[rank 1]", "Traceback", "destroy_process_group"):
        assert noise not in finished.text


def test_status_and_metrics_agree_with_the_json_lines(finished: Finished) -> None:
    losses = {row["step"]: row["loss"] for row in steps(finished.folder)}
    trained = [answer for answer in finished.answers if answer["step"]]
    assert len({answer["step"] for answer in trained}) > 2
    for answer in trained:
        assert answer["maxSteps"] == STEPS
        assert answer["loss"] == pytest.approx(losses[answer["step"]])
        assert [rank["rank"] for rank in answer["ranks"]] == [0, 1]
    assert [answer["step"] for answer in trained] == sorted(answer["step"] for answer in trained)
    seen = [_metrics(text) for text in finished.metrics]
    during = [metrics for metrics in seen if metrics.get("mamba_training_step")]
    assert during
    for metrics in during:
        step = int(metrics["mamba_training_step"])
        assert metrics["mamba_training_loss"] == pytest.approx(losses[step])
        assert metrics["mamba_training_tokens_total"] == step * 4 * SEQUENCE


def _metrics(text: str) -> dict[str, float]:
    lines = (line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#"))
    return {name.partition("{")[0]: float(value) for name, _, value in lines}


def test_deepspeeds_monitor_shows_loss_and_evaluation_in_tensorboard(finished: Finished) -> None:
    (file,) = (finished.folder / "tensorboard").rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    losses = [event.value for event in events.Scalars("Train/Samples/train_loss")]
    assert losses == pytest.approx([row["loss"] for row in steps(finished.folder)])
    assert 0 < events.Scalars("Eval/Samples/bits_per_byte")[-1].value < 10
    assert events.Scalars("Train/Samples/lr")


def test_verify_says_sound_and_names_what_is_damaged(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["verify", str(finished.folder / "checkpoints")])
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0
    assert [Path(line.partition(":")[0]).name for line in lines] == ["final", "step_36", "step_32", "step_28"]
    assert all(": sound: step " in line for line in lines)
    copy = tmp_path / "final"
    subprocess.run(["cp", "-r", finished.folder / "checkpoints/final", copy], check=True)
    shard = copy / "mp_rank_00_model_states.pt"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        cli.main(["verify", str(copy)])
    assert ended.value.code == 72
    assert "DAMAGED: mp_rank_00_model_states.pt has SHA-256" in capsys.readouterr().out


def test_an_export_loads_in_transformers_and_generates_as_our_own_command_does(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import MambaForCausalLM

    final, exported = finished.folder / "checkpoints/final", tmp_path / "exported"
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", str(final), str(exported), "--format", "hf"])
    assert ended.value.code == 0
    capsys.readouterr()
    prompt = "for in range "
    with pytest.raises(SystemExit):
        cli.main(["generate", str(final), "--prompt", prompt, "--temperature", "0", "--max_new_tokens", "20"])
    ours = capsys.readouterr().out.removesuffix("\n")
    assert ours.startswith(prompt) and len(ours) > len(prompt)
    model = MambaForCausalLM.from_pretrained(exported)
    ids = torch.tensor([list(prompt.encode())])
    theirs = model.generate(ids, max_new_tokens=20, do_sample=False)[0].tolist()
    assert bytes(theirs[: len(ours.encode())]).decode() == ours


# `deepspeed` reads --num_gpus itself and gives the script --local_rank; on a machine without GPUs both starters
# work as they are, without --bind_cores_to_rank or a hostfile.
STARTERS = {
    "torchrun": (BIN / "torchrun", "--nproc_per_node", "2", "--master_port", "PORT"),
    "deepspeed": (BIN / "deepspeed", "--num_gpus=2", "--master_port", "PORT"),
}


@pytest.mark.parametrize("starter", STARTERS)
def test_other_starters_train_too(starter: str, tmp_path: Path) -> None:
    words = (str(free_port()) if word == "PORT" else word for word in STARTERS[starter])
    arguments = options(tmp_path, steps=4)
    at = arguments.index("--num_gpus")
    del arguments[at : at + 2]  # the starter says how many
    process = start(tmp_path, *words, SCRIPT, *arguments)
    assert process.wait(120) == 0, (tmp_path / "output").read_text()
    assert verify(tmp_path / "checkpoints/final").world_size == 2
    assert last_step(tmp_path) == 4
    text = (tmp_path / "output").read_text()
    assert text.count("Mamba-1") == 1 and text.count("held-out") == 1


def test_a_mistake_under_torchrun_is_told_once(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, *options(tmp_path, model__d_modle=1)]
    alone = dict(os.environ) | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    ended = [
        subprocess.run(command, env=alone | {"RANK": rank, "LOCAL_RANK": rank}, capture_output=True, text=True)
        for rank in ("0", "1")
    ]
    assert [process.returncode for process in ended] == [64, 64]
    assert "d_modle: unknown option" in ended[0].stderr
    assert ended[1].stderr == ""


def test_sigterm_while_the_ranks_import_ends_soon_with_nothing_started(tmp_path: Path) -> None:
    process = start(tmp_path, sys.executable, SCRIPT, *options(tmp_path))
    family = psutil.Process(process.pid)
    eventually(lambda: len(family.children()) == 3, "guard and two ranks", 30)
    time.sleep(1)
    ranks = family.children()
    process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    assert process.wait(10) == 75
    assert time.monotonic() - started < 4
    assert not psutil.wait_procs(ranks, timeout=2)[1]
    assert checkpoints(tmp_path) == []
    text = (tmp_path / "output").read_text()
    assert "Traceback" not in text and "Next start: from the newest checkpoint, if there is one." in text
