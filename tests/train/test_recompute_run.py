"""Runs that compute activations again: the same to the bit, from any checkpoint, with the setting changed on the way too."""

import pytest
import torch

from bardling.distributed.context import SINGLE
from bardling.distributed.device import Precision
from bardling.model.gpt import GPT
from bardling.optim.build import build_optimizer
from bardling.train.library import fit_batches
from bardling.train.memory import Passes
from bardling.train.run import resume, train


@pytest.fixture
def short(tiny, change):
    return change(
        tiny,
        model={"dropout": 0.1},
        train={"steps": 8, "batch_size": 4, "micro_batch": 2},
        checkpoint={"every": 1, "keep_last": 20},
        sample={"every": 0},
        optim={"warmup_steps": 2},
    )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_is_the_same_with_and_without_and_resumes_at_every_step(short, change, tmp_path, precision, stopped_at, weights):
    kept = train(change(short, precision=precision), tmp_path / "kept", quiet=True).folder
    config = change(short, precision=precision, train={"recompute": "blocks"})
    again = train(config, tmp_path / "again", quiet=True).folder
    assert weights(again, 8) == weights(kept, 8)
    for step in range(1, 8):
        copy = stopped_at(step, again, tmp_path / f"from{step}")
        # Every other time the run goes on without.
        resume(copy, change(config, train={"recompute": "none"}) if step % 2 else None, quiet=True)
        assert weights(copy, 8) == weights(kept, 8), step


def test_scripts_can_ask_for_it(short, change):
    config = change(short, train={"recompute": "blocks", "steps": 4}, model={"vocab_size": 16})
    model = GPT(config.model)
    optimizer = build_optimizer(model.named_parameters(), config.optim, torch.device("cpu"))
    batches = [(torch.randint(16, (2, 16)), torch.randint(16, (2, 16))) for _ in range(8)]
    fit_batches(model, optimizer, batches, config.train, config.optim)
    assert model.recompute


def test_auto_counts_with_the_smaller_need(short, change):
    wide = change(short, model={"vocab_size": 16, "n_layer": 24})
    needed = [
        Passes(GPT(config.model), SINGLE, Precision("float32", "", "cpu"), config)._needed(64, "cpu")
        for config in (wide, change(wide, train={"recompute": "blocks"}))
    ]
    assert needed[1] < needed[0] / 4
