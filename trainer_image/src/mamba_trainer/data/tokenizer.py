"""Text to token ids and back, behind one small interface.

Only two kinds exist: raw bytes, which need no file, and a `tokenizers` tokenizer from local files. Text is
data: no special token is ever added, and one that a document spells out is encoded as the characters it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, pre_tokenizers, trainers

from mamba_trainer.contract import UserError

Ids = NDArray[np.uint32]

TOKENIZER_FILE = "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"

#: What the common families call the end of a document, tried in this order when no configuration names it.
_END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")


class TokenizerRecord(BaseModel):
    """What a prepared dataset remembers of its tokenizer: enough to refuse another one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["byte", "huggingface"]
    name: str
    vocab_size: int
    eot_id: int
    sha256: str | None = None


class Tokenizer(Protocol):
    @property
    def vocab_size(self) -> int: ...

    @property
    def eot_id(self) -> int: ...

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]: ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def record(self) -> TokenizerRecord: ...

    def files(self) -> dict[str, bytes]:
        """What a dataset must hold, by file name, for `open_tokenizer` to build this tokenizer again."""


class ByteTokenizer:
    """One token a byte of UTF-8, and 256 for the end of a text."""

    vocab_size = 257
    eot_id = 256

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def record(self) -> TokenizerRecord:
        return TokenizerRecord(kind="byte", name="byte", vocab_size=self.vocab_size, eot_id=self.eot_id)

    def files(self) -> dict[str, bytes]:
        return {}


class HuggingFaceTokenizer:
    """A `tokenizers` tokenizer, kept as the very JSON it came from so that its digest is that of a file."""

    def __init__(self, serialized: str, name: str, eot_id: int) -> None:
        self._serialized = serialized
        self._name = name
        self._engine = _parse(serialized, name)
        self.eot_id = eot_id
        self.vocab_size = 1 + max(self._engine.get_vocab(with_added_tokens=True).values())

    def __reduce__(self) -> tuple[type[HuggingFaceTokenizer], tuple[str, str, int]]:
        # The engine's own pickling forgets `encode_special_tokens`.
        return HuggingFaceTokenizer, (self._serialized, self._name, self.eot_id)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        encodings = self._engine.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return self._engine.decode([i for i in ids if i != self.eot_id], skip_special_tokens=False)

    def record(self) -> TokenizerRecord:
        digest = hashlib.sha256(self._serialized.encode()).hexdigest()
        return TokenizerRecord(
            kind="huggingface", name=self._name, vocab_size=self.vocab_size, eot_id=self.eot_id, sha256=digest
        )

    def files(self) -> dict[str, bytes]:
        return {TOKENIZER_FILE: self._serialized.encode()}


def load_tokenizer(spec: str | Path, eot_token: str | None = None) -> Tokenizer:
    """`byte`, a tokenizer.json, or a folder that holds one (or GPT-2's vocab.json and merges.txt)."""
    if str(spec) == "byte":
        return ByteTokenizer()
    path = Path(spec)
    folder = path if path.is_dir() else path.parent
    if path.is_file():
        serialized = _read(path)
    elif (path / TOKENIZER_FILE).is_file():
        serialized = _read(path / TOKENIZER_FILE)
    elif (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        serialized = _from_vocab_and_merges(path)
    else:
        raise UserError(
            f"no tokenizer at {path}\n"
            "Give `byte`, `bpe:N` (trained on your text), a tokenizer.json, or a folder that holds "
            "tokenizer.json or vocab.json and merges.txt."
        )
    engine = _parse(serialized, str(path))
    eot_id = _find_end_of_text(engine, str(path), eot_token or _configured_eos(folder))
    return HuggingFaceTokenizer(serialized, path.name, eot_id)


def open_tokenizer(directory: Path, record: TokenizerRecord) -> Tokenizer:
    """The tokenizer of a prepared dataset, proven to be the one its tokens were made with."""
    if record.kind == "byte":
        return ByteTokenizer()
    path = directory / TOKENIZER_FILE
    if not path.is_file():
        raise UserError(f"{path} is missing: copy it from where the dataset was prepared, or prepare again")
    tokenizer = HuggingFaceTokenizer(_read(path), record.name, record.eot_id)
    if tokenizer.record() != record:
        raise UserError(f"{path} is not the tokenizer this dataset was prepared with: prepare the dataset again")
    return tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int) -> HuggingFaceTokenizer:
    """A byte-level BPE: every text can be encoded, and decodes to itself.

    Progress is the caller's: it sees `texts` being consumed; what follows takes seconds.
    """
    engine = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator(texts, trainer)
    name = f"bpe:{vocab_size}"
    return HuggingFaceTokenizer(engine.to_str(), name, _find_end_of_text(engine, name, END_OF_TEXT))


def _byte_level(model: Any) -> Engine:
    engine = Engine(model)
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    return engine


def _from_vocab_and_merges(folder: Path) -> str:
    try:
        engine = _byte_level(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"cannot read vocab.json and merges.txt in {folder}: {error}") from error
    if engine.token_to_id(END_OF_TEXT) is not None:
        engine.add_special_tokens([END_OF_TEXT])
    return engine.to_str()


def _parse(serialized: str, name: str) -> Engine:
    try:
        engine = Engine.from_str(serialized)
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{name} is not a tokenizer.json that `tokenizers` can read: {error}") from error
    # Saved tokenizers often carry the truncation of the model they served, which would cut documents short.
    engine.no_truncation()
    engine.no_padding()
    engine.encode_special_tokens = True
    return engine


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the tokenizer {path}: {error}") from error


def _configured_eos(folder: Path) -> str | None:
    """`eos_token` of a saved Hugging Face tokenizer: a string, or an object with its content."""
    config = folder / "tokenizer_config.json"
    if not config.is_file():
        return None
    try:
        eos = json.loads(_read(config)).get("eos_token")
    except ValueError as error:
        raise UserError(f"{config} is not valid JSON: {error}") from error
    return eos.get("content") if isinstance(eos, dict) else eos


def _find_end_of_text(engine: Engine, name: str, wanted: str | None) -> int:
    for token in (wanted,) if wanted else _END_OF_TEXT_NAMES:
        token_id = engine.token_to_id(token)
        if token_id is not None:
            return int(token_id)
    what = f"no token {wanted!r}" if wanted else "none of the usual end-of-text tokens"
    raise UserError(f"the tokenizer {name} has {what}: name the one that ends a document with --eot-token")
