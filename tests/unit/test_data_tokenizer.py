"""Tokenizers: text comes back as it went in, and a dataset knows the tokenizer it was made with."""

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Engine
from tokenizers import models, pre_tokenizers

from mamba_trainer.contract import UserError
from mamba_trainer.data.tokenizer import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
    load_tokenizer,
    open_tokenizer,
    train_bpe,
)

TEXTS = ["def f(x):\n    return x + 1\n", "naïve 日本 🐍\r\n\ttab", "a <|endoftext|> spelled out"]


@pytest.fixture(scope="module")
def bpe() -> HuggingFaceTokenizer:
    return train_bpe([Path(__file__).read_text()], 400)


def write(tokenizer: Tokenizer, folder: Path) -> Path:
    for name, content in tokenizer.files().items():
        (folder / name).write_bytes(content)
    return folder


@given(st.text())
def test_bytes_come_back_as_they_went_in(text):
    tokenizer = ByteTokenizer()
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.decode([*ids, tokenizer.eot_id]) == text
    assert len(ids) == len(text.encode())


@pytest.mark.parametrize("text", TEXTS)
def test_a_trained_bpe_gives_text_back_as_it_was_and_uses_fewer_tokens_than_bytes(bpe, text):
    (ids,) = bpe.encode_batch([text])
    assert bpe.decode(ids) == text
    assert len(ids) < len(text.encode())
    assert ids.max() < bpe.vocab_size == 400


@pytest.mark.parametrize("kind", ["as loaded", "after a journey to a worker", "from the dataset"])
def test_a_document_that_spells_the_end_of_text_does_not_end_there(bpe, kind, tmp_path):
    tokenizer = {
        "as loaded": lambda: bpe,
        "after a journey to a worker": lambda: pickle.loads(pickle.dumps(bpe)),
        "from the dataset": lambda: open_tokenizer(write(bpe, tmp_path), bpe.record()),
    }[kind]()
    (ids,) = tokenizer.encode_batch(["a <|endoftext|> spelled out"])
    assert tokenizer.eot_id not in ids


def test_training_twice_gives_the_same_tokenizer(bpe):
    assert train_bpe([Path(__file__).read_text()], 400).record() == bpe.record()


def test_a_dataset_refuses_a_tokenizer_file_that_was_changed(bpe, tmp_path):
    record = bpe.record()
    file = write(bpe, tmp_path) / "tokenizer.json"
    assert open_tokenizer(tmp_path, record).record() == record
    file.write_text(file.read_text().replace("endoftext", "endofText"))
    with pytest.raises(UserError, match="not the tokenizer this dataset was prepared with"):
        open_tokenizer(tmp_path, record)
    file.unlink()
    with pytest.raises(UserError, match="is missing"):
        open_tokenizer(tmp_path, record)


def test_a_saved_tokenizer_that_truncates_and_adds_tokens_still_encodes_the_whole_document(bpe, tmp_path):
    engine = Engine.from_str(bpe.files()["tokenizer.json"].decode())
    engine.enable_truncation(4)
    engine.enable_padding(length=8)
    engine.save(str(tmp_path / "tokenizer.json"))
    text = TEXTS[0]
    (ids,) = load_tokenizer(tmp_path).encode_batch([text])
    assert ids.tolist() == bpe.encode_batch([text])[0].tolist()


def test_gpt2_files_give_the_same_tokens_as_the_tokenizer_they_came_from(bpe, tmp_path):
    model = json.loads(bpe.files()["tokenizer.json"])["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in model["merges"]))
    loaded = load_tokenizer(tmp_path)
    assert [ids.tolist() for ids in loaded.encode_batch(TEXTS)] == [ids.tolist() for ids in bpe.encode_batch(TEXTS)]
    assert (loaded.eot_id, loaded.vocab_size) == (bpe.eot_id, bpe.vocab_size)


def word_level(folder: Path, *tokens: str) -> Path:
    engine = Engine(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))
    engine.pre_tokenizer = pre_tokenizers.Whitespace()
    engine.save(str(folder / "tokenizer.json"))
    return folder


def test_the_end_of_text_is_the_one_the_saved_folder_names(tmp_path):
    folder = word_level(tmp_path, "<unk>", "</s>", "<end>")
    assert load_tokenizer(folder).eot_id == 1
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "<end>"}}')
    assert load_tokenizer(folder).eot_id == 2
    assert load_tokenizer(folder, eot_token="<unk>").eot_id == 0


@pytest.mark.parametrize(
    ("spec", "content", "message"),
    [
        ("nowhere", None, "no tokenizer at"),
        ("broken.json", "{", "is not a tokenizer.json"),
        ("latin.json", b"\xe9", "cannot read the tokenizer"),
    ],
)
def test_what_is_no_tokenizer_is_refused_with_what_would_be_one(tmp_path, spec, content, message):
    if content is not None:
        (tmp_path / spec).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path / spec)


def test_a_tokenizer_without_an_end_of_text_asks_for_one(tmp_path):
    with pytest.raises(UserError, match="--eot-token"):
        load_tokenizer(word_level(tmp_path, "<unk>", "word"))
