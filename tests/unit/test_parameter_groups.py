import pytest

from builders import make_model, make_model_config
from mamba_trainer.engine import parameter_groups

#: By the convention of mamba_ssm: matrices decay, what sets time scales or is one-dimensional does not.
DECAYED = {
    "embedding.weight",
    "lm_head.weight",
    "in_proj.weight",
    "conv1d.weight",
    "x_proj.weight",
    "dt_proj.weight",
    "out_proj.weight",
}


def last_two(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def test_matrices_decay_and_nothing_else_does() -> None:
    named = dict(make_model(make_model_config(tie_embeddings=False)).named_parameters())
    names = {id(parameter): name for name, parameter in named.items()}
    for group in parameter_groups(named.items(), 0.1, elements=10**9):
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group["weight_decay"] == (0.1 if last_two(name) in DECAYED else 0.0), name


@pytest.mark.parametrize("elements", [1, 500, 3_000, 10**9])
def test_groups_are_bounded_and_hold_every_parameter_once(elements: int) -> None:
    parameters = dict(make_model(make_model_config()).named_parameters())
    groups = parameter_groups(parameters.items(), 0.1, elements)
    members = [parameter for group in groups for parameter in group["params"]]
    assert len(members) == len(parameters)
    assert {id(p) for p in members} == {id(p) for p in parameters.values()}
    for group in groups:
        assert len(group["params"]) == 1 or sum(p.numel() for p in group["params"]) <= elements


def test_the_order_of_parameters_does_not_depend_on_where_groups_are_cut() -> None:
    """An export of a ZeRO-0 checkpoint finds its masters by this order."""
    model = make_model(make_model_config())

    def order(elements: int) -> list[int]:
        groups = parameter_groups(model.named_parameters(), 0.1, elements)
        return [id(parameter) for group in groups for parameter in group["params"]]

    assert order(500) == order(10**9)
