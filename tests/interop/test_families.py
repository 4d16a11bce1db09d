"""Llama and Qwen3 against transformers, in both directions; and models that transformers does not know."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bardling.checkpoint.contents import read_model, write_model
from bardling.checkpoint.export import export_hf, export_nanogpt
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

TINY = ModelConfig(n_layer=3, n_head=4, n_embd=32, block_size=48, vocab_size=75, vocab_multiple=50, dropout=0.0)

KNOWN: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "llama_tied": {"family": "llama", "tied": True, "n_kv_head": 2, "rope_theta": 500.0, "norm_eps": 1e-3},
    "llama_head_dim": {"family": "llama", "head_dim": 6, "n_kv_head": 1, "mlp_hidden": 40},
    "qwen3": {"family": "qwen3"},
    "qwen3_untied": {"family": "qwen3", "tied": False, "n_kv_head": 2, "rope_theta": 100.0},
    "qwen3_head_dim": {"family": "qwen3", "head_dim": 12, "n_kv_head": 1, "mlp_hidden": 56, "norm_eps": 1e-3},
    "qwen3_window": {"family": "qwen3", "sliding_window": 8, "global_every": 3},
    "qwen3_all_windows": {"family": "qwen3", "sliding_window": 5, "global_every": 0},
    "by_options": {"norm": "rmsnorm", "positions": "rotary", "mlp": "swiglu", "bias": False, "zero_init": True},
}
UNKNOWN: dict[str, dict[str, Any]] = {
    "relu2": {"family": "qwen3", "mlp": "relu2", "n_kv_head": 2},
    "gpt2_head_dim": {"head_dim": 10},
    "values": {"family": "custom", "value_embeddings": 1, "logit_softcap": 15.0, "positions": "rotary"},
    "llama_window": {"family": "llama", "sliding_window": 8},
}


def option(name: str) -> ModelConfig:
    return dataclasses.replace(TINY, **{**KNOWN, **UNKNOWN}[name])


def perturbed(config: ModelConfig) -> GPT:
    model = GPT(config, seed=3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            rows = config.vocab_size if parameter.size(0) == config.padded_vocab_size else parameter.size(0)
            parameter[:rows] += 0.1 * torch.randn((rows, *parameter.shape[1:]), generator=generator)
    return model


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 75, (2, 48), generator=torch.Generator().manual_seed(seed))


def load_hf_folder(folder: Path) -> GPT:
    return Loaded(*read_hf_folder(folder)).build()


def write(folder: Path, model: GPT, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**hf_config(model.config), **config}))
    save_file(hf_state(model.state_dict(), model.config), folder / "model.safetensors", metadata=METADATA)
    return folder


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max())


@pytest.mark.parametrize("name", KNOWN)
def test_folder_opens_in_transformers_with_equal_logits_loss_and_gradients(tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    model = perturbed(option(name))
    folder = write(tmp_path / "ours", model)
    reference, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    assert type(reference).__name__ == ("Qwen3ForCausalLM" if name.startswith("qwen3") else "LlamaForCausalLM")
    assert relative(model(tokens()), reference(tokens()).logits) < 1e-5
    targets = tokens(seed=1)
    targets[0, :5] = -100
    expected = torch.nn.functional.cross_entropy(reference(tokens()).logits.flatten(0, 1), targets.flatten(), reduction="sum")
    loss = model(tokens(), targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    gradients = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
    theirs = dict(reference.named_parameters())
    converted = hf_state(gradients, model.config)
    assert set(converted) == set(theirs)
    for key, gradient in converted.items():
        assert relative(gradient, theirs[key].grad) < 2e-5, key
    # and back, after transformers has written it itself
    reference.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    again = load_hf_folder(tmp_path / "theirs")
    assert again.config.architecture == dataclasses.replace(model.config).architecture
    for key, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_random_models_of_transformers_are_read(tmp_path: Path, kind: str, tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=75,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=48,
        rope_parameters={"rope_type": "default", "rope_theta": 300.0},
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    reference = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    reference.save_pretrained(tmp_path)
    model = load_hf_folder(tmp_path)
    assert model.config.architecture.rope_theta == 300.0
    assert model.config.architecture.tied == tied
    with torch.no_grad():
        assert relative(model(tokens()), reference(tokens()).logits) < 1e-5
    written = hf_state(model.state_dict(), model.config)
    theirs = load_file(tmp_path / "model.safetensors")
    assert set(written) == set(theirs)
    assert all(torch.equal(written[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("name", [*KNOWN, *UNKNOWN])
def test_round_trips_are_exact(tmp_path: Path, name: str) -> None:
    config = option(name)
    model = perturbed(config)
    again = load_hf_folder(write(tmp_path / "a", model))
    assert again.config.architecture == config.architecture
    assert (again.config.vocab_multiple, again.config.zero_init) == (50, config.zero_init)
    assert list(again.state_dict()) == list(model.state_dict())
    (tmp_path / "b").mkdir()
    write_model(tmp_path / "b", config, model.state_dict(), None)
    read, state = read_model(tmp_path / "b")
    assert read == again.config
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
        assert torch.equal(state[key], value), key
    again(tokens(), tokens()).backward()


@pytest.mark.parametrize("name", [*KNOWN, *UNKNOWN])
def test_listed_shapes_are_those_of_the_model(name: str) -> None:
    config = option(name)
    model = GPT(config)
    assert parameter_shapes(config) == {key: tuple(value.shape) for key, value in model.named_parameters()}
    assert hf_shapes(config) == {key: tuple(value.shape) for key, value in hf_state(model.state_dict(), config).items()}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_transformers_does_not_know_says_so(tmp_path: Path, name: str) -> None:
    model = perturbed(option(name))
    folder = write(tmp_path / "model", model)
    values = json.loads((folder / "config.json").read_text())
    assert values["model_type"] == "bardling"
    assert "transformers does not" in values["note"]
    with pytest.raises(UserError, match=r"cannot be exported for transformers: model\.") as caught:
        export_hf(str(folder), tmp_path / "out")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot be exported for nanoGPT"):
        export_nanogpt(str(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    transformers = pytest.importorskip("transformers")
    with pytest.raises((ValueError, KeyError)):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_published_configurations_are_understood() -> None:
    smol = {  # SmolLM2-135M
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "silu",
        "hidden_size": 576,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "model_type": "llama",
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 49152,
    }
    arch = model_config_from_hf(smol).architecture
    assert (arch.n_kv_head, arch.head_dim, arch.mlp_hidden, arch.rope_theta, arch.tied) == (3, 64, 1536, 100_000.0, True)
    qwen = {  # Qwen3-0.6B
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }
    config = model_config_from_hf(qwen)
    assert config.architecture.transformers_family == "qwen3"
    assert config.architecture.query_width == 2048
    with torch.device("meta"):
        count = sum(value.numel() for value in GPT(config).parameters())
    assert count == 596_049_920  # as its model card rounds to 0.6B


HOSTILE: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ("llama", {"attention_bias": True}, "attention_bias"),
    ("llama", {"mlp_bias": True}, "mlp_bias"),
    ("llama", {"rope_scaling": {"factor": 2}}, "rope_scaling"),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "rope_parameters"),
    ("llama", {"rope_parameters": {"rope_theta": 1.0, "factor": 8}}, "rope_parameters"),
    ("llama", {"rope_parameters": 3}, "rope_parameters"),
    ("llama", {"rope_parameters": {"rope_theta": -1}}, "rope_theta = -1"),
    ("llama", {"rms_norm_eps": "small"}, "rms_norm_eps"),
    ("llama", {"hidden_size": 33, "head_dim": None}, "n_embd = 33 is not divisible"),
    ("llama", {"num_key_value_heads": 3}, "n_kv_head = 3"),
    ("llama", {"num_key_value_heads": 0}, "num_key_value_heads = 0"),
    ("llama", {"head_dim": 7}, "head_dim = 7"),
    ("llama", {"num_hidden_layers": 2**31 - 1}, "num_hidden_layers"),
    ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings"),
    ("llama", {"quantization_config": {}}, "quantization_config"),
    ("llama", {"bardling": {"dropout": 2}}, "dropout"),
    ("llama", {"bardling": {"vocab_multiple": 2**20}}, "vocab_multiple"),
    ("qwen3", {"layer_types": 3}, "layer_types"),
    ("qwen3", {"layer_types": ["sliding_attention"] * 3}, "layer_types"),
    (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["full_attention"] + ["sliding_attention"] * 2},
        "layer_types",
    ),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "layer_types": None, "max_window_layers": "x"}, "max_window"),
    ("values", {"logit_softcap": -1.0}, "logit_softcap"),
    ("values", {"n_layer": "3"}, "n_layer"),
    ("values", {"surprise": 1}, "unknown key surprise"),
    ("values", {"vocab_multiple": 10**9}, "vocab_multiple"),
    ("values", {"vocab_size": 0}, "vocab_size"),
]


@pytest.mark.parametrize(("name", "change", "message"), HOSTILE)
def test_strange_configurations_are_refused_by_key(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        model_config_from_hf({**hf_config(option(name)), **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["llama", "qwen3_untied", "values"])
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path: Path, name: str) -> None:
    config = option(name)
    state = hf_state(perturbed(config).state_dict(), config)
    for key in state:
        with pytest.raises(UserError, match=r"is missing|has 3 layers"):
            from_hf_state({other: value for other, value in state.items() if other != key}, config)
        with pytest.raises(UserError, match="has shape"):
            from_hf_state({**state, key: torch.zeros(3, 3, 3)}, config)
    with pytest.raises(UserError, match="is not part of"):
        from_hf_state({**state, "model.layers.0.extra.weight": torch.zeros(3)}, config)


def test_old_buffers_and_an_equal_head_are_dropped() -> None:
    config = option("llama_tied")
    model = perturbed(config)
    state = hf_state(model.state_dict(), config)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    for key, value in from_hf_state(state, config).items():
        assert torch.equal(value, model.state_dict()[key])
    state["lm_head.weight"][0, 0] += 1
    with pytest.raises(UserError, match="ties the head"):
        from_hf_state(state, config)
