"""Hugging Face's GPT-2 format: what we write opens there, what we read is exact, and what is hostile is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bardling.checkpoint.load import Loaded
from bardling.config import ModelConfig
from bardling.errors import UserError
from bardling.interop.huggingface import (
    from_hf_state,
    hf_config,
    hf_shapes,
    hf_state,
    model_config_from_hf,
    read_hf_folder,
)
from bardling.interop.tensor_file import METADATA
from bardling.model.gpt import GPT
from bardling.planning.parameter_shapes import parameter_shapes

TINY = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=75, dropout=0.1)


def trained(config: ModelConfig) -> GPT:
    """A model in which no parameter has its initial value."""
    model = GPT(config, seed=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.randint(0, config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    model(tokens, tokens.flip(1)).backward()
    optimizer.step()
    return model.eval()


def load_hf_folder(folder: Path) -> GPT:
    return Loaded(*read_hf_folder(folder)).build()


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
    theirs = hf_state(moments, config)
    assert theirs["transformer.h.0.attn.c_attn.weight"].shape == (32, 96)
    assert theirs["transformer.wte.weight"].shape == (75, 32)
    assert not any(theirs[name].any() for name in set(theirs) - set(moments))
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
    with pytest.raises(UserError, match="ties the head"):
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
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"activation_function": "relu"}, "activation_function = 'relu'"),
        ({"activation_function": ["gelu"]}, "activation_function"),
        ({"n_layer": True}, "n_layer = True"),
        ({"n_layer": -1}, "n_layer = -1"),
        ({"n_embd": "768"}, "n_embd = '768'"),
        ({"vocab_size": 10**30}, "vocab_size"),
        ({"n_head": 5}, "not divisible"),
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


def test_a_shape_mismatch_is_reported_before_the_values_are_looked_at(tmp_path: Path) -> None:
    """Nothing is read from a file that does not match its configuration: its NaN goes unnoticed."""
    model = trained(TINY)
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = torch.nan
    with pytest.raises(UserError, match=r"wpe.weight has shape \[64, 32\], but the configuration needs \[65, 32\]"):
        load_hf_folder(write(tmp_path, model, n_positions=65))


def test_a_configuration_that_does_not_fit_the_file_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    model = trained(TINY)
    for change, message in [
        ({"n_layer": 2**31 - 1}, "config.json: n_layer = 2147483647"),
        ({"n_layer": 3}, "has 2 layers"),
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
    with pytest.raises(UserError, match=r"two\.safetensors: cannot read: no such file"):
        load_hf_folder(tmp_path)
    index.write_text(json.dumps({"weight_map": {"transformer.h.9.ln_1.weight": "one.safetensors"}}))
    with pytest.raises(UserError, match=r"h\.9\.ln_1\.weight is missing"):
        load_hf_folder(tmp_path)
    index.write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(UserError, match="weight_map"):
        load_hf_folder(tmp_path)


# ---- defaults and limits of configurations ----


def test_absent_keys_take_the_defaults_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2Config()
    ours = model_config_from_hf({"model_type": "gpt2"})
    assert (ours.n_layer, ours.n_head, ours.n_embd) == (theirs.n_layer, theirs.n_head, theirs.n_embd)
    assert (ours.block_size, ours.vocab_size) == (theirs.n_positions, theirs.vocab_size)
    assert ours.dropout == theirs.resid_pdrop == theirs.embd_pdrop == theirs.attn_pdrop
    assert (ours.bias, ours.gelu, theirs.activation_function) == (True, "tanh", "gelu_new")


def test_a_written_configuration_keeps_the_fixed_settings_of_gpt2() -> None:
    transformers = pytest.importorskip("transformers")
    written, default = transformers.GPT2Config(**hf_config(TINY)), transformers.GPT2Config()
    for key in ("initializer_range", "layer_norm_epsilon", "scale_attn_weights", "n_inner", "tie_word_embeddings"):
        assert getattr(written, key) == getattr(default, key), key


def test_an_mlp_of_four_times_the_width_is_the_default() -> None:
    assert model_config_from_hf({**hf_config(TINY), "n_inner": 128}) == TINY
    for other in (36, 160):  # 4 + n_embd and 5 * n_embd
        assert model_config_from_hf({**hf_config(TINY), "n_inner": other}) == dataclasses.replace(TINY, mlp_hidden=other)


def test_vocab_multiple_is_at_most_4096() -> None:
    assert model_config_from_hf({**hf_config(TINY), "bardling": {"vocab_multiple": 4096}}).vocab_multiple == 4096
    with pytest.raises(UserError, match=r"config\.json: vocab_multiple = 4097: must be an integer from 1 to 4096"):
        model_config_from_hf({**hf_config(TINY), "bardling": {"vocab_multiple": 4097}})


@pytest.mark.parametrize("value", [0, 0.0, 0.5, 0.999])
def test_dropout_of_at_least_0_and_below_1_is_accepted(value: float) -> None:
    assert model_config_from_hf({**hf_config(TINY), "bardling": {"dropout": value}}).dropout == value
    shared = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), value)
    assert model_config_from_hf({"model_type": "gpt2", **shared}).dropout == value


@pytest.mark.parametrize("value", [1, 1.0, 1.5, -0.1, True, "0.1", None])
def test_any_other_dropout_is_refused(value: object) -> None:
    with pytest.raises(UserError, match=r"config\.json: bardling\.dropout = .* must be a number from 0 to below 1"):
        model_config_from_hf({**hf_config(TINY), "bardling": {"dropout": value}})
    with pytest.raises(UserError, match=r"config\.json: attn_pdrop = .* must be a number from 0 to below 1"):
        model_config_from_hf({**hf_config(TINY), "bardling": {}, "attn_pdrop": value})


# ---- tensors: other families, and states that do not fit ----


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_models_with_split_projections_open_in_transformers_and_come_back(tmp_path: Path, family: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = ModelConfig(
        family=family, n_layer=2, n_head=2, n_kv_head=1, n_embd=32, block_size=64, vocab_size=75, vocab_multiple=32
    ).resolved()
    model = trained(config)
    reference = transformers.AutoModelForCausalLM.from_pretrained(write(tmp_path, model)).eval()
    assert hf_shapes(model.config) == {name: tuple(tensor.shape) for name, tensor in reference.named_parameters()}
    tokens = torch.randint(0, 75, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(reference(tokens).logits, model(tokens), rtol=1e-4, atol=1e-5)
    again = load_hf_folder(tmp_path)
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transformer.wpe.weight": None}, r"wpe\.weight is missing"),
        ({"transformer.wpe.weight": torch.zeros(63, 32)}, r"wpe\.weight has shape \[63, 32\]"),
        ({"transformer.extra.weight": torch.zeros(2)}, r"extra\.weight is not part of GPT-2"),
        ({"transformer.h.2.ln_1.weight": torch.zeros(32)}, "has 3 layers"),
        ({"lm_head.weight": torch.zeros(75, 31)}, r"lm_head\.weight has shape \[75, 31\]"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_by_name(change: dict[str, torch.Tensor | None], message: str) -> None:
    state = {**hf_state(trained(TINY).state_dict(), TINY), **change}
    with pytest.raises(UserError, match=f"some weights: .*{message}"):
        from_hf_state({name: tensor for name, tensor in state.items() if tensor is not None}, TINY, "some weights")


# ---- folders: what is read and how much of it ----


def test_causal_masks_of_any_dtype_are_skipped(tmp_path: Path) -> None:
    model = trained(TINY)
    write(tmp_path, model)
    state = hf_state(model.state_dict(), TINY)
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool)
    save_file(state, tmp_path / "model.safetensors", metadata=METADATA)
    for name, value in load_hf_folder(tmp_path).state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_infinite_weights_are_refused_by_name(tmp_path: Path) -> None:
    model = trained(TINY)
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = torch.inf
    write(tmp_path, model)
    with pytest.raises(UserError, match=r"ln_f\.weight contains NaN or infinity"):
        load_hf_folder(tmp_path)


def indexed(folder: Path, model: GPT, length: int) -> Path:
    """A model folder whose index names a single file with a name of `length` characters."""
    write(folder, model)
    name = "a" * (length - len(".safetensors")) + ".safetensors"
    (folder / "model.safetensors").rename(folder / name)
    weight_map = dict.fromkeys(hf_shapes(model.config), name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_file_names_in_an_index_have_at_most_200_characters(tmp_path: Path) -> None:
    model = trained(TINY)
    assert load_hf_folder(indexed(tmp_path / "longest", model, 200)).config == TINY
    with pytest.raises(UserError, match="is not the name of"):
        load_hf_folder(indexed(tmp_path / "too long", model, 201))


def test_a_configuration_of_more_than_64_mib_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path, trained(TINY)) / "config.json"
    for size, message in [(64 << 20, "is not valid JSON"), ((64 << 20) + 1, r"is too large \(67,108,865 bytes")]:
        path.write_bytes(b"x" * size)
        with pytest.raises(UserError, match=message):
            load_hf_folder(tmp_path)
