"""Runs with activation recomputation: bitwise equal, from any checkpoint, even if the setting changes on resume."""

import pytest
import torch

from bardling.distributed.context import SINGLE
from bardling.distributed.device import Precision
from bardling.model.gpt import GPT
from bardling.optim.build import build_optimizer
from bardling.training.build import Execution
from bardling.training.library import fit_batches
from bardling.training.objective import NextToken
from bardling.training.recovery.memory import TrialPasses
from bardling.training.run import resume, train


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
def test_recomputation_changes_nothing_and_resuming_at_any_step_is_exact(
    short, change, tmp_path, precision, stopped_at, weights
):
    kept = train(change(short, precision=precision), tmp_path / "kept", quiet=True).folder
    config = change(short, precision=precision, train={"recompute": "blocks"})
    again = train(config, tmp_path / "again", quiet=True).folder
    assert weights(again, 8) == weights(kept, 8)
    for step in range(1, 8):
        copy = stopped_at(step, again, tmp_path / f"from{step}")
        # Every other run continues without recomputation.
        resume(copy, change(config, train={"recompute": "none"}) if step % 2 else None, quiet=True)
        assert weights(copy, 8) == weights(kept, 8), step


def test_fit_batches_supports_recomputation(short, change):
    config = change(short, train={"recompute": "blocks", "steps": 4}, model={"vocab_size": 16})
    model = GPT(config.model)
    optimizer = build_optimizer(model.named_parameters(), config.optim, torch.device("cpu"))
    batches = [(torch.randint(16, (2, 16)), torch.randint(16, (2, 16))) for _ in range(8)]
    fit_batches(model, optimizer, batches, config.train, config.optim)
    assert model.recompute


def test_auto_micro_batch_accounts_for_recomputation(short, change):
    wide = change(short, model={"vocab_size": 16, "n_layer": 24})
    precision = Precision("float32", "", "cpu")
    needed = [
        TrialPasses(wide.model, wide.optim, execution, SINGLE, False, NextToken()).required_bytes(64)
        for execution in (Execution(precision), Execution(precision, recompute=True))
    ]
    assert needed[1] < needed[0] / 4
