"""`fit_batches`: training from a script, with custom batches."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bardling import fit_batches
from bardling.config import ModelConfig, OptimConfig, TrainConfig
from bardling.distributed.device import Precision
from bardling.errors import UserError
from bardling.model.gpt import GPT
from bardling.monitor.records import TrainRecord, ValRecord
from bardling.optim.build import build_optimizer
from bardling.planning.schedules import learning_rate

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


def test_training_reports_typed_records():
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


def test_batches_may_be_endless_and_validation_is_optional():
    assert fit_batches(*parts(), itertools.cycle(pairs(2)), TrainConfig(steps=5, batch_size=4)).step == 5


@pytest.mark.parametrize(
    ("batches", "says"),
    [([], "batches: is empty"), (list(pairs(3)), "ended after 3"), (list(pairs(9, rows=2)), "set train.micro_batch = 2")],
)
def test_unsuitable_batches_are_refused_in_one_line(batches, says):
    with pytest.raises(UserError, match=says):
        fit_batches(*parts(), batches, TrainConfig(steps=5, batch_size=4), OptimConfig(warmup_steps=1))


PROCESS = """
import sys
import torch
import torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from test_library import OptimConfig, TrainConfig, fit_batches, pairs, parts
from bardling.distributed.context import Context

folder, rank = sys.argv[2], int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
model, optimizer = parts()
own = list(pairs(12, rows=2))[rank::2]
train = TrainConfig(steps=6, batch_size=4, micro_batch=2)
fit_batches(model, optimizer, own, train, OptimConfig(warmup_steps=1), context=Context(rank, 2, torch.device("cpu")))
torch.save(model.state_dict(), f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


def test_two_processes_with_different_batches_train_one_model(tmp_path):
    command = [sys.executable, "-c", PROCESS, str(Path(__file__).parent), str(tmp_path)]
    started = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(2)]
    ends = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], ends
    alone, optimizer = parts()
    fit_batches(
        alone, optimizer, pairs(12, rows=2), TrainConfig(steps=6, batch_size=4, micro_batch=2), OptimConfig(warmup_steps=1)
    )
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name, parameter in alone.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], parameter, rtol=1e-4, atol=1e-5)


def test_an_ema_is_kept_and_a_deadline_refused():
    model, optimizer = parts()
    train, optim = TrainConfig(steps=5, batch_size=4), OptimConfig(warmup_steps=1, ema_decay=0.9)
    state = fit_batches(model, optimizer, pairs(5), train, optim)
    trained = model.transformer.wte.weight.detach().clone()
    with state.evaluation_weights():
        assert not torch.equal(model.transformer.wte.weight, trained)
    with pytest.raises(UserError, match=r"train\.deadline = '1m'.*leave it out"):
        fit_batches(*parts(), pairs(5), TrainConfig(steps=5, batch_size=4, deadline="1m"), optim)


def test_float16_scales_the_loss():
    seen = []
    model, optimizer = parts()
    train, narrow = TrainConfig(steps=2, batch_size=4), Precision("float16", "as asked", "cpu")
    fit_batches(model, optimizer, pairs(2), train, OptimConfig(warmup_steps=1), precision=narrow, after_step=seen.append)
    assert seen[0].scaler is not None
