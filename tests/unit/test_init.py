import math

import pytest
import torch
import torch.nn.functional as F

from builders import CPU, make_model, make_model_config
from mamba_trainer.build import seeded
from mamba_trainer.init import initial_value

CONFIG = make_model_config(d_model=128, n_layer=2, d_state=8, vocab_size=512)
MIXER = "backbone.layers.1.mixer."


def value(name: str, seed: int = 0) -> torch.Tensor:
    return initial_value(name, CONFIG, seed, CPU)


def test_the_state_decays_as_s4d_real() -> None:
    assert torch.equal(value(f"{MIXER}A_log").exp().round(), torch.arange(1.0, 9).repeat(256, 1))
    assert torch.equal(value(f"{MIXER}D"), torch.ones(256))
    assert torch.equal(value("backbone.norm_f.weight"), torch.ones(128))


def test_time_steps_are_log_uniform_between_a_thousandth_and_a_tenth() -> None:
    dt = F.softplus(value(f"{MIXER}dt_proj.bias"))
    assert dt.min() >= 1e-3 * 0.999
    assert dt.max() <= 0.1 * 1.001
    assert dt.log().mean() == pytest.approx(math.log(1e-2), abs=0.2)


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("in_proj.weight", 128**-0.5),
        ("x_proj.weight", 256**-0.5),
        ("dt_proj.weight", 8**-0.5),
        ("conv1d.weight", 4**-0.5),
        ("conv1d.bias", 4**-0.5),
        # Two residual branches add up to the variance of one.
        ("out_proj.weight", 256**-0.5 / 2**0.5),
    ],
)
def test_projections_are_uniform_within_the_bound_of_mamba_ssm(name: str, bound: float) -> None:
    weights = value(f"{MIXER}{name}")
    assert weights.abs().max() <= bound
    assert weights.abs().max() > 0.95 * bound
    assert weights.std() == pytest.approx(bound / 3**0.5, rel=0.15)


def test_the_embedding_is_normal_with_two_hundredths() -> None:
    weights = value("backbone.embedding.weight")
    assert weights.std() == pytest.approx(0.02, rel=0.02)
    assert weights.abs().max() > 0.06


def test_a_tensor_depends_on_seed_and_name_alone() -> None:
    """So every rank of every world size, building in any order, starts from the same model."""
    name, other = f"{MIXER}in_proj.weight", "backbone.layers.0.mixer.in_proj.weight"
    torch.manual_seed(123)
    first = value(name)
    torch.rand(17)
    assert torch.equal(value(name), first)
    assert not torch.equal(value(other), first)
    assert not torch.equal(value(name, seed=1), first)
    before = torch.get_rng_state()
    value(name)
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"


def test_a_built_model_holds_exactly_these_tensors() -> None:
    source = seeded(CONFIG, 7, CPU)
    for name, parameter in make_model(CONFIG, seed=7).named_parameters():
        assert torch.equal(parameter, source(name)), name


def test_a_deeper_model_starts_with_the_same_first_layers() -> None:
    deeper = make_model_config(d_model=128, n_layer=5, d_state=8, vocab_size=512)
    name = "backbone.layers.0.mixer.x_proj.weight"
    assert torch.equal(initial_value(name, deeper, 0, CPU), value(name))
