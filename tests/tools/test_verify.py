"""`bardling verify`: correct code passes, broken code fails."""

import dataclasses
import math

import pytest
import torch

from bardling.cli import verify as command
from bardling.config import ModelConfig, RunConfig
from bardling.config.recipes import config_to_toml, load_recipe
from bardling.distributed.device import Precision
from bardling.tools import small_recipe
from bardling.tools import verify as module
from bardling.tools.small_recipe import STEPS, shrink
from bardling.tools.verify import verify


def checks(result):
    return {check.name: check for check in result.checks}


def test_a_small_recipe_passes_without_being_shrunk(tiny, change, monkeypatch):
    monkeypatch.setattr(module._Verification, "compiled", lambda self, layout=None: (True, "", ""))  # tested separately below
    result = verify(change(tiny, model={"dropout": 0.1}), seconds=600)
    found = checks(result)
    assert result.passed, result
    assert found["resumed = uninterrupted"].result == "bit for bit"
    for name in ("checkpoint round trip", "micro-batches agree", "cached = full generation", "1 process = 2"):
        assert found[name].passed is True, found[name]
    assert not [note for note in result.notes if note.startswith("model.")], "small enough: not shrunk"


@pytest.mark.slow
def test_compiled_and_eager_agree(tiny):
    found = checks(verify(tiny, seconds=300))["compiled = eager"]
    assert found.passed is not False, found


def test_broken_code_fails_with_exit_status_1(tiny, tmp_path, monkeypatch, capsys):
    from bardling.model.gpt import GPT
    from bardling.training import state

    original, forward = state.load_optimizer_tensors, GPT.forward

    def forgetful(optimizer, names, tensors, meta, take):
        original(optimizer, names, {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}, meta, take)

    def depends_on_the_batch(self, tokens, targets=None, **options):
        result = forward(self, tokens, targets, **options)
        return result * (1 + 0.01 * len(tokens)) if targets is not None else result

    monkeypatch.setattr(state, "load_optimizer_tensors", forgetful)
    monkeypatch.setattr(GPT, "forward", depends_on_the_batch)
    for name in ("processes", "compiled"):
        monkeypatch.setattr(module._Verification, name, lambda self, layout=None: (True, "", ""))
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(config_to_toml(tiny))
    with pytest.raises(SystemExit) as stop:
        command.run([str(recipe), "--seconds", "600"])
    assert stop.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    failed = [line for line in lines if "FAIL" in line]
    assert [line.split("  ")[0] for line in failed] == ["resumed = uninterrupted", "micro-batches agree"]
    assert any("cached = full generation" in line and "pass" in line for line in lines)


def test_checks_that_would_start_too_late_are_skipped_with_a_reason(tiny):
    found = checks(verify(tiny, seconds=0.001))
    assert found["1 process = 2"].passed is None
    assert "--seconds" in found["1 process = 2"].result


@pytest.mark.parametrize("losses", [[math.nan, 1.0], [1.0, math.nan], [1.0]])
def test_losses_that_are_missing_or_not_finite_fail_a_check(losses):
    assert module._compare(losses, [1.0, 1.0], 1e-5)[0] is False


@pytest.mark.parametrize("recipe", ["gpt2-124m", "gpt2-xl", "quickstart"])
def test_large_recipes_shrink_to_valid_recipes_of_the_same_kind(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(small_recipe, "matmul_flops", lambda device, dtype: 3e10)
    config = load_recipe(recipe)
    small, notes = shrink(config, tmp_path, torch.device("cpu"), Precision("float32", "", "cpu"), 60)
    assert small.model.n_layer <= config.model.n_layer
    assert small.model.bias == config.model.bias
    assert small.train.steps == STEPS
    assert recipe == "quickstart" or any("n_layer" in note for note in notes)


def test_options_of_modern_models_survive_shrinking(tmp_path, monkeypatch):
    monkeypatch.setattr(small_recipe, "matmul_flops", lambda device, dtype: 1e9)
    model = ModelConfig(n_layer=24, n_head=16, n_kv_head=8, n_embd=2048, block_size=2048, family="qwen3", value_embeddings=6)
    small, _ = shrink(RunConfig(model=model), tmp_path, torch.device("cpu"), Precision("float32", "", "cpu"), 60)
    assert small.model.architecture.n_kv_head <= small.model.n_head <= 2
    assert small.model.family == "qwen3"
    assert dataclasses.replace(small) == small
