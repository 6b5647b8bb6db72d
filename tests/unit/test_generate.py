from typing import Any

import pytest
import torch

from builders import SHAPES, make_model, make_model_config, make_random_model, make_tokens
from mamba_trainer import generate as generation
from mamba_trainer.contract import UserError
from mamba_trainer.generate import Recurrent, choose, generate


@pytest.mark.parametrize("shape", SHAPES)
def test_step_by_step_logits_equal_the_parallel_form_at_every_position(shape: str) -> None:
    model = make_random_model(make_model_config(**SHAPES[shape]))
    tokens = make_tokens(model.config, batch=3, length=17)
    with torch.no_grad():
        expected = model(tokens)
    recurrent = Recurrent(model, batch=3)
    stepped = torch.stack([recurrent.step(tokens[:, t]) for t in range(17)], dim=1)
    torch.testing.assert_close(stepped, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prompt", [1, 2, 7, 16])
@pytest.mark.parametrize("chunk", [3, 64])
def test_steps_go_on_from_a_prompt_of_any_length(prompt: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "_CHUNK", chunk)
    model = make_random_model(make_model_config())
    tokens = make_tokens(model.config, length=17)
    with torch.no_grad():
        expected = model(tokens)
    recurrent = Recurrent(model, batch=2)
    first = recurrent.prefill(tokens[:, :prompt])
    torch.testing.assert_close(first, expected[:, :prompt], rtol=1e-5, atol=1e-5)
    for t in range(prompt, 17):
        torch.testing.assert_close(recurrent.step(tokens[:, t]), expected[:, t], rtol=1e-5, atol=1e-5)


def test_a_sixteen_bit_model_keeps_its_state_in_fp32() -> None:
    model = make_model(make_model_config(), torch.bfloat16)
    tokens = make_tokens(model.config, batch=1, length=40)
    recurrent = Recurrent(model)
    stepped = torch.stack([recurrent.step(tokens[:, t]) for t in range(40)], dim=1)
    with torch.no_grad():
        expected = model(tokens)
    assert all(state.dtype == torch.float32 for state in recurrent._ssm)
    assert (stepped - expected).float().norm() <= 0.02 * expected.float().norm()


def test_greedy_generation_is_the_likeliest_token_of_the_parallel_form() -> None:
    model = make_random_model(make_model_config())
    tokens = [3, 1, 4]
    for token in generate(model, tokens, max_new_tokens=12, temperature=0):
        with torch.no_grad():
            logits = model(torch.tensor([tokens]))[0, -1, : model.config.vocab_size]
        assert token == int(logits.argmax())
        tokens = [*tokens, token]
    assert len(tokens) == 15


def test_the_same_seed_gives_the_same_text_and_another_seed_another() -> None:
    model = make_model(make_model_config())
    first, again, other = (list(generate(model, [1], 30, seed=seed)) for seed in (5, 5, 6))
    assert first == again != other


def test_generation_stops_at_the_stop_token_without_giving_it_out() -> None:
    model = make_random_model(make_model_config())
    whole = list(generate(model, [1], 20, seed=1))
    stop = whole[7]
    assert list(generate(model, [1], 20, seed=1, stop_id=stop)) == whole[: whole.index(stop)]


def test_padding_of_the_vocabulary_is_never_generated() -> None:
    model = make_model(make_model_config(vocab_size=3, pad_vocab_size_multiple=64))
    assert set(generate(model, [0], 60)) == {0, 1, 2}


@pytest.mark.parametrize(("tokens", "said"), [([], "nothing to continue"), ([50], "outside"), ([-1], "outside")])
def test_a_prompt_that_is_none_is_refused(tokens: list[int], said: str) -> None:
    with pytest.raises(UserError, match=said):
        list(generate(make_model(make_model_config()), tokens, 1))


def shares(**options: Any) -> list[float]:
    """How often each of four tokens with probabilities 0.4, 0.1, 0.3, 0.2 is chosen."""
    logits = torch.tensor([0.4, 0.1, 0.3, 0.2]).log()
    generator = torch.Generator().manual_seed(0)
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | options
    drawn = torch.tensor([choose(logits, generator=generator, **options) for _ in range(2_000)])
    return (drawn.bincount(minlength=4) / 2_000).tolist()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.4, 0.1, 0.3, 0.2]),
        ({"temperature": 0}, [1, 0, 0, 0]),
        ({"temperature": 0.5}, [16 / 30, 1 / 30, 9 / 30, 4 / 30]),
        ({"top_k": 2}, [4 / 7, 0, 3 / 7, 0]),
        ({"top_k": 99}, [0.4, 0.1, 0.3, 0.2]),
        # The smallest set that has at least this probability.
        ({"top_p": 0.5}, [4 / 7, 0, 3 / 7, 0]),
        ({"top_p": 0.0}, [1, 0, 0, 0]),
        # top p is taken of what top k left: 0.4 is 4/7 of it.
        ({"top_k": 2, "top_p": 0.55}, [1, 0, 0, 0]),
    ],
)
def test_tokens_are_drawn_with_the_probabilities_that_the_options_leave(
    options: dict[str, Any], expected: list[float]
) -> None:
    assert shares(**options) == pytest.approx(expected, abs=0.035)
