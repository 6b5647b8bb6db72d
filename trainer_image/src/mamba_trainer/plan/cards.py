"""The cards people train on, so that a machine can be planned for that is not at hand.

Usable bytes are what a process finds free on an otherwise idle card (driver reservation and ECC taken off,
our own CUDA context not). Peaks are dense bf16 with fp32 accumulation, bandwidths the vendor's."""

from __future__ import annotations

import difflib
from typing import NamedTuple

from mamba_trainer.contract import UserError
from mamba_trainer.plan.schema import Hardware


class Card(NamedTuple):
    name: str
    usable_bytes: int
    peak_flops: float | None
    bandwidth: float | None
    #: All of these in a product name, as the driver reports it, mean this card.
    product_words: tuple[str, ...]


#: In ascending usable memory, so that "the smallest card that fits" is the first that does.
CARDS = (
    Card("A10", int(23.0e9), 125e12, 600e9, ("A10",)),
    Card("L4", int(23.0e9), 121e12, 300e9, ("L4",)),
    Card("RTX 3090", int(24.5e9), 71e12, 936e9, ("3090",)),
    Card("RTX 4090", int(24.5e9), 165e12, 1008e9, ("4090",)),
    Card("RTX 5090", int(33.3e9), 209e12, 1792e9, ("5090",)),
    Card("vGPU-32GB", int(33.5e9), None, None, ("VGPU",)),
    Card("A100-40GB", int(42.0e9), 312e12, 1555e9, ("A100", "40GB")),
    Card("L40S", int(47.3e9), 362e12, 864e9, ("L40S",)),
    Card("A100-80GB", int(84.5e9), 312e12, 2039e9, ("A100", "80GB")),
    Card("H100", int(84.5e9), 989e12, 3350e9, ("H100", "80GB")),
    Card("H200", int(149.5e9), 989e12, 4800e9, ("H200",)),
    Card("B200", int(190.0e9), 2250e12, 8000e9, ("B200",)),
)


def from_product_name(product: str) -> Card | None:
    """The card that a driver calls `product`, e.g. `NVIDIA GeForce RTX 4090`; None: not in the table."""
    words = product.upper().replace("-", " ").split()
    return next((card for card in CARDS if all(word in words for word in card.product_words)), None)


def named(name: str, gpus: int, *, nodes: int = 1, host_bytes: int | None = None) -> Hardware:
    """Other hardware than the machine at hand, by the name of its card.

    Raises:
        UserError: the card is not in the table; the message lists it.
    """
    wanted = _key(name)
    by_key = {_key(card.name): card for card in CARDS}
    card = by_key.get(wanted) or next((c for key, c in by_key.items() if key.endswith(wanted) and wanted), None)
    if card is None:
        near = difflib.get_close_matches(wanted, by_key, n=1, cutoff=0.4)
        hint = f" Did you mean {by_key[near[0]].name}?" if near else ""
        raise UserError(f"There is no card {name!r} in the table.{hint} Cards: {', '.join(c.name for c in CARDS)}.")
    return on_card(card, gpus, nodes=nodes, host_bytes=host_bytes)


def on_card(card: Card, gpus: int, *, nodes: int = 1, host_bytes: int | None = None) -> Hardware:
    return Hardware(
        gpus=gpus,
        nodes=nodes,
        name=card.name,
        gpu_bytes=card.usable_bytes,
        peak_flops=card.peak_flops,
        memory_bandwidth=card.bandwidth,
        host_bytes=host_bytes,
    )


def _key(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())
