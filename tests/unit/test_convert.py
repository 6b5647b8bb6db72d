import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MambaConfig, MambaForCausalLM

from builders import CPU, SHAPES, make_model, make_model_config, make_random_model, make_tokens
from mamba_trainer import convert
from mamba_trainer.build import from_safetensors
from mamba_trainer.contract import UserError
from mamba_trainer.convert import weights as tensors
from mamba_trainer.generate import load_for_generation
from mamba_trainer.model import MambaLM


def save_ours(model: MambaLM, folder: Path) -> Path:
    folder.mkdir(parents=True)
    save_file({n: p.detach().contiguous() for n, p in model.named_parameters()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"mamba_trainer": model.config.model_dump(mode="json")}))
    return folder


def assert_same_model(folder: Path, model: MambaLM) -> None:
    config, weights = convert.open_model(folder)
    assert config == model.config
    expected = dict(model.named_parameters())
    assert list(weights.shapes) == list(expected)
    for name, parameter in expected.items():
        assert torch.equal(weights.read(name), parameter), name


@pytest.mark.parametrize(
    ("shape", "to"),
    [
        (shape, to)
        for shape, options in SHAPES.items()
        for to in ("ours", "hf", "mamba_ssm")
        if to != "mamba_ssm" or "norm_epsilon" not in options  # which it cannot express: see below
    ],
)
def test_a_model_comes_back_exactly_from_every_format(shape: str, to: str, tmp_path: Path) -> None:
    model = make_random_model(make_model_config(**SHAPES[shape]))
    convert.export(save_ours(model, tmp_path / "model"), tmp_path / "there", to)
    convert.import_(tmp_path / "there", tmp_path / "back")
    assert_same_model(tmp_path / "back", model)
    source = from_safetensors(tmp_path / "back", model.config)
    assert torch.equal(source("backbone.norm_f.weight"), model.backbone.norm_f.weight)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", ["100GB", "20KB"])
def test_a_folder_saved_by_transformers_is_imported(shard: str, tied: bool, tmp_path: Path) -> None:
    theirs = MambaForCausalLM(
        MambaConfig(
            vocab_size=56, hidden_size=18, num_hidden_layers=2, state_size=5, conv_kernel=3, expand=3,
            layer_norm_epsilon=1e-4, residual_in_fp32=False, tie_word_embeddings=tied,
        )
    )  # fmt: skip
    theirs.save_pretrained(tmp_path / "hf", max_shard_size=shard)
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists() == (shard == "20KB")
    convert.import_(tmp_path / "hf", tmp_path / "ours")
    ours = load_for_generation(tmp_path / "ours", CPU, torch.float32)
    tokens = make_tokens(ours.config)
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits.detach(), rtol=1e-5, atol=1e-5)


def mamba_ssm_config(**options: Any) -> dict[str, Any]:
    """What `MambaLMHeadModel.save_pretrained` writes."""
    published = {
        "d_model": 16, "d_intermediate": 0, "n_layer": 2, "vocab_size": 50, "ssm_cfg": {},
        "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True, "residual_in_fp32": True,
        "fused_add_norm": True, "pad_vocab_size_multiple": 8, "tie_embeddings": True,
    }  # fmt: skip
    return published | options


@pytest.mark.parametrize("ssm", [{}, {"layer": "Mamba1", "d_state": 8, "expand": 1, "d_conv": 2, "dt_rank": 3}])
def test_a_folder_of_mamba_ssm_is_imported(ssm: dict[str, Any], tmp_path: Path) -> None:
    shape = {key: value for key, value in ssm.items() if key != "layer"}
    model = make_random_model(make_model_config(**({"n_layer": 2, "d_state": 16} | shape)))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(mamba_ssm_config(ssm_cfg=ssm)))
    assert_same_model(tmp_path, model)


