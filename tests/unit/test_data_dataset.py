"""Windows of tokens: each token is a target once, and data that does not fit the model is refused."""

import math
import pkgutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mamba_trainer import data
from mamba_trainer.contract import UserError
from mamba_trainer.data.dataset import (
    TokenDataset,
    bits_per_byte,
    check_vocabulary,
    open_datasets,
)
from mamba_trainer.data.prepare import prepare
from mamba_trainer.data.tokenfile import TokenStream

LINES = [f"line {i} of a small text, {i * i}\n" for i in range(400)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    (folder / "lines.jsonl").write_text("".join(f'{{"text": "{line[:-1]}"}}\n' for line in LINES))
    prepare(folder / "lines.jsonl", folder / "out", validation_fraction=0.2, workers=1)
    return folder / "out"


def write_megatron(stem: Path, documents: list[list[list[int]]], code: int = 8, dtype: str = "<u2") -> Path:
    """Megatron's format, written from its description: documents of sequences of tokens."""
    sequences = [sequence for document in documents for sequence in document]
    lengths = [len(sequence) for sequence in sequences]
    size = np.dtype(dtype).itemsize
    pointers = [size * sum(lengths[:i]) for i in range(len(lengths))]
    starts = [sum(map(len, documents[:i])) for i in range(len(documents) + 1)]
    stem.with_name(stem.name + ".bin").write_bytes(np.concatenate(sequences).astype(dtype).tobytes())
    stem.with_name(stem.name + ".idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, code, len(sequences), len(starts))
        + np.array(lengths, "<i4").tobytes()
        + np.array(pointers, "<i8").tobytes()
        + np.array(starts, "<i8").tobytes()
    )
    return stem


def dataset_of(tokens: int, sequence_length: int) -> TokenDataset:
    stream = TokenStream(np.arange(tokens, dtype="<u2"), np.array([0, tokens]), None, "numbers")
    return TokenDataset(stream, sequence_length, None)


def test_data_is_read_and_prepared_without_torch_and_without_the_libraries_of_other_formats():
    modules = [module.name for module in pkgutil.iter_modules(data.__path__, "mamba_trainer.data.")]
    assert "mamba_trainer.data.prepare" in modules
    heavy = ["torch", "transformers", "datasets", "pyarrow"]
    program = f"import sys, {', '.join(modules)}; sys.exit(bool(set({heavy}) & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_a_window_holds_its_inputs_and_one_more_token_for_the_last_target():
    dataset = dataset_of(22, 5)
    assert len(dataset) == 4
    batch = dataset.batch(np.array([3, 0]))
    assert batch.dtype == np.int64
    assert batch.tolist() == [[15, 16, 17, 18, 19, 20], [0, 1, 2, 3, 4, 5]]


@given(st.integers(6, 200), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))
def test_evaluation_sees_each_token_but_the_first_as_a_target_once_over_all_ranks(
    tokens, length, batch_size, world_size
):
    dataset = dataset_of(tokens, length)
    ranks = [list(dataset.evaluation_batches(batch_size, rank, world_size)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1  # else a collective of the model would hang
    targets = []
    for batch in (batch for batches in ranks for batch in batches):
        assert batch.tokens.shape == (batch_size, length + 1)
        inputs = batch.tokens[:, :-1]
        targets += batch.tokens[:, 1:][batch.mask].tolist()
        assert (inputs[batch.mask] + 1 == batch.tokens[:, 1:][batch.mask]).all()
    assert sorted(targets) == list(range(1, tokens)) == list(range(1, dataset.targets + 1))


def test_a_uniform_model_over_the_byte_vocabulary_costs_its_bits_and_the_ends_of_documents(prepared):
    dataset = TokenDataset.open(prepared, "validation", 64)
    nats = sum(int(batch.valid.sum()) * math.log(257) for batch in dataset.evaluation_batches(4))
    split = dataset.meta.splits["validation"]
    expected = math.log2(257) * (split.source_bytes + split.documents) / split.source_bytes
    assert bits_per_byte(nats, dataset.stream.source_bytes) == pytest.approx(expected, rel=1e-12)


def test_documents_of_both_splits_are_together_the_source(prepared):
    texts = []
    for split in ("train", "validation"):
        stream = TokenDataset.open(prepared, split, 8).stream
        assert stream.tokens[0] == 256
        for start, stop in zip(stream.document_offsets[:-1], stream.document_offsets[1:], strict=True):
            assert stream.tokens[stop - 1] == 256
            texts.append(bytes(stream.tokens[start : stop - 1].tolist()).decode() + "\n")
    assert sorted(texts) == sorted(LINES)


def test_a_split_shorter_than_one_window_is_refused_with_both_numbers(prepared):
    with pytest.raises(UserError, match=r"holds [\d,]+ tokens, fewer than one sample of 1,000,001"):
        TokenDataset.open(prepared, "train", 1_000_000)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "train.bin").write_bytes((d / "train.bin").read_bytes()[:-2]), "train.bin holds"),
        (lambda d: (d / "train.idx").unlink(), "train.idx is missing"),
        (lambda d: (d / "meta.json").unlink(), "not a prepared dataset"),
        (lambda d: (d / "meta.json").write_text("{}"), "does not describe a dataset"),
        (lambda d: (d / "meta.json").write_text("{"), "does not describe a dataset"),
    ],
)
def test_a_dataset_that_was_not_copied_completely_is_refused(prepared, tmp_path, damage, message):
    for file in prepared.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    TokenDataset.open(tmp_path, "train", 8)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        TokenDataset.open(tmp_path, "train", 8)


