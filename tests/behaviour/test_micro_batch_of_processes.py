"""A numeric micro-batch that does not divide the sequences of each of several processes."""

import pytest

from bardling.config import TrainConfig
from bardling.errors import UserError
from bardling.planning.batching import make_plan


@pytest.mark.parametrize(
    ("batch", "asked", "processes", "used"),
    [(32, 8, 8, 4), (32, 16, 4, 8), (24, 8, 2, 6), (24, 5, 2, 4), (12, 4, 6, 2), (14, 4, 2, 1), (32, 8, 4, 8)],
)
def test_processes_use_the_nearest_divisor_below(batch, asked, processes, used):
    plan = make_plan(TrainConfig(batch_size=batch, micro_batch=asked), 16, processes)
    assert plan.micro_batch == used == max(size for size in range(1, asked + 1) if batch // processes % size == 0)
    assert plan.micro_batch * plan.accumulation * processes == batch


def test_every_sample_is_read_once():
    plan = make_plan(TrainConfig(batch_size=24, micro_batch=8, steps=1), 16, 2)
    read = [sample for rank in range(2) for first, count in plan.requests(0, 1, rank) for sample in range(first, first + count)]
    assert sorted(read) == list(range(24))


def test_a_single_process_names_the_divisor():
    with pytest.raises(UserError, match=r"^train.micro_batch = 5 does not divide train.batch_size = 32: use .*micro_batch 4$"):
        make_plan(TrainConfig(batch_size=32, micro_batch=5), 16, 1)


def test_a_run_of_two_processes_says_so_and_equals_one(tiny, change, tmp_path, torchrun):
    import json

    from bardling.config.recipes import config_to_toml
    from bardling.training.run import train

    config = change(tiny, train={"steps": 4, "batch_size": 12, "micro_batch": 4}, optim={"warmup_steps": 1})
    config = change(config, sample={"every": 0}, eval={"every": 0})
    (tmp_path / "r.toml").write_text(config_to_toml(config))
    done = torchrun(2, "train", tmp_path / "r.toml", "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    says = "changed: train.micro_batch: 4 -> 3, because each of 2 processes has 6 sequences per step"
    assert done.stdout.count(says) == 1
    train(config, tmp_path / "one", quiet=True)
    losses = []
    for run in ("one", "two"):
        lines = map(json.loads, (tmp_path / run / "metrics.jsonl").read_text().splitlines())
        losses.append([record["loss"] for record in lines if record["kind"] == "train"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
