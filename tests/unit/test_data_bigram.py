"""The bigram baseline: a proper distribution, as good as two symbols allow, and measured like the model."""

import asyncio
import math
from pathlib import Path

import numpy as np
import pytest

from mamba_trainer.data.bigram import _Bigram, bigram_bits_per_byte
from mamba_trainer.data.prepare import prepare


def markov_text(seed: int, size: int) -> str:
    """Two letters, each followed by itself with probability 0.9: an entropy of 0.469 bits a letter."""
    switches = np.random.default_rng(seed).random(size) < 0.1
    return "".join(np.where(np.cumsum(switches) % 2, "a", "b"))


@pytest.mark.parametrize("discount", [0.1, 0.5, 0.95])
@pytest.mark.parametrize("context", [0, 1, 2, 3, 4])
def test_probabilities_sum_to_one_after_every_token_seen_or_not(discount, context):
    model = _Bigram(np.array([0, 1, 0, 1, 1, 2, 0, 3]), vocab_size=5)
    total = sum(math.exp(-model.nats(np.array([context, target]), discount)) for target in range(5))
    assert total == pytest.approx(1, rel=1e-12)


def test_a_source_of_pairs_is_coded_at_its_entropy(tmp_path):
    entropy = -(0.1 * math.log2(0.1) + 0.9 * math.log2(0.9))
    (tmp_path / "text.txt").write_text(markov_text(0, 4_000_000))
    prepare(tmp_path / "text.txt", tmp_path / "out", validation_fraction=0.1, workers=1)
    baseline = bigram_bits_per_byte(tmp_path / "out")
    assert baseline.tokens == baseline.bytes == pytest.approx(entropy, rel=0.02)


def test_the_byte_bigram_is_the_same_whatever_the_tokenizer_and_tokens_do_better(tmp_path):
    source = Path(asyncio.__file__).parent  # real text, in small
    results = {}
    for tokenizer in ("byte", "bpe:512"):
        out = tmp_path / tokenizer.replace(":", "")
        prepare(source, out, tokenizer=tokenizer, validation_fraction=0.4, workers=1)
        results[tokenizer] = bigram_bits_per_byte(out)
    assert results["bpe:512"].bytes == pytest.approx(results["byte"].bytes, rel=1e-12)
    assert 1 < results["bpe:512"].tokens < results["byte"].bytes < 5