@pytest.mark.parametrize(("code", "dtype"), [(1, "u1"), (4, "<i4"), (5, "<i8"), (8, "<u2")])
def test_megatron_files_are_read_as_megatron_wrote_them(tmp_path, code, dtype):
    stem = write_megatron(tmp_path / "corpus_text", [[[1, 2, 3], [4]], [[5, 6]], [[7]]], code, dtype)
    dataset = TokenDataset.open(stem, "train", 3)
    assert dataset.batch(np.array([0, 1])).tolist() == [[1, 2, 3, 4], [4, 5, 6, 7]]
    assert dataset.stream.document_offsets.tolist() == [0, 4, 6, 7]


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        (".bin", b"\x01", "holds 1 bytes"),
        (".bin", None, "corpus.bin is missing"),
        (".idx", b"not an index", "not a Megatron index"),
        (".idx", b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 6, 0, 0), "token type 6"),
        (".idx", b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 2**40, 2), "shorter than its header"),
        (".idx", b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 0, 0), "is damaged"),
    ],
)
def test_damaged_megatron_files_are_refused(tmp_path, suffix, content, message):
    file = write_megatron(tmp_path / "corpus", [[[1, 2, 3, 4]]]).with_name("corpus" + suffix)
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        TokenDataset.open(tmp_path / "corpus", "train", 2)


def test_megatron_sequences_out_of_order_are_refused(tmp_path):
    index = write_megatron(tmp_path / "corpus", [[[1, 2]], [[3, 4]]]).with_name("corpus.idx")
    raw = index.read_bytes()
    index.write_bytes(raw.replace(struct.pack("<qq", 0, 4), struct.pack("<qq", 4, 0)))
    with pytest.raises(UserError, match="out of order"):
        TokenDataset.open(tmp_path / "corpus", "train", 2)


def test_held_out_data_is_never_the_training_data(prepared, tmp_path):
    train, validation = open_datasets(prepared, None, 8)
    assert validation is not None
    assert validation.stream.origin != train.stream.origin
    megatron = write_megatron(tmp_path / "train", [[list(range(100))]])
    assert open_datasets(megatron, None, 8)[1] is None
    other = write_megatron(tmp_path / "held_out", [[list(range(50))]])
    assert open_datasets(megatron, other, 8)[1].targets == 49


def test_validation_data_of_another_tokenizer_is_refused(prepared, tmp_path):
    (tmp_path / "text.txt").write_text("".join(LINES) * 20)
    prepare(tmp_path / "text.txt", tmp_path / "out", tokenizer="bpe:300", validation_fraction=0.5, workers=1)
    with pytest.raises(UserError, match="'byte' and validation data with 'bpe:300'"):
        open_datasets(prepared, tmp_path / "out", 8)


def test_a_vocabulary_larger_than_the_models_is_refused_with_both_numbers_and_the_fix(prepared):
    dataset = TokenDataset.open(prepared, "train", 8)
    with pytest.raises(UserError, match=r"vocabulary is 257, but model.vocab_size is 256\nSet .* to 257"):
        check_vocabulary(dataset, 256)


def test_a_model_with_a_far_larger_vocabulary_is_advised_and_one_that_fits_is_not(prepared):
    dataset = TokenDataset.open(prepared, "train", 8)
    assert check_vocabulary(dataset, 257) is check_vocabulary(dataset, 514) is None
    assert "50,257" in check_vocabulary(dataset, 50_257)


@pytest.mark.parametrize(("dtype", "code", "bad"), [("<u2", 8, 300), ("<i4", 4, -1)])
def test_megatron_tokens_that_the_model_has_no_embedding_for_are_refused(tmp_path, dtype, code, bad):
    dataset = TokenDataset.open(write_megatron(tmp_path / "c", [[[1, 2, bad, 4]]], code, dtype), "train", 2)
    with pytest.raises(UserError, match=f"{bad}"):
        check_vocabulary(dataset, 300)
