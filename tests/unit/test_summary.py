"""The screens before training: complete, on one screen, and the same for the same plan."""

import pytest

from mamba_trainer import summary
from mamba_trainer.config import parse_config
from mamba_trainer.plan import Hardware, memory_table, named, plan_training

MACHINES = {
    "7b on 24 GB cards": ("7b_mamba", named("RTX 4090", 4)),
    "7b with all on the host": (
        "7b_mamba",
        named("RTX 3090", 2).model_copy(update={"gpu_bytes": 12 * 10**9}),
    ),
    "tiny on a laptop": ("tiny", Hardware(gpus=0, cpu_count=2, host_bytes=8 * 10**9, disk_bytes=50 * 10**9)),
    "1b on two nodes": ("1b_mamba", named("H100", 4, nodes=2, host_bytes=10**12)),
}


def screen(case: str, width: int = 80) -> str:
    preset, hardware = MACHINES[case]
    config = parse_config(
        {
            "preset": preset,
            "parallelism": {"num_gpus": hardware.gpus * hardware.nodes or 2},
            "data": {"path": "/data/[old]/tokens"},
            "checkpoint": {"directory": "/data/run/checkpoints"},
            "reporting": {"jsonl": "/data/run/log.jsonl"},
        }
    )
    return summary.to_text(summary.render(config, plan_training(config, hardware), hardware), width=width)


@pytest.mark.parametrize("case", MACHINES)
@pytest.mark.parametrize("width", [80, 120])
def test_the_summary_fits_one_screen_and_is_deterministic(case, width):
    text = screen(case, width)
    assert len(text.splitlines()) <= 40
    assert max(map(len, text.splitlines())) <= width
    assert text == screen(case, width)
    assert "\x1b" not in text and "…" not in text


def test_the_summary_says_what_will_happen_what_it_takes_and_where_things_go():
    text = " ".join(screen("7b on 24 GB cards").split())
    for fact in (
        "7b_mamba: Mamba-1, 6,922,736,640 parameters",
        "4 x RTX 4090, 24.5 GB usable on each",
        "ZeRO-2, optimizer on the host, recompute every 3 blocks; bf16",
        "32 sequences = micro-batch 1 x 8 accumulation x 4 ranks",
        "131,072 tokens each",
        "96.9 GB every 1,000 steps",
        "checkpoints: /data/run/checkpoints",
        "data: /data/[old]/tokens",
        "log: /data/run/log.jsonl",
        "of 24.5 GB (estimate)",
        "Faster, but does not fit: ZeRO-2 (",
        "it was not checked",
    ):
        assert fact in text


def test_a_laptop_is_told_that_it_has_no_gpu_and_what_is_free():
    text = " ".join(screen("tiny on a laptop").split())
    assert "2 CPU processes on 2 cores (no GPU)" in text
    assert "of 8.0 GB free" in text and "50.0 GB free" in text


def test_terms_of_the_summary_add_up_to_its_total():
    lines = [line.split() for line in screen("7b on 24 GB cards").splitlines() if line.startswith("  ")]
    sizes = {" ".join(words[:-3]) or words[0]: words for words in lines}
    units = {"GB": 1.0, "MB": 1e-3}
    amounts = [
        float(words[i - 1]) * units[words[i]]
        for words in sizes.values()
        for i in range(len(words))
        if words[i] in units
    ]
    assert sum(amounts) == pytest.approx(24.5, abs=0.3)  # with what is free, the whole card


def test_the_memory_table_shows_what_fits_and_answers_the_guide():
    config = parse_config({"preset": "7b_mamba", "parallelism": {"num_gpus": 4}})
    table = memory_table(config, named("RTX 4090", 8))
    cells = {row.mode: {cell.gpus: cell for cell in row.cells} for row in table.rows}
    assert not any(cell.fits for cell in cells["ZeRO-2"].values())
    assert all(cell.gpu_bytes > 13.85e9 for cell in cells["ZeRO-2"].values())
    assert [cells["ZeRO-3"][gpus].fits for gpus in (4, 6, 8)] == [False, False, True]
    assert all(cells["ZeRO-2 + optimizer on host"][gpus].fits for gpus in (1, 4, 6, 8))
    text = summary.to_text(summary.render_memory(table), width=80)
    assert "23.1 / 16.1 / 12.6 GB" in text and "…" not in text
    assert len(text.splitlines()) <= 24
    assert "23.1" not in summary.to_text(
        summary.render_memory(memory_table(parse_config({"preset": "tiny"}), named("L4", 1)))
    )


def test_cells_of_the_table_agree_with_a_plan_for_the_same_wishes():
    config = parse_config({"preset": "3b_mamba", "parallelism": {"num_gpus": 1}})
    row = next(row for row in memory_table(config, named("A100-40GB", 8)).rows if row.mode == "ZeRO-3")
    for cell in row.cells:
        wishes = {
            "num_gpus": cell.gpus,
            "zero_stage": 3,
            "offload_optimizer": "none",
            "offload_parameters": "none",
        }
        asked = {"preset": "3b_mamba", "parallelism": wishes, "training": {"micro_batch_size": 1}}
        if cell.fits:
            assert plan_training(parse_config(asked), named("A100-40GB", 8)).gpu_total == cell.gpu_bytes


def test_the_table_of_a_machine_without_gpus_counts_processes():
    table = memory_table(parse_config({"preset": "tiny"}), Hardware(gpus=0, host_bytes=3 * 10**9))
    text = summary.to_text(summary.render_memory(table), width=80)
    assert "CPU processes" in text and "GB per process" in text
    assert [cell.fits for cell in table.rows[0].cells] == [True, True, True, False, False]
