"""Reading and writing a model's tensors one at a time, so that no conversion holds a whole 7B."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mamba_trainer.contract import UserError

#: Bytes of one safetensors file; also the most that writing holds in memory.
SHARD_BYTES = 5 * 10**9

_SAFETENSORS, _INDEX, _BIN = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"


@dataclass(frozen=True)
class Weights:
    """Tensors that are read when asked for."""

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    origin: Path

    def only(self, shapes: Mapping[str, tuple[int, ...]]) -> Weights:
        """The tensors that a model of these `shapes` has, in their order.

        Raises:
            UserError: one is missing or has another shape; names the first.
        """
        for name, shape in shapes.items():
            found = self.shapes.get(name)
            if found is None:
                raise UserError(f"{self.origin} has no tensor {name}, which the model of its configuration needs.")
            if found != shape:
                raise UserError(
                    f"{self.origin}: {name} has shape {found}, the model of its configuration needs {shape}."
                )
        return Weights(shapes, self.read, self.origin)

    def renamed(self, rename: Callable[[str], str]) -> Weights:
        original = {rename(name): name for name in self.shapes}
        return Weights(
            {new: self.shapes[old] for new, old in original.items()},
            lambda name: self.read(original[name]),
            self.origin,
        )


def open_folder(folder: Path) -> Weights:
    """The weights of a folder: `model.safetensors`, its shards with an index, or `pytorch_model.bin`.

    Raises:
        UserError: there is none of them, or a file cannot be read.
    """
    if (folder / _INDEX).is_file():
        return _safetensors(folder, _listed(folder / _INDEX))
    if (folder / _SAFETENSORS).is_file():
        return _safetensors(folder, [_SAFETENSORS])
    if (folder / _BIN).is_file():
        return _bin(folder / _BIN)
    raise UserError(f"{folder} holds no weights: expected {_SAFETENSORS} (or its shards with {_INDEX}) or {_BIN}.")


def _listed(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index} is not an index of safetensors files: copy it again.") from None


def _safetensors(folder: Path, files: list[str]) -> Weights:
    shapes: dict[str, tuple[int, ...]] = {}
    home: dict[str, Path] = {}
    for file in files:
        path = folder / file
        try:
            with safe_open(path, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    shapes[name], home[name] = tuple(opened.get_slice(name).get_shape()), path
        except Exception as error:
            raise UserError(f"{path} cannot be read: {error}. Copy it again.") from None

    def read(name: str) -> Tensor:
        with safe_open(home[name], framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor

    return Weights(shapes, read, folder)


def _bin(path: Path) -> Weights:
    try:
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    except Exception as error:  # torch raises several kinds for a file that is cut, foreign or unsafe
        raise UserError(f"{path} cannot be read as a PyTorch state dict: {str(error).splitlines()[0]}") from None
    return Weights(shapes, state.__getitem__, path)


def write_safetensors(folder: Path, weights: Weights, dtype: torch.dtype) -> None:
    """As Hugging Face lays them out: one file, or shards of at most `SHARD_BYTES` with an index."""
    shards = list(_shards(weights.shapes, dtype.itemsize, SHARD_BYTES))
    where: dict[str, str] = {}
    reading = _with_progress(weights, folder)
    for number, names in enumerate(shards, start=1):
        file = _SAFETENSORS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: next(reading).to(dtype).contiguous() for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(names, file)
        del tensors  # or the next shard would be read beside this one
    if len(shards) > 1:
        total = sum(map(math.prod, weights.shapes.values())) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / _INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


def _shards(shapes: Mapping[str, tuple[int, ...]], itemsize: int, limit: int) -> Iterator[list[str]]:
    shard: list[str] = []
    filled = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * itemsize
        if shard and filled + size > limit:
            yield shard
            shard, filled = [], 0
        shard.append(name)
        filled += size
    yield shard


def write_bin(folder: Path, weights: Weights, dtype: torch.dtype, aliases: Mapping[str, str]) -> None:
    """One `pytorch_model.bin`; `aliases` are further names of tensors, stored once.

    The tensors wait for `torch.save` in files mapped into memory, whose pages the system may write out.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".tensors-") as scratch:
        state: dict[str, Tensor] = {}
        for (name, shape), tensor in zip(weights.shapes.items(), _with_progress(weights, folder), strict=True):
            file = Path(scratch) / str(len(state))
            mapped = torch.from_file(str(file), shared=True, size=math.prod(shape), dtype=dtype).view(shape)
            state[name] = mapped.copy_(tensor)
        state |= {alias: state[name] for alias, name in aliases.items()}
        torch.save(state, folder / _BIN)


def _with_progress(weights: Weights, folder: Path) -> Iterator[Tensor]:
    console = Console(stderr=True)
    names = track(
        list(weights.shapes),
        f"writing {folder.name}",
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    return (weights.read(name) for name in names)
