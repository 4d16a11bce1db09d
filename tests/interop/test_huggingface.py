"""Hugging Face's GPT-2 format: what we write opens there, what we read is exact, and what is hostile is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bardling.config import ModelConfig
from bardling.errors import UserError
from bardling.interop.huggingface import (
    METADATA,
    from_hf_state,
    hf_config,
    hf_shapes,
    hf_state,
    load_hf_folder,
    model_config_from_hf,
    parameter_shapes,
)
from bardling.model.gpt import GPT

TINY = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=75, dropout=0.1)


def trained(config: ModelConfig) -> GPT:
    """A model in which no parameter has its initial value."""
    model = GPT(config, seed=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.randint(0, config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    model(tokens, tokens.flip(1)).backward()
    optimizer.step()
    return model.eval()


def write(folder: Path, model: GPT, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**hf_config(model.config), **config}))
    save_file(hf_state(model.state_dict(), model.config), folder / "model.safetensors", metadata=METADATA)
    return folder


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gelu", ["tanh", "erf"])
def test_a_folder_opens_in_transformers_with_equal_logits(tmp_path: Path, bias: bool, gelu: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(TINY, bias=bias, gelu=gelu)
    model = trained(config)
    reference, report = transformers.AutoModelForCausalLM.from_pretrained(write(tmp_path, model), output_loading_info=True)
    assert not any(report.values())
    assert type(reference).__name__ == "GPT2LMHeadModel"
    assert reference.config.n_positions == 64
    tokens = torch.randint(0, 75, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(reference.eval()(tokens).logits, model(tokens), rtol=1e-5, atol=1e-6)
    # and back, after transformers has written it itself
    reference.save_pretrained(tmp_path / "again", max_shard_size="40KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    again = load_hf_folder(tmp_path / "again")
    assert again.config == config
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


@pytest.mark.parametrize("bias", [True, False])
def test_round_trip_is_exact(tmp_path: Path, bias: bool) -> None:
    config = dataclasses.replace(TINY, bias=bias, gelu="erf", vocab_multiple=32)
    model = trained(config)
    again = load_hf_folder(write(tmp_path, model))
    assert again.config == config
    assert list(again.state_dict()) == list(model.state_dict())
    for name, value in again.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, model.state_dict()[name]), name
    assert all(parameter.requires_grad for parameter in again.parameters())
    again(torch.tensor([[1, 2]]), torch.tensor([[2, 3]])).backward()  # it can be trained on


def test_moments_map_like_weights() -> None:
    config = dataclasses.replace(TINY, bias=False)
    moments = {name: torch.rand(shape) for name, shape in parameter_shapes(config).items()}
    moments["transformer.wte.weight"][75:] = 0
    theirs = hf_state(moments, config, fill_biases=False)
    assert theirs["transformer.h.0.attn.c_attn.weight"].shape == (32, 96)
    assert theirs["transformer.wte.weight"].shape == (75, 32)
    assert set(theirs) == set(moments)
    for name, value in from_hf_state(theirs, config).items():
        assert torch.equal(value, moments[name]), name


@pytest.mark.parametrize("bias", [True, False])
def test_listed_shapes_are_those_of_the_model(bias: bool) -> None:
    config = dataclasses.replace(TINY, bias=bias)
    model = GPT(config)
    assert parameter_shapes(config) == {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert hf_shapes(config) == {name: tuple(t.shape) for name, t in hf_state(model.state_dict(), config).items()}


def test_old_files_without_prefix_with_buffers_and_head_are_read() -> None:
    model = trained(TINY)
    state = {name.removeprefix("transformer."): value for name, value in hf_state(model.state_dict(), TINY).items()}
    state["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    state["h.1.attn.masked_bias"] = torch.tensor(-1e4)
    state["lm_head.weight"] = state["wte.weight"].clone()
    for name, value in from_hf_state(state, TINY).items():
        assert torch.equal(value, model.state_dict()[name]), name
    state["lm_head.weight"][0, 0] += 1
    with pytest.raises(UserError, match="untied"):
        from_hf_state(state, TINY)


def test_half_precision_files_become_float32(tmp_path: Path) -> None:
    model = trained(TINY)
    write(tmp_path, model)
    half = {name: value.to(torch.bfloat16) for name, value in hf_state(model.state_dict(), TINY).items()}
    save_file(half, tmp_path / "model.safetensors", metadata=METADATA)
    for name, value in load_hf_folder(tmp_path).state_dict().items():
        assert torch.equal(value, model.state_dict()[name].to(torch.bfloat16).float()), name


def test_openai_gpt2s_own_configuration_is_understood() -> None:
    values = {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "bos_token_id": 50256,
        "embd_pdrop": 0.1,
        "eos_token_id": 50256,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "resid_pdrop": 0.1,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "vocab_size": 50257,
    }
    expected = ModelConfig(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50257, dropout=0.1)
    assert model_config_from_hf(values) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type = 'llama'"),
        ({"model_type": None}, "model_type = None"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ({"scale_attn_weights": False}, "scale_attn_weights = False"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon = 1e-06"),
        ({"n_inner": 100}, "n_inner = 100"),
        ({"activation_function": "relu"}, "activation_function = 'relu'"),
        ({"activation_function": ["gelu"]}, "activation_function"),
        ({"n_layer": True}, "n_layer = True"),
        ({"n_layer": -1}, "n_layer = -1"),
        ({"n_embd": "768"}, "n_embd = '768'"),
        ({"vocab_size": 10**30}, "vocab_size"),
        ({"n_head": 5}, "not divisible"),
        ({"bardling": {}, "attn_pdrop": 0.2}, "attn_pdrop = 0.2"),
        ({"bardling": {"dropout": "0.1"}}, "bardling.dropout"),
        ({"bardling": {"bias": 0}}, "bardling"),
        ({"bardling": {"vocab_multiple": 0}}, "vocab_multiple = 0"),
        ({"bardling": {"vocab_multiple": 2**30}}, "vocab_multiple = 1073741824"),
        ({"bardling": []}, "bardling"),
    ],
)
def test_other_configurations_are_refused_by_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        model_config_from_hf({**hf_config(TINY), **change})
    assert "\n" not in str(caught.value)


def test_a_configuration_that_does_not_fit_the_file_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    model = trained(TINY)
    for change, message in [
        ({"n_layer": 2**31 - 1}, "holds 2 layers"),
        ({"n_embd": 2**30}, r"bias has shape \[96\], but the configuration needs \[3221225472\]"),
        ({"n_positions": 2**31 - 1}, r"wpe.weight has shape \[64, 32\]"),
        ({"vocab_size": 76}, r"wte.weight has shape \[75, 32\], but the configuration needs \[76, 32\]"),
    ]:
        with pytest.raises(UserError, match=message):
            load_hf_folder(write(tmp_path, model, **change))


def test_biases_are_dropped_only_when_zero() -> None:
    model = trained(TINY)
    with pytest.raises(UserError, match="bias is not zero"):
        from_hf_state(hf_state(model.state_dict(), TINY), dataclasses.replace(TINY, bias=False))


@pytest.mark.parametrize("damage", ["missing", "extra", "nan", "integers"])
def test_damaged_weights_are_refused_by_name(tmp_path: Path, damage: str) -> None:
    model = trained(TINY)
    write(tmp_path, model)
    state = hf_state(model.state_dict(), TINY)
    name = "transformer.h.1.mlp.c_fc.weight"
    if damage == "missing":
        del state[name]
    elif damage == "extra":
        name = "transformer.h.1.mlp.c_gate.weight"
        state[name] = torch.zeros(2)
    elif damage == "nan":
        state[name][0, 0] = torch.nan
    else:
        state[name] = state[name].to(torch.int32)
    save_file(state, tmp_path / "model.safetensors", metadata=METADATA)
    with pytest.raises(UserError, match=name):
        load_hf_folder(tmp_path)


def test_broken_files_are_refused_in_one_line(tmp_path: Path) -> None:
    model = trained(TINY)

    def refusal() -> str:
        with pytest.raises(UserError) as caught:
            load_hf_folder(tmp_path)
        assert "\n" not in str(caught.value)
        assert str(tmp_path) in str(caught.value)
        return str(caught.value)

    assert "config.json" in refusal()
    write(tmp_path, model)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    for bad in (b"", whole[:100], whole[:-1], (1 << 60).to_bytes(8, "little") + whole[8:], b"\x80\x04" + whole):
        weights.write_bytes(bad)
        assert "safetensors" in refusal()
    weights.write_bytes(whole)
    for text in ("", "{", "[]", "[" * 200_000, "\x00"):
        (tmp_path / "config.json").write_text(text)
        assert "config.json" in refusal()


def test_pickled_weights_are_refused_with_the_remedy(tmp_path: Path) -> None:
    write(tmp_path, trained(TINY))
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin: pickled .* safe_serialization"):
        load_hf_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        load_hf_folder(tmp_path)


@pytest.mark.parametrize(
    "file", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "weights.bin", 3, "..", "a\\b.safetensors"]
)
def test_an_index_cannot_point_elsewhere(tmp_path: Path, file: object) -> None:
    write(tmp_path, trained(TINY))
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"transformer.wte.weight": file}}))
    with pytest.raises(UserError, match="not the name"):
        load_hf_folder(tmp_path)


def test_an_index_that_names_what_is_not_there_is_refused(tmp_path: Path) -> None:
    write(tmp_path, trained(TINY))
    (tmp_path / "model.safetensors").rename(tmp_path / "one.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"transformer.wte.weight": "two.safetensors"}}))
    with pytest.raises(UserError, match=r"two\.safetensors: there is no such file"):
        load_hf_folder(tmp_path)
    index.write_text(json.dumps({"weight_map": {"transformer.h.9.ln_1.weight": "one.safetensors"}}))
    with pytest.raises(UserError, match=r"h\.9\.ln_1\.weight is missing"):
        load_hf_folder(tmp_path)
    index.write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(UserError, match="weight_map"):
        load_hf_folder(tmp_path)
