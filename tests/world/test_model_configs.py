"""Configurations of other people's models: harmless settings are accepted and give the logits of transformers; real differences
are refused by name and value.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bardling.checkpoint.contents import read_model
from bardling.checkpoint.export import export_hf, export_nanogpt
from bardling.checkpoint.load import load
from bardling.cli.main import main
from bardling.data.tokens.tokenizer import build_tokenizer
from bardling.errors import UserError
from bardling.interop.huggingface import model_config_from_hf
from bardling.interop.tensor_file import METADATA
from bardling.model.gpt import GPT

transformers = pytest.importorskip("transformers")
GPT2 = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 24, "vocab_size": 257}
LLAMA = {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "max_position_embeddings": 24,
    "vocab_size": 257,
}


def save(folder: Path, kind: str, **options: Any) -> Any:
    """A random model of transformers, saved with a byte tokenizer."""
    sizes = GPT2 if kind == "GPT2" else LLAMA
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}{'LMHeadModel' if kind == 'GPT2' else 'ForCausalLM'}")(
        getattr(transformers, f"{kind}Config")(**{**sizes, **options})
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    build_tokenizer("byte", ()).save(folder)
    return model


def edit(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def tokens() -> torch.Tensor:
    return torch.randint(0, 257, (2, 24), generator=torch.Generator().manual_seed(1))


def same_logits(ours: GPT, theirs: Any) -> None:
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens()), theirs(tokens()).logits, rtol=1e-4, atol=1e-4)


GPT2_ACCEPTED: list[dict[str, Any]] = [
    {"resid_pdrop": 0.1, "embd_pdrop": 0.0, "attn_pdrop": 0.2},
    {"reorder_and_upcast_attn": True},
    {"tie_word_embeddings": False},
    {"n_inner": 40},
    {"n_inner": 64},
    {"layer_norm_epsilon": 1e-3},
    {"tie_word_embeddings": False, "n_inner": 24, "layer_norm_epsilon": 1e-6, "activation_function": "gelu"},
    {"activation_function": "gelu_fast"},
    {"activation_function": "gelu_python"},
    {"summary_type": "mean", "use_cache": False, "task_specific_params": {"x": 1}},
    {"add_cross_attention": False, "is_encoder_decoder": False, "initializer_range": 0.0},
]


@pytest.mark.parametrize("options", GPT2_ACCEPTED)
def test_a_gpt2_is_read_exported_and_read_again_by_transformers(tmp_path: Path, options: dict[str, Any]) -> None:
    theirs = save(tmp_path / "theirs", "GPT2", **options)
    loaded = load(tmp_path / "theirs")
    same_logits(loaded.build(), theirs)
    export_hf(str(tmp_path / "theirs"), tmp_path / "out")
    again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    for name, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    for key in ("n_inner", "layer_norm_epsilon", "tie_word_embeddings", "n_positions"):
        expected = getattr(theirs.config, key)
        assert getattr(again.config, key) == (None if key == "n_inner" and expected == 64 else expected), key
    same_logits(load(tmp_path / "out").build(), theirs)
    config, state = read_model(tmp_path / "out")
    assert config == loaded.config
    assert all(torch.equal(state[name], value) for name, value in loaded.state.items())


LLAMA_ACCEPTED: list[dict[str, Any]] = [
    {"rope_scaling": {"type": "default"}},
    {"rope_scaling": {"rope_type": "default"}, "rope_theta": 500.0},
    {"rope_scaling": {"rope_type": "default", "rope_theta": 300.0}},
    {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 1.0}},
    {"rope_scaling": {}},
    {"rope_scaling": None},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0, "partial_rotary_factor": 1.0}},
    {"rope_parameters": None, "rope_theta": 55.0, "partial_rotary_factor": 1.0},
    {"hidden_act": "swish"},
    {"pretraining_tp": 2, "use_cache": False, "rope_interleaved": False, "is_llama_config": True},
    {"initializer_range": 0.0, "attention_dropout": 0.0, "is_encoder_decoder": False},
]


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
@pytest.mark.parametrize("values", LLAMA_ACCEPTED)
def test_harmless_settings_of_llama_and_qwen_give_the_logits_of_transformers(
    tmp_path: Path, kind: str, values: dict[str, Any]
) -> None:
    save(tmp_path, kind, head_dim=8)
    edit(tmp_path, **values)
    model = load(tmp_path).build()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    same_logits(model, theirs)


def test_masks_and_tables_of_old_files_are_ignored_whatever_they_hold(tmp_path: Path) -> None:
    for kind, prefix, buffers in (
        ("GPT2", "transformer.h.0.attn", {"masked_bias": torch.tensor(-torch.inf), "bias": torch.ones(1, 1, 24, 24).bool()}),
        (
            "Llama",
            "model.layers.0.self_attn.rotary_emb",
            {"inv_freq": torch.full((4,), torch.nan), "cos_cached": torch.ones(3)},
        ),
        ("Llama", "model.rotary_emb", {"inv_freq": torch.ones(4), "original_inv_freq": torch.ones(4)}),
    ):
        folder = tmp_path / prefix
        theirs = save(folder, kind)
        for cut in ("", "transformer." if kind == "GPT2" else ""):
            state = load_file(folder / "model.safetensors")
            state |= {f"{prefix}.{name}": value for name, value in buffers.items()}
            state = {name.removeprefix(cut): value for name, value in state.items()}
            save_file(state, folder / "model.safetensors", metadata=METADATA)
            same_logits(load(folder).build(), theirs)


def test_gpt2_sizes_under_the_names_of_other_models(tmp_path: Path) -> None:
    theirs = save(tmp_path, "GPT2")
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    names = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
    path.write_text(json.dumps({names.get(key, key): value for key, value in values.items()}))
    same_logits(load(tmp_path).build(), theirs)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True is not supported"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights = False"),
    ("gpt2", {"activation_function": "relu"}, "activation_function = 'relu'"),
    ("gpt2", {"n_inner": 0}, "n_inner = 0"),
    ("gpt2", {"layer_norm_epsilon": 0}, "layer_norm_epsilon = 0"),
    ("gpt2", {"tie_word_embeddings": "no"}, "tie_word_embeddings = 'no'"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention = True"),
    ("gpt2", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "'gptq'.*save the model unquantized"),
    ("llama", {"quantization_config": {"modules": ["x" * 50] * 99}}, r"\.\.\. is not supported; save the model unquantized"),
    ("llama", {"attention_bias": True}, "attention_bias = True"),
    ("llama", {"mlp_bias": True}, "mlp_bias = True"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling = .*linear"),
    ("llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling = .*linear"),
    ("llama", {"rope_scaling": {"rope_type": "default", "factor": 4.0}}, "rope_scaling = .*4.0"),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling = .*llama3"),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 1.0}}, "rope_scaling = .*yarn"),
    ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 1.0}}, "rope_scaling = .*dynamic"),
    ("llama", {"rope_scaling": {"mrope_section": [1, 2]}}, "rope_scaling = .*mrope_section"),
    ("llama", {"rope_scaling": "yarn"}, "rope_scaling = 'yarn'"),
    ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}, "rope_parameters = .*0.25"),
    ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters = .*full_attention"),
    (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention", "chunked"]},
        "layer_types = .*chunked",
    ),
    ("mistral", {}, "model_type = 'mistral'"),
    ("gpt_neox", {}, "model_type = 'gpt_neox'"),
]


@pytest.mark.parametrize(("kind", "values", "message"), REFUSED)
def test_real_differences_are_refused_by_name_and_value(kind: str, values: dict[str, Any], message: str) -> None:
    sizes = GPT2 if kind == "gpt2" else LLAMA
    with pytest.raises(UserError, match=message) as caught:
        model_config_from_hf({"model_type": kind, **sizes, **values}, "folder/config.json")
    assert str(caught.value).startswith("folder/config.json: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_unequal_dropouts_are_reported_and_do_not_hinder_sampling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "model", "GPT2", resid_pdrop=0.1, embd_pdrop=0.0, attn_pdrop=0.2)
    main(["sample", str(tmp_path / "model"), "--prompt", "a", "--max_new_tokens", "2", "--seed", "1"])
    main(["export", str(tmp_path / "model"), "--out", str(tmp_path / "out")])
    shown = capsys.readouterr().out
    assert "resid_pdrop = 0.1, embd_pdrop = 0.0, attn_pdrop = 0.2: here a model has a single dropout" in shown
    assert "weights: float32" in shown.splitlines()


def test_exports_state_the_context_twice(tmp_path: Path) -> None:
    save(tmp_path / "gpt2", "GPT2")
    save(tmp_path / "llama", "Llama")
    for name, key in (("gpt2", "n_ctx"), ("llama", "max_position_embeddings")):
        export_hf(str(tmp_path / name), tmp_path / f"{name}-out")
        assert json.loads((tmp_path / f"{name}-out" / "config.json").read_text())[key] == 24
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / f"{name}-out")
        assert tokenizer.model_max_length == 24
        assert len(tokenizer("x" * 100, truncation=True)["input_ids"]) == 24


def test_nanogpt_still_takes_only_what_it_implements(tmp_path: Path) -> None:
    save(tmp_path / "model", "GPT2", tie_word_embeddings=False, n_inner=40, layer_norm_epsilon=1e-3)
    with pytest.raises(UserError, match=r"norm_eps = 0\.001, model\.mlp_hidden = 40, model\.tied = False"):
        export_nanogpt(str(tmp_path / "model"), tmp_path / "out")


def test_a_checkpoint_of_an_untied_gpt2_under_our_own_names_still_opens(tmp_path: Path) -> None:
    """As earlier versions wrote it, when they had no place for it in the format of transformers."""
    from bardling.interop.families import bardling_config

    save(tmp_path / "model", "GPT2", tie_word_embeddings=False)
    loaded = load(tmp_path / "model")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text(json.dumps(bardling_config(loaded.config)))
    rows = loaded.config.vocab_size
    state = {k: v[:rows].clone() if v.size(0) == loaded.config.padded_vocab_size else v for k, v in loaded.state.items()}
    save_file(state, tmp_path / "old" / "model.safetensors", metadata=METADATA)
    for folder_state in (load(tmp_path / "old").state, read_model(tmp_path / "old")[1]):
        assert all(torch.equal(folder_state[name], value) for name, value in loaded.state.items())


@pytest.mark.parametrize("complete", [False, True])
def test_an_adapter_is_named_with_its_base_model(tmp_path: Path, complete: bool) -> None:
    if complete:  # a folder of transformers' trainer may hold both; transformers then applies the adapter
        save(tmp_path, "GPT2")
    values = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "gone"), "r": 8}
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"is an adapter for .*gone, which cannot be opened .*correct base_model_name_or_path"):
        load(tmp_path)