@pytest.mark.parametrize("tied", [True, False])
def test_mamba_ssm_gets_the_fields_and_tensors_it_loads_strictly(tied: bool, tmp_path: Path) -> None:
    model = make_model(make_model_config(d_state=8, tie_embeddings=tied))
    convert.export(save_ours(model, tmp_path / "model"), tmp_path / "out", "mamba_ssm")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written.keys() == mamba_ssm_config().keys()
    assert (written["d_model"], written["n_layer"], written["vocab_size"]) == (16, 3, 50)
    assert written["ssm_cfg"] == {"d_state": 8, "d_conv": 4, "expand": 2, "dt_rank": "auto"}
    state = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    assert {name: t.shape for name, t in state.items()} == {name: t.shape for name, t in model.state_dict().items()}
    assert (state["lm_head.weight"].data_ptr() == state["backbone.embedding.weight"].data_ptr()) == tied
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "pytorch_model.bin"]


def test_hugging_face_gets_the_padded_vocabulary_and_no_invented_end_of_text(tmp_path: Path) -> None:
    model = make_model(make_model_config(vocab_size=50, pad_vocab_size_multiple=16))
    convert.export(save_ours(model, tmp_path / "model"), tmp_path / "hf", "hf")
    theirs = MambaForCausalLM.from_pretrained(tmp_path / "hf")
    assert theirs.config.vocab_size == theirs.get_input_embeddings().num_embeddings == 64
    assert theirs.config.eos_token_id is None
    assert theirs.config.intermediate_size == 32
    assert theirs.lm_head.weight is theirs.get_input_embeddings().weight


def test_an_export_in_sixteen_bit_rounds_each_number_once(tmp_path: Path) -> None:
    model = make_random_model(make_model_config())
    convert.export(save_ours(model, tmp_path / "model"), tmp_path / "hf", "hf", dtype="bf16")
    written = load_file(tmp_path / "hf" / "model.safetensors")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    for name, parameter in model.named_parameters():
        assert torch.equal(written[name.replace("embedding.", "embeddings.")], parameter.bfloat16()), name


def test_a_large_model_is_written_in_shards_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "SHARD_BYTES", 6_000)
    model = make_random_model(make_model_config())
    convert.export(save_ours(model, tmp_path / "model"), tmp_path / "hf", "hf")
    files = sorted(path for path in (tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 2
    assert max(sum(t.nbytes for t in load_file(path).values()) for path in files) <= 6_000
    assert_same_model(tmp_path / "hf", model)
    theirs = MambaForCausalLM.from_pretrained(tmp_path / "hf")
    tokens = make_tokens(model.config)
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)


def test_the_tokenizer_travels_with_the_weights(tmp_path: Path) -> None:
    source = save_ours(make_model(make_model_config()), tmp_path / "model")
    (tmp_path / "tokenizer.json").write_text("{}")
    convert.export(source, tmp_path / "hf", "hf", tokenizer=tmp_path / "tokenizer.json")
    convert.import_(tmp_path / "hf", tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "{}"


HF = {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 8}


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"model_type": "llama", "hidden_size": 16}, "no Mamba-1 model: its config.json says 'llama'"),
        ({"model_type": "falcon_mamba"}, "says 'falcon_mamba'"),
        ({}, "no model_type"),
        (HF | {"use_bias": True}, "use_bias: true"),
        (HF | {"use_conv_bias": False}, "use_conv_bias: false"),
        (HF | {"hidden_act": "gelu"}, "hidden_act: gelu"),
        (HF | {"intermediate_size": 33}, "intermediate_size 33"),
        ({"model_type": "mamba", "vocab_size": 8}, "has no 'hidden_size'"),
        (HF | {"state_size": "many"}, "d_state"),
        (mamba_ssm_config(ssm_cfg={"layer": "Mamba2"}), "ssm_cfg.layer: Mamba2"),
        (mamba_ssm_config(attn_layer_idx=[3]), "attention layers"),
        (mamba_ssm_config(rms_norm=False), "rms_norm: false"),
        (mamba_ssm_config(d_intermediate=64), "an MLP in each block"),
        (mamba_ssm_config(ssm_cfg={"bias": True}), "ssm_cfg.bias: true"),
        (mamba_ssm_config(ssm_cfg={"conv_bias": False}), "ssm_cfg.conv_bias: false"),
        (mamba_ssm_config(ssm_cfg={"headdim": 64}), "ssm_cfg.headdim"),
        ({"mamba_trainer": {"d_model": 16}}, "n_layer"),
    ],
)
def test_a_model_that_ours_cannot_be_is_refused_with_the_option(raw: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError) as refusal:
        convert.import_(tmp_path, tmp_path / "out")
    assert said in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_mamba_ssm_cannot_express_another_epsilon(tmp_path: Path) -> None:
    model = make_model(make_model_config(norm_epsilon=1e-6))
    with pytest.raises(UserError, match="export it as hf instead"):
        convert.export(save_ours(model, tmp_path / "model"), tmp_path / "out", "mamba_ssm")


