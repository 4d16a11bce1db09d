"""Runs with LoRA: adapters are trained beside fixed weights, a run stays exact, and its folder needs nothing else."""

import json
import shutil

import peft
import pytest
import torch

from bardling.checkpoint.load import load
from bardling.config.recipes import config_to_toml
from bardling.errors import UserError
from bardling.interop.peft import ADAPTER_WEIGHTS
from bardling.model.gpt import GPT
from bardling.model.lora import add_adapters
from bardling.planning.costs import flops_per_token, parameters
from bardling.planning.memory import memory_plan
from bardling.training.run import resume, train


def losses(run, kind="train"):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for line in lines if (record := json.loads(line))["kind"] == kind]


def adapter(run, step):
    folder = run / "checkpoints" / f"step-{step:06d}"
    return [(folder / name).read_bytes() for name in (ADAPTER_WEIGHTS, "optimizer.safetensors")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder for base models, which the tests share."""
    return tmp_path_factory.mktemp("models") / "base"


@pytest.fixture
def recipe(tiny, change, base):
    if not base.exists():
        train(change(tiny, train={"steps": 6}), base, quiet=True)
    tune = {"lora_rank": 4, "lora_targets": ("q_proj", "v_proj", "down_proj", "up_proj")}
    return change(
        tiny,
        model={"init": str(base), "dropout": 0.1},
        optim={"lr": 3e-2, "weight_decay": 0.0, "ema_decay": 0.9},
        train={"steps": 12},
        eval={"every": 6},
        checkpoint={"every": 4, "keep_last": 5},
        tune=tune,
    )


def test_adapters_learn_and_the_weights_stay(recipe, base, tmp_path):
    train(recipe, tmp_path / "run", quiet=True)
    validation = losses(tmp_path / "run", "val")
    assert validation[-1] < validation[0]
    own, start, result = load(tmp_path / "run" / "base"), load(base), load(tmp_path / "run")
    assert all(torch.equal(own.state[name], start.state[name]) for name in start.state)
    changed = {name for name in start.state if not torch.equal(result.state[name], start.state[name])}
    assert changed == {name for name in start.state if name.endswith(("c_attn.weight", "c_fc.weight", "mlp.c_proj.weight"))}
    keys = slice(16, 32)
    assert torch.equal(
        result.state["transformer.h.0.attn.c_attn.weight"][keys], start.state["transformer.h.0.attn.c_attn.weight"][keys]
    )

    checkpoint = tmp_path / "run" / "checkpoints" / "step-000012"
    ids = torch.arange(16)[None] % own.config.vocab_size
    with torch.no_grad():
        theirs = peft.AutoPeftModelForCausalLM.from_pretrained(checkpoint)(ids).logits
        torch.testing.assert_close(result.build()(ids), theirs, atol=1e-5, rtol=0)
    assert not (checkpoint / "model.safetensors").exists()


def test_a_stopped_run_resumes_bitwise_wherever_it_is(recipe, base, tmp_path, stopped_at):
    train(recipe, tmp_path / "whole", quiet=True)
    copy = stopped_at(4, tmp_path / "whole", tmp_path / "moved" / "copy")
    away = base.rename(base.with_name("away"))
    try:
        resume(copy, quiet=True)
    finally:
        away.rename(base)
    assert adapter(copy, 12) == adapter(tmp_path / "whole", 12)
    assert losses(copy) == losses(tmp_path / "whole")
    shutil.rmtree(copy / "base")
    with pytest.raises(UserError, match="base: is missing: it holds the weights that this run adapts"):
        resume(copy, quiet=True)
    (tmp_path / "whole" / "base").rename(tmp_path / "gone")
    with pytest.raises(UserError, match=r"is an adapter for .*/base, which cannot be opened"):
        load(tmp_path / "whole")


def test_two_processes_train_the_adapters_of_one(recipe, change, tmp_path, torchrun):
    recipe = change(recipe, model={"dropout": 0.0})
    (tmp_path / "two.toml").write_text(config_to_toml(recipe))
    done = torchrun(2, "train", tmp_path / "two.toml", "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    train(recipe, tmp_path / "one", quiet=True)
    for kind in ("train", "val"):
        assert losses(tmp_path / "two", kind) == pytest.approx(losses(tmp_path / "one", kind), rel=1e-5)


def test_new_tokens_of_a_chat_template_are_learned(recipe, change, tiny, tmp_path):
    train(change(tiny, data={"tokenizer": "byte"}, model={"block_size": 64}, train={"steps": 2}), tmp_path / "base", quiet=True)
    rows = [{"prompt": f"say {word}", "completion": word} for word in ("red", "blue") * 20]
    (tmp_path / "chat.json").write_text(json.dumps(rows))
    recipe = change(
        recipe,
        model={"init": str(tmp_path / "base"), "block_size": 64},
        data={"source": str(tmp_path / "chat.json"), "tokenizer": "byte", "chat_template": "chatml"},
    )
    train(recipe, tmp_path / "run", quiet=True)
    start, result = load(tmp_path / "run" / "base"), load(tmp_path / "run")
    assert result.config.vocab_size == load(tmp_path / "base").config.vocab_size + 3
    table = "transformer.wte.weight"
    assert torch.equal(result.state[table][:257], start.state[table][:257])
    assert (result.state[table][257:260] != start.state[table][257:260]).any(dim=1).all()
    from transformers import AutoTokenizer

    checkpoint = tmp_path / "run" / "checkpoints" / "step-000012"
    tokenizer, ids = AutoTokenizer.from_pretrained(checkpoint), torch.tensor([[65, 257, 258, 66]])
    assert tokenizer.chat_template
    with torch.no_grad():
        theirs = peft.AutoPeftModelForCausalLM.from_pretrained(checkpoint)(ids).logits
        torch.testing.assert_close(result.build()(ids), theirs, atol=1e-5, rtol=0)


def test_a_bfloat16_base_trains_nearly_as_a_float32_one(recipe, change, tmp_path):
    for dtype in ("float32", "bfloat16"):
        train(change(recipe, tune={"base_dtype": dtype}, model={"dropout": 0.0}), tmp_path / dtype, quiet=True)
    one, two = (losses(tmp_path / dtype) for dtype in ("float32", "bfloat16"))
    assert one != two
    assert two == pytest.approx(one, rel=5e-3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"init": ""}}, "tune.lora_rank = 4: name weights to adapt with --model.init"),
        ({"tune": {"lora_targets": ("gate_proj",)}}, "this model has no gate_proj: choose from"),
        ({"tune": {"new_tokens": (5, 1000)}}, r"tune.new_tokens = \(5, 1000\): the model has"),
    ],
    ids=["no weights", "no such layer", "tokens"],
)
def test_settings_that_do_not_fit_are_refused(recipe, change, tmp_path, values, message):
    with pytest.raises(UserError, match=message):
        train(change(recipe, **values), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_run_keeps_its_adapters(recipe, change, tmp_path):
    train(change(recipe, train={"steps": 4}), tmp_path / "run", quiet=True)
    with pytest.raises(UserError, match=r"tune\.lora_rank = 8: a run that has started keeps 4"):
        resume(tmp_path / "run", change(recipe, tune={"lora_rank": 8}), quiet=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora_rank": -1}, "tune.lora_rank = -1: must be at least 0"),
        ({"lora_rank": 4, "lora_alpha": 0.0}, "tune.lora_alpha = 0.0: must be above 0"),
        ({"lora_rank": 4, "lora_targets": ("c_attn",)}, "tune.lora_targets = .*must be 'all', or some of q_proj"),
        ({"lora_rank": 0, "base_dtype": "bfloat16"}, "tune.base_dtype = 'bfloat16': needs tune.lora_rank"),
    ],
)
def test_meaningless_settings_are_refused(tiny, change, values, message):
    with pytest.raises(UserError, match=message):
        change(tiny, tune=values)
    with pytest.raises(UserError, match="adapters do not support it"):
        change(change(tiny, tune={"lora_rank": 2}), optim={"name": "muon"})


def test_the_plan_counts_what_adapters_cost(tiny, change):
    config = change(tiny, model={"vocab_size": 64, "n_embd": 64}, tune={"lora_rank": 2})
    model = GPT(config.model, seed=None)
    add_adapters(model, config.tune, seed=0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    plan = memory_plan(config, config.model, 2, "float32", "cpu")
    assert plan.gradients == 4 * trained
    assert plan.weights == 4 * (parameters(config.model, padding=True) + trained)
    assert 2 / 3 < flops_per_token(config.model, tune=config.tune) / flops_per_token(config.model) < 0.9
