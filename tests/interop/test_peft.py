"""LoRA adapters in PEFT's format: PEFT opens ours, we open PEFT's, and both compute the same."""

import json
import math

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from bardling.checkpoint.contents import write_model
from bardling.checkpoint.load import load
from bardling.config import ModelConfig, TuneConfig
from bardling.errors import UserError
from bardling.interop.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_config, adapter_state, from_adapter_state
from bardling.model.gpt import GPT
from bardling.model.lora import add_adapters, trained_state
from bardling.planning.parameter_shapes import adapter_shapes

SHAPE = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 24, "vocab_size": 61}
FAMILIES = {
    "gpt2": ModelConfig(**SHAPE),
    "llama": ModelConfig(**SHAPE, family="llama", n_kv_head=2),
    "qwen3": ModelConfig(**SHAPE, family="qwen3", n_kv_head=2, head_dim=16, tied=True),
}
IDS = torch.arange(24).view(2, 12) * 5 % 61


def adapted(config, tune, seed=3):
    """A model with adapters that change its output."""
    torch.manual_seed(seed)
    model = GPT(config, seed=1)
    add_adapters(model, tune, seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape) * (0.3 if ".B." in name else 1 / math.sqrt(parameter.size(1)))
    return model.eval()


def written(folder, config, tune, model):
    """The base model and the adapter of `model`, in folders."""
    base = folder / "base"
    base.mkdir()
    write_model(base, config, GPT(config, seed=1).state_dict(), None)
    place = folder / "adapter"
    place.mkdir()
    (place / ADAPTER_CONFIG).write_text(json.dumps(adapter_config(config, tune, str(base))))
    save_file(adapter_state(trained_state(model), config, tune), place / ADAPTER_WEIGHTS)
    return place


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "tune",
    [
        TuneConfig(lora_rank=4),
        TuneConfig(lora_rank=3, lora_alpha=5.0, lora_targets=("q_proj", "v_proj")),
        TuneConfig(lora_rank=2, lora_targets=("k_proj", "o_proj", "up_proj"), new_tokens=(56, 59)),
    ],
    ids=["all", "queries and values", "new tokens"],
)
def test_peft_opens_our_adapter_and_we_merge_it(tmp_path, family, tune):
    config = FAMILIES[family]
    model = adapted(config, tune)
    folder = written(tmp_path, config, tune, model)
    with torch.no_grad():
        ours, base = model(IDS), GPT(config, seed=1).eval()(IDS)
        theirs = peft.AutoPeftModelForCausalLM.from_pretrained(folder)
        assert (ours - base).abs().max() > 0.05
        torch.testing.assert_close(theirs(IDS).logits, ours, atol=2e-5, rtol=0)
        merged = load(folder)
        torch.testing.assert_close(merged.build()(IDS), ours, atol=1e-5, rtol=0)
        theirs.merge_and_unload().save_pretrained(tmp_path / "merged")
        for name, tensor in load(tmp_path / "merged").state.items():
            torch.testing.assert_close(merged.state[name], tensor, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_in_peft_format_are_read_back_exactly(family):
    config, tune = (
        FAMILIES[family],
        TuneConfig(lora_rank=4, lora_targets=("k_proj", "v_proj", "down_proj"), new_tokens=(59, 61)),
    )
    state = trained_state(adapted(config, tune))
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == adapter_shapes(config, tune)
    back = from_adapter_state(adapter_state(state, config, tune), config, tune, "the adapter")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["c_attn", "c_proj"]},
        {"target_modules": ["c_attn"], "use_rslora": True, "r": 6},
        {"target_modules": ["c_attn", "c_fc"], "rank_pattern": {"c_fc": 2}, "alpha_pattern": {"c_fc": 9}},
        {"target_modules": ["c_fc"], "trainable_token_indices": [5, 60]},
        {"target_modules": ["c_fc"], "modules_to_save": ["ln_f"]},
        {"target_modules": "all-linear"},
    ],
    ids=lambda options: next(reversed(options)),
)
def test_an_adapter_made_by_peft_is_merged_as_peft_does(tmp_path, options):
    from transformers import AutoModelForCausalLM

    config = FAMILIES["gpt2"]
    (tmp_path / "base").mkdir()
    write_model(tmp_path / "base", config, GPT(config, seed=1).state_dict(), None)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options})
    model = peft.get_peft_model(base, lora)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape)
    model.eval().save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "adapter").build()(IDS), model(IDS).logits, atol=2e-5, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_embedding_is_taken_over_only_where_it_is_not_the_head(tmp_path, tied):
    """PEFT trains a copy of the embedding alone, after which a tied head is another matrix."""
    from transformers import AutoModelForCausalLM

    config = ModelConfig(**SHAPE, tied=tied)
    (tmp_path / "base").mkdir()
    write_model(tmp_path / "base", config, GPT(config, seed=1).state_dict(), None)
    lora = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["c_attn"], modules_to_save=["wte"])
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.2
    model.eval().save_pretrained(tmp_path / "adapter")
    if tied:
        with pytest.raises(UserError, match=r"wte\.weight replaces the embedding, which is also the head"):
            load(tmp_path / "adapter")
    else:
        with torch.no_grad():
            torch.testing.assert_close(load(tmp_path / "adapter").build()(IDS), model(IDS).logits, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' is not supported"),
        ({"bias": "all"}, "bias = 'all' is not supported"),
        ({"peft_type": "LOHA"}, "peft_type = 'LOHA' is not supported"),
        ({"some_new_setting": 3}, "some_new_setting = 3 is not supported"),
        ({"r": 5}, "r = 5, but .* has rank 4"),
        ({"r": "4"}, "r = '4': must be an integer"),
        ({"lora_alpha": -1}, "lora_alpha = -1: must be a number above 0"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "alpha_pattern = .* must map names of layers"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path = None: must name the model"),
        ({"base_model_name_or_path": "nowhere"}, "is an adapter for nowhere, which cannot be opened .*correct base_model"),
    ],
    ids=str,
)
def test_settings_that_change_the_result_are_refused(tmp_path, change, message):
    config, tune = FAMILIES["llama"], TuneConfig(lora_rank=4)
    folder = written(tmp_path, config, tune, adapted(config, tune))
    values = json.loads((folder / ADAPTER_CONFIG).read_text())
    (folder / ADAPTER_CONFIG).write_text(json.dumps({**values, **change}))
    with pytest.raises(UserError, match=message):
        load(folder)