@pytest.mark.parametrize("damage", ["missing", "shape", "cut", "gone", "index", "nested", "no config", "no json"])
def test_damaged_weights_are_a_user_error_that_names_the_place(damage: str, tmp_path: Path) -> None:
    model = make_model(make_model_config())
    folder = save_ours(model, tmp_path / "model")
    file = folder / "model.safetensors"
    state = load_file(file)
    name = "backbone.layers.1.mixer.D"
    match damage:
        case "missing":
            del state[name]
            save_file(state, file)
            said = f"has no tensor {name}"
        case "shape":
            state[name] = torch.zeros(3)
            save_file(state, file)
            said = f"{name} has shape (3,), the model of its configuration needs (32,)"
        case "cut":
            file.write_bytes(file.read_bytes()[:-9])
            said = "model.safetensors cannot be read"
        case "gone":
            file.unlink()
            said = "holds no weights"
        case "index":
            (folder / "model.safetensors.index.json").write_text("[]")
            said = "is not an index of safetensors files"
        case "nested":
            file.unlink()
            torch.save({"model": state}, folder / "pytorch_model.bin")
            said = "cannot be read as a PyTorch state dict"
        case "no config":
            (folder / "config.json").unlink()
            said = "needs its config.json"
        case _:
            (folder / "config.json").write_text("{")
            said = "not valid JSON"
    with pytest.raises(UserError) as refusal:
        convert.import_(folder, tmp_path / "out")
    assert said in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_a_bin_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"backbone.embedding.weight": Evil()}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(mamba_ssm_config()))
    with pytest.raises(UserError, match="cannot be read as a PyTorch state dict"):
        convert.import_(tmp_path, tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_initial_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    folder = save_ours(make_model(make_model_config()), tmp_path / "model")
    with pytest.raises(UserError, match=r"A_log has shape \(32, 4\)"):
        from_safetensors(folder, make_model_config(expand=3))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"format": "gguf"}, "no format 'gguf': choose one of ours, hf, mamba_ssm"),
        ({"format": "hf", "dtype": "int8"}, "no dtype 'int8'"),
        ({"format": "hf", "tokenizer": Path("/nowhere.json")}, "no tokenizer file"),
        ({"format": "hf", "out": Path("in use")}, "exists and is not empty"),
        ({"format": "hf", "source": Path("nowhere")}, "There is no folder nowhere"),
    ],
)
def test_a_wrong_argument_writes_nothing(
    arguments: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_ours(make_model(make_model_config()), Path("model"))
    Path("in use").mkdir()
    Path("in use/file").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=said):
        convert.export(**({"source": Path("model"), "out": Path("out")} | arguments))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failed_export_leaves_no_folder_that_looks_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    source = save_ours(make_model(make_model_config()), tmp_path / "model")
    monkeypatch.setattr(tensors, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        convert.export(source, tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    convert.export(source, tmp_path / "out", "hf")
