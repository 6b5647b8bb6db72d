"""Text from a trained model: for `mamba-train generate`, and at the end of a run."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mamba_trainer.contract import UserError
from mamba_trainer.run import Run

if TYPE_CHECKING:
    from mamba_trainer.data.tokenfile import Meta

#: Tokens whose pairs are counted in a few seconds.
_QUICK_TOKENS = 100_000_000


def stream_text(
    model: Path,
    prompt: str,
    *,
    data: Path | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
) -> Iterator[str]:
    """The prompt and its continuation, piece by piece.

    Raises:
        UserError: no model there, or no tokenizer to be found.
    """
    import torch

    from mamba_trainer.data.tokenizer import Tokenizer
    from mamba_trainer.generate import generate, load_for_generation

    tokenizer: Tokenizer = _tokenizer(model, data)
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError("The prompt is not valid UTF-8.") from None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = load_for_generation(model, device, torch.float32)
    (ids,) = tokenizer.encode_batch([prompt])
    tokens = [int(i) for i in ids] or [tokenizer.eot_id]
    shown = ""
    for token in generate(
        network, tokens, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        seed=seed, stop_id=tokenizer.eot_id,
    ):  # fmt: skip
        tokens.append(token)
        text = tokenizer.decode(tokens)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character may span tokens
            yield text[len(shown) :]
            shown = text


def _tokenizer(model: Path, data: Path | None):  # type: ignore[no-untyped-def]
    from mamba_trainer.data.tokenfile import read_meta
    from mamba_trainer.data.tokenizer import load_tokenizer, open_tokenizer

    if data is None and (model / "tokenizer.json").is_file():
        return load_tokenizer(model / "tokenizer.json")
    if data is None and (run_file := model.parent / "run.json").is_file():
        data = Run.read(run_file).config.data.path
    if data is None:
        raise UserError(
            f"There is no tokenizer beside {model}: name a checkpoint (step_N, final) or an exported folder, "
            "and the prepared dataset with --data."
        )
    if (meta := read_meta(data)) is None:
        raise UserError(f"{data} is not a prepared dataset: name the one of this model with --data.")
    return open_tokenizer(data, meta.tokenizer)


def print_ending(run: Run) -> None:
    """A sample, where the data have a tokenizer (Megatron files record none), and where everything is."""
    from mamba_trainer.data.tokenfile import read_meta

    directory, data = run.config.checkpoint.directory, run.config.data.path
    final = directory / "final"
    if not final.is_dir():
        return
    if data is not None and (meta := read_meta(data)) is not None:
        _print_sample(final, data)
        _print_baseline(data, meta)
    command = _mamba_train()
    print(
        f"\ncheckpoints: {directory}/ (verified: `{command} verify {directory}`)\n"
        f"data:        {data}\n"
        f"export:      {command} export {final} exported-model --format hf\n"
        f"generate:    {command} generate {final} --prompt 'class '"
    )


def _mamba_train() -> str:
    """The command as this person can type it: on PATH, or in the environment that runs us."""
    if shutil.which("mamba-train"):
        return "mamba-train"
    path = Path(sys.executable).with_name("mamba-train")
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _print_sample(final: Path, data: Path) -> None:
    print("\nThe model continues `def `:\n")
    for piece in stream_text(
        final, "def ", data=data, max_new_tokens=120, temperature=0.8, top_k=50, top_p=1.0, seed=0
    ):
        print(piece, end="", flush=True)
    print()


def _print_baseline(data: Path, meta: Meta) -> None:
    """What the held-out bits per byte are worth: a bigram model of the same tokens, where counting them is quick."""
    from mamba_trainer.data.bigram import bigram_bits_per_byte

    if "validation" in meta.splits and meta.tokens <= _QUICK_TOKENS:
        bits = bigram_bits_per_byte(data).tokens
        print(f"\nfor comparison: a bigram model of the same tokens has {bits:.4f} bits per byte")