def broken(folder, change):
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    change(tensors, next(name for name in tensors if "lora_A" in name))
    save_file(tensors, folder / ADAPTER_WEIGHTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, name: t.update({name: t[name][:, 1:].contiguous()}), "needs two matrices"),
        (lambda t, name: t.pop(name.replace("lora_A", "lora_B")), "needs two matrices"),
        (lambda t, name: t.update({name: torch.full_like(t[name], torch.nan)}), "the adapter is damaged"),
        (lambda t, name: t.update({"base_model.model.other.lora_A.weight": t[name].clone()}), "no such layer"),
        (lambda t, name: t.update({"base_model.model.lm_head.lora_embedding_A": t[name].clone()}), "is not supported"),
    ],
    ids=["width", "half", "NaN", "layer", "kind"],
)
def test_tensors_of_another_model_are_refused(tmp_path, change, message):
    config, tune = FAMILIES["llama"], TuneConfig(lora_rank=4)
    folder = written(tmp_path, config, tune, adapted(config, tune))
    broken(folder, change)
    with pytest.raises(UserError, match=message):
        load(folder)


def test_an_adapter_of_an_adapter_is_refused(tmp_path):
    config, tune = FAMILIES["llama"], TuneConfig(lora_rank=4)
    folder = written(tmp_path, config, tune, adapted(config, tune))
    values = json.loads((folder / ADAPTER_CONFIG).read_text())
    (folder / ADAPTER_CONFIG).write_text(json.dumps({**values, "base_model_name_or_path": str(folder)}))
    with pytest.raises(UserError, match="is itself an adapter"):
        load(folder)
