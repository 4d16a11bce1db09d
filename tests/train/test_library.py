"""Training from a script, with batches of one's own."""

import itertools

import pytest
import torch

from bardling import fit_batches
from bardling.config import ModelConfig, OptimConfig, TrainConfig
from bardling.errors import UserError
from bardling.model.gpt import GPT
from bardling.monitor.records import TrainRecord, ValRecord
from bardling.optim.build import build_optimizer
from bardling.optim.schedule import learning_rate

CONFIG = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=12, vocab_size=11)


def pairs(count, rows=4):
    random = torch.Generator().manual_seed(0)
    for _ in range(count):
        tokens = torch.randint(11, (rows, 1), generator=random) + torch.arange(13)  # each row counts up
        tokens %= 11
        yield tokens[:, :-1], tokens[:, 1:]


def parts():
    model = GPT(CONFIG, seed=1)
    return model, build_optimizer(model.named_parameters(), OptimConfig(lr=1e-2), torch.device("cpu"))


def test_it_trains_and_reports_typed_records():
    records, seen = [], []
    optim = OptimConfig(lr=1e-2, warmup_steps=2)
    state = fit_batches(
        *parts(),
        pairs(60),
        TrainConfig(steps=30, batch_size=8, micro_batch=4, log_every=10),
        optim,
        val_batches=pairs(3),
        eval_every=15,
        after_step=lambda state: seen.append(state.step),
        on_record=records.append,
    )
    assert (state.step, seen) == (30, list(range(1, 31)))
    trained = [record for record in records if isinstance(record, TrainRecord)]
    assert [record.step for record in trained] == [1, 10, 20, 30]
    assert trained[2].lr == pytest.approx(learning_rate(19, optim, 30))
    assert trained[-1].loss < 0.5 * trained[0].loss
    assert [record.step for record in records if isinstance(record, ValRecord)] == [15, 30]


def test_endless_batches_and_no_validation_are_fine():
    assert fit_batches(*parts(), itertools.cycle(pairs(2)), TrainConfig(steps=5, batch_size=4)).step == 5


@pytest.mark.parametrize(
    ("batches", "says"),
    [([], "none to train on"), (list(pairs(3)), "ended after 3"), (list(pairs(9, rows=2)), "set train.micro_batch = 2")],
)
def test_batches_that_do_not_fit_are_one_line(batches, says):
    with pytest.raises(UserError, match=says):
        fit_batches(*parts(), batches, TrainConfig(steps=5, batch_size=4), OptimConfig(warmup_steps=1))
