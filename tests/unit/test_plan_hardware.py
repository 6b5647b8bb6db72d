"""What is read of a machine, and the cards that can be named instead."""

import os
from pathlib import Path

import pytest

from mamba_trainer.config import Precision
from mamba_trainer.contract import UserError
from mamba_trainer.plan import CARDS, cards, hardware, named


def test_the_machine_at_hand_is_found(tmp_path):
    found = hardware.detect(tmp_path / "not" / "made" / "yet")
    assert found.cpu_count == len(os.sched_getaffinity(0))
    assert found.disk_bytes is not None and found.disk_bytes > 0
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert found.host_bytes is not None and 0 < found.host_bytes <= total
    assert Precision.FP32 in found.precisions
    assert (found.gpu_bytes is None) == (found.gpus == 0)


def test_a_container_limit_less_its_working_set_is_what_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("4000000\n")
    (tmp_path / "memory.current").write_text("3000000\n")
    (tmp_path / "memory.stat").write_text("anon 500000\ninactive_file 2000000\n")
    assert hardware._left_in_container() == 3_000_000
    assert hardware.detect(tmp_path).host_bytes == 3_000_000


@pytest.mark.parametrize("limit", ["max\n", None])
def test_no_container_limit_leaves_the_memory_of_the_machine(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(hardware, "_CGROUP", tmp_path)
    if limit:
        (tmp_path / "memory.max").write_text(limit)
    assert hardware._left_in_container() is None


@pytest.mark.parametrize(
    ("product", "card"),
    [
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100-40GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA A40", None),
        ("Tesla T4", None),
    ],
)
def test_a_driver_product_name_is_recognised_or_left_unknown(product, card):
    found = cards.from_product_name(product)
    assert (found.name if found else None) == card


@pytest.mark.parametrize("name", ["RTX 4090", "rtx4090", "4090", "rtx-4090"])
def test_a_card_is_named_as_people_write_it(name):
    machine = named(name, 4, host_bytes=10**11)
    assert (machine.name, machine.gpus, machine.gpu_bytes) == ("RTX 4090", 4, 24_500_000_000)


@pytest.mark.parametrize("name", ["RTX 4080", "", "H1000"])
def test_an_unknown_card_is_refused_with_the_table(name):
    with pytest.raises(UserError, match="Cards: A10, L4, RTX 3090"):
        named(name, 1)


def test_cards_stand_in_order_of_memory_so_that_the_smallest_that_fits_is_proposed():
    assert [card.usable_bytes for card in CARDS] == sorted(card.usable_bytes for card in CARDS)
