import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MambaForCausalLM

from builders import SHAPES, make_model, make_model_config, make_random_model, make_tokens
from mamba_trainer import convert
from mamba_trainer.model import FP32_PARAMETERS, MambaLM


def gradients(model: MambaLM, tokens: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def export_to_hf(model: MambaLM, folder: Path) -> MambaForCausalLM:
    from safetensors.torch import save_file

    (folder / "ours").mkdir()
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    save_file(tensors, folder / "ours" / "model.safetensors")
    (folder / "ours" / "config.json").write_text(f'{{"mamba_trainer": {model.config.model_dump_json()}}}')
    convert.export(folder / "ours", folder / "hf", "hf")
    return MambaForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_gradients_are_those_of_the_hugging_face_model(shape: str, tmp_path: Path) -> None:
    config = make_model_config(**SHAPES[shape])
    model = make_random_model(config)
    theirs = export_to_hf(model, tmp_path)
    tokens = make_tokens(config)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)
    logits = theirs(tokens[:, :-1]).logits
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for name, parameter in theirs.named_parameters():
        expected = gradients(model, tokens)[name.replace("embeddings", "embedding")]
        torch.testing.assert_close(expected, parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_token_changes_no_logits_before_it(shape: str) -> None:
    config = make_model_config(**SHAPES[shape])
    model = make_random_model(config)
    tokens = make_tokens(config, batch=1, length=12)
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % config.vocab_size
    with torch.no_grad():
        before, after = model(tokens)[0], model(changed)[0]
    assert torch.equal(before[:7], after[:7])
    assert not torch.equal(before[7:], after[7:])


@pytest.mark.parametrize("every", [1, 2, 3, 5])
def test_recompute_changes_no_gradient(every: int) -> None:
    config = make_model_config(n_layer=5)
    model, tokens = make_random_model(config), make_tokens(config)
    expected = gradients(model, tokens)
    model.set_recompute(every)
    assert gradients(model, tokens).keys() == expected.keys()
    for name, gradient in gradients(model, tokens).items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize(("every", "runs"), [(0, 1), (1, 2), (2, 2)])
def test_recompute_runs_each_block_again_in_the_backward_and_never_in_evaluation(every: int, runs: int) -> None:
    config = make_model_config(n_layer=3)
    model, tokens = make_model(config), make_tokens(config)
    model.set_recompute(every)
    ran: list[int] = []
    for index, block in enumerate(model.backbone.layers):
        block.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    model(tokens, tokens).backward()
    assert sorted(ran) == sorted([0, 1, 2] * runs)
    ran.clear()
    with torch.no_grad():
        model(tokens, tokens)
    assert ran == [0, 1, 2]


def test_the_loss_is_that_of_the_logits() -> None:
    config = make_model_config()
    model, tokens = make_random_model(config), make_tokens(config)
    targets = tokens.roll(-1, dims=1)
    targets[:, -1] = -100
    expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model(tokens, targets), expected)


def test_a_tied_head_is_the_embedding_and_is_one_parameter() -> None:
    tied, untied = make_model(make_model_config()), make_model(make_model_config(tie_embeddings=False))
    assert tied.lm_head.weight is tied.backbone.embedding.weight
    assert "lm_head.weight" not in dict(tied.named_parameters())
    assert "lm_head.weight" in dict(untied.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sixteen_bit_model_reads_the_recurrence_in_fp32(dtype: torch.dtype) -> None:
    config = make_model_config(d_state=16)
    exact, narrow = make_model(config), make_model(config, dtype)
    assert {parameter.dtype for parameter in narrow.parameters()} == {dtype}
    for full, half in zip(exact.mixers(), narrow.mixers(), strict=True):
        assert half.fp32_values.keys() == set(FP32_PARAMETERS)
        assert torch.equal(half.weights().A, full.weights().A)
        assert torch.equal(half.weights().dt_bias, full.weights().dt_bias)
        assert not torch.equal(half.A_log.float(), full.A_log), "rounding must matter for this test to mean anything"


def test_the_gradient_of_an_fp32_value_reaches_its_parameter() -> None:
    config = make_model_config()
    tokens = make_tokens(config)
    expected = gradients(make_model(config), tokens)
    got = gradients(make_model(config, torch.bfloat16), tokens)
    for name, gradient in got.items():
        assert gradient.dtype == torch.bfloat16
        if name.split("mixer.")[-1] in FP32_PARAMETERS:
            assert (gradient.float() - expected[name]).norm() <= 0.05 * expected[name].norm(), name


def test_the_residual_stream_is_as_wide_as_configured() -> None:
    for in_fp32, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        model = make_model(make_model_config(residual_in_fp32=in_fp32), torch.bfloat16)
        seen: list[torch.dtype] = []
        model.backbone.layers[1].register_forward_hook(lambda _, args, out, seen=seen: seen.append(out.dtype))
        model(make_tokens(model.config))
        assert seen == [dtype]


def test_names_of_the_state_dict_are_those_of_mamba_ssm() -> None:
    config = make_model_config()
    names = set(make_model(config).state_dict())
    assert names == {*config.parameter_shapes(), "lm_head.weight"}


def test_a_model_can_be_copied_and_stays_tied() -> None:
    model = copy.deepcopy(make_model(make_model_config()))
    assert model.lm_head.weight is model.backbone.embedding.weight
