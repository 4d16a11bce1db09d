"""Initial weights: GPT-2's statistics, and the same however the model is built."""

import dataclasses
import math

import pytest
import torch

from bardling.config import ModelConfig
from bardling.model.gpt import GPT
from bardling.model.init import init_weights

CONFIG = ModelConfig(n_layer=3, n_head=4, n_embd=128, block_size=64, vocab_size=300)


def test_statistics_are_those_of_gpt2() -> None:
    for name, parameter in GPT(CONFIG, seed=7).named_parameters():
        value = parameter.detach()
        if name.endswith(".bias"):
            assert torch.all(value == 0), name
        elif ".ln_" in name:
            assert torch.all(value == 1), name
        else:
            expected = 0.02 / math.sqrt(6) if name.endswith("c_proj.weight") else 0.02
            value = value[: CONFIG.vocab_size] if "wte" in name else value
            assert float(value.std()) == pytest.approx(expected, rel=0.05), name
            assert abs(float(value.mean())) < expected * 5 / math.sqrt(value.numel()), name


def test_parameters_are_independent_and_follow_the_seed() -> None:
    model, again, other = GPT(CONFIG, seed=7), GPT(CONFIG, seed=7), GPT(CONFIG, seed=8)
    for (name, a), b, c in zip(model.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert torch.equal(a, c) == (name.endswith(".bias") or ".ln_" in name), name
    first, second = model.transformer.h[0].attn.c_attn.weight, model.transformer.h[1].attn.c_attn.weight
    assert abs(float(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1])) < 0.02


def test_meta_first_gives_the_same_weights() -> None:
    with torch.device("meta"):
        model = GPT(CONFIG)
    model.to_empty(device="cpu")
    init_weights(model, 7)
    for (name, a), b in zip(model.named_parameters(), GPT(CONFIG, seed=7).parameters(), strict=True):
        assert torch.equal(a, b), name


def test_padding_and_the_global_generator_change_nothing() -> None:
    torch.manual_seed(1)
    padded = GPT(CONFIG, seed=7).transformer.wte.weight
    torch.manual_seed(2)
    bare = GPT(dataclasses.replace(CONFIG, vocab_multiple=1), seed=7).transformer.wte.weight
    assert padded.shape[0] == 320
    assert torch.equal(padded[:300], bare)
    assert torch.all(padded[300:] == 0)


def test_no_separate_head() -> None:
    names = set(GPT(CONFIG).state_dict())
    assert "transformer.wte.weight" in names
    assert not any("lm_head" in name for name in names)
