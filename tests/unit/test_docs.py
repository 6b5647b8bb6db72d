"""What the documents say is what the code does: options, counts, codes, estimates, measurements, links."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
import typer.main

from mamba_trainer import presets, reference
from mamba_trainer.cli import app
from mamba_trainer.config import TrainerConfig, parse_config
from mamba_trainer.contract import ExitCode
from mamba_trainer.plan import memory_table, named
from mamba_trainer.restart import Cause, RestartPolicy

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "trainer_image/README.md", *DOCS.rglob("*.md")])

#: Options of commands that are not `mamba-train`: our install script, torchrun, tests/perf.
FOREIGN_OPTIONS = {"--without_kernels", "--nproc_per_node", "--help", "--out", "--steps", "--micro", "--runs"}


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def rows(page: str) -> list[list[str]]:
    """Cells of all table rows of a page, without markup."""
    lines = (line for line in text(page).splitlines() if line.startswith("|"))
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


def measured(name: str) -> Any:
    return json.loads((DOCS / "measurements" / f"{name}.json").read_text())


def test_the_reference_of_options_is_that_of_the_model():
    assert text("docs/configuration.md") == reference.render(), (
        "python -m mamba_trainer.reference > docs/configuration.md"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_within_the_repository_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve()
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings], target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_option_that_a_page_uses_exists(page: Path):
    commands = typer.main.get_command(app).commands.values()  # type: ignore[attr-defined]
    known = {spelling for command in commands for option in command.params for spelling in option.opts}
    content = page.read_text(encoding="utf-8")
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*", content)) <= known | FOREIGN_OPTIONS
    for group, option in re.findall(
        r"\b(model|data|training|parallelism|checkpoint|reporting)\.([a-z_0-9]+)=", content
    ):
        annotation = TrainerConfig.model_fields[group].annotation
        assert option in annotation.model_fields, f"{group}.{option}"  # type: ignore[union-attr]


@pytest.mark.parametrize("page", ["docs/training.md", "docs/quickstart.zh.md"])
def test_presets_have_the_stated_numbers_of_parameters(page: str):
    stated = {row[0]: row for row in rows(page) if row[0] in presets.names()}
    assert stated.keys() >= set(presets.names()) - {"tiny"}
    for name, row in stated.items():
        config = parse_config({"preset": name})
        if name == "tiny":
            assert "不到一百万" in row and config.model.parameter_count() < 1_000_000
            continue
        assert f"{config.model.parameter_count():,}" in row
        if page == "docs/training.md":
            training = config.training
            assert row[1:4] == [
                str(config.model.d_model),
                str(config.model.n_layer),
                f"{config.model.padded_vocab_size:,}",
            ]
            assert row[5:7] == [str(training.sequence_length), f"{training.max_steps:,}"]
            assert float(row[7]) == training.learning_rate


def test_the_guides_count_comes_out_as_explained():
    d_model, d_inner = 4864, 9728
    assert "6,886,324,736" in text("docs/training.md")
    assert 45 * (6 * d_model**2 + 22 * d_inner) + 2 * 50257 * d_model == 6_886_324_736


def test_every_exit_code_is_explained_with_its_budget():
    table = {row[0]: row for row in rows("docs/checkpoints.md")}
    assert {str(int(code)) for code in ExitCode} <= table.keys()
    budgets = RestartPolicy().budgets
    for code, row in table.items():
        if code.isdecimal() and (budget := budgets.get(Cause.of(int(code)))) is not None:
            assert f"up to {budget} times" in row[2]
        elif code.isdecimal():
            assert "up to" not in row[2]


def test_the_memory_table_is_what_check_memory_prints():
    config = parse_config({"preset": "7b_mamba", "num_gpus": 4})
    stated = {row[0]: row[1:4] for row in rows("docs/memory.md") if row[0].startswith("ZeRO-")}
    for row in memory_table(config, named("RTX 3090", 4)).rows:
        cells = [f"{cell.gpu_bytes / 1e9:.1f}" for cell in row.cells if cell.gpus in (4, 6, 8)]
        assert stated[row.mode] == cells, f"docs/memory.md, {row.mode}: see --check_memory --gpu 'RTX 3090'"


def test_measured_memory_is_that_of_the_rehearsals():
    stated = {row[0][0]: row for row in rows("docs/memory.md") if re.match(r"\d, ZeRO", row[0])}
    runs = measured("rehearsal_7b")
    for run in runs:
        row = stated[str(run["gpus"])]
        assert str(run["cap_gb"]) in row[1]
        assert row[2] == f"{run['peak_allocated'] / 1e9:.2f}"
        assert float(row[3]) == pytest.approx(run["peak_reserved"] / 1e9, abs=0.1)
        assert row[4] == f"{run['planned'] / 1e9:.2f}"
    assert len({run["gpus"] for run in runs}) == len(stated)


def test_the_comparison_with_stock_is_what_was_measured():
    stated = {row[0]: row[1:] for row in rows("docs/benchmarks.md")}
    report = measured("losses_1b")
    both = [report["ours:0"], report["stock:0"]]
    means = [float(cell) for cell in stated["mean loss of the last 20 steps"]]
    assert means == pytest.approx([statistics.mean(run["losses"][-20:]) for run in both], abs=1e-4)
    paces = [float(cell.replace(",", "")) for cell in stated["tokens per second, median"]]
    assert paces == pytest.approx([8192 / statistics.median(run["seconds"][3:]) for run in both], rel=2e-3)
    first = [float(cell) for cell in stated["loss of the first step"]]
    assert first == pytest.approx([run["losses"][0] for run in both], abs=1e-3)
    assert stated["peak memory allocated"] == [f"{run['peak_allocated'] / 1e9:.1f} GB" for run in both]


def test_the_seven_billion_run_is_what_was_measured():
    stated = {row[0]: row[1] for row in rows("docs/benchmarks.md")}
    losses = measured("losses_7b")["ours:0"]["losses"]
    assert [float(loss) for loss in stated["losses of the first five steps"].split(", ")] == pytest.approx(
        losses[:5], rel=5e-3
    )
    assert [float(loss) for loss in stated["losses of the last five"].split(", ")] == pytest.approx(
        losses[-5:], rel=1e-3
    )
    assert max(losses[-5:]) < min(losses[:5])
