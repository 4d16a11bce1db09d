"""A deadline decides the number of steps: the run ends in time, decayed, validated and saved."""

import json
import time

import pytest
import torch

from bardling.config import OptimConfig, TrainConfig
from bardling.config.checks import duration_seconds
from bardling.distributed.context import SINGLE
from bardling.errors import UserError
from bardling.planning.batching import Horizon
from bardling.planning.schedules import learning_rate
from bardling.training import run as run_module
from bardling.training.recovery.deadline import Deadline
from bardling.training.resolve import resolve
from bardling.training.run import resume, train
from bardling.training.state import TrainState


@pytest.mark.parametrize(
    ("text", "seconds"), [("8h", 28800), ("1h30m", 5400), ("90s", 90), ("45m", 2700), ("2d", 172800), ("7", 7), ("1.5s", 1.5)]
)
def test_durations_are_parsed(text, seconds):
    assert duration_seconds(text, "train.deadline") == seconds


@pytest.mark.parametrize("text", ["", "soon", "8 h", "h", "-3s", "1m1h"])
def test_invalid_durations_are_refused(text):
    with pytest.raises(UserError, match=r"train.deadline = .*8h, 1h30m"):
        TrainConfig(deadline=text)


class Clock:
    """A run on a simulated clock: a step takes `speed(step)` seconds."""

    def __init__(self, budget, speed, finishing=2.0, start=0.0, before=0.0):
        self.now, self.speed = start, speed
        self.horizon = Horizon(1000)
        self.state = TrainState(torch.nn.Linear(1, 1), None)  # type: ignore[arg-type]
        self.plans = []
        self.hook = Deadline(
            budget,
            self.horizon,
            SINGLE,
            started_at=0.0,
            seconds_before=before,
            finishing_time=lambda rate: finishing,
            lr_at=lambda step, steps: learning_rate(step, OptimConfig(warmup_steps=3), steps),
            on_change=lambda steps, text: self.plans.append((self.state.step, steps)),
            clock=lambda: self.now,
        )

    def run(self):
        self.hook(self.state, None)
        rates = []
        while self.state.step < self.horizon.steps:
            rates.append(learning_rate(self.state.step, OptimConfig(warmup_steps=3), self.horizon.steps))
            self.state.step += 1
            self.now += self.speed(self.state.step)
            self.hook(self.state, object())
        return rates


@pytest.mark.parametrize(
    "speed",
    [
        lambda step: 0.5,
        lambda step: 30.0 if step == 1 else 0.5,
        lambda step: 0.5 if step < 300 else 1.0,
        lambda step: 0.5 if step < 300 else 0.1,
        lambda step: 5.5 if step % 50 == 0 else 0.5,
    ],
    ids=["even", "slow start", "slows down", "speeds up", "validations"],
)
def test_the_schedule_ends_at_the_deadline(speed):
    clock = Clock(600.0, speed)
    rates = clock.run()
    assert 575 <= clock.now <= 600
    config = OptimConfig(warmup_steps=3)
    assert rates[-1] == pytest.approx(config.final_lr, rel=0.02), "the decay has ended"
    assert len(clock.plans) < 150, "plans are made rarely, not in every step"


def test_a_deadline_that_has_passed_ends_the_run_at_once():
    clock = Clock(10.0, lambda step: 1.0, start=60.0)
    clock.run()
    assert clock.state.step == 1


def records(run, kind):
    return [record for line in (run / "metrics.jsonl").read_text().splitlines() if (record := json.loads(line))["kind"] == kind]


def test_a_run_ends_in_time_and_resumes_when_the_deadline_is_extended(tiny, change, tmp_path):
    config = change(
        tiny, train={"deadline": "5s", "steps": 10**6}, sample={"every": 0}, eval={"every": 0}, checkpoint={"every": 0}
    )
    begin = time.monotonic()
    result = train(config, tmp_path / "run", quiet=True)
    assert 2.0 <= time.monotonic() - begin <= 30.0  # generous, for busy machines; the simulated clocks above test it exactly
    steps = records(tmp_path / "run", "train")
    assert steps[-1]["step"] == result.step == records(tmp_path / "run", "val")[-1]["step"]
    assert steps[-1]["lr"] < 1.2 * config.optim.final_lr
    saved = tmp_path / "run" / "checkpoints" / f"step-{result.step:06d}"
    facts = json.loads((saved / "training.json").read_text())
    assert facts["planned_steps"] == result.step
    assert resume(tmp_path / "run", quiet=True).step == result.step, "the run is finished"
    later = f"{facts['seconds'] + 6:.0f}s"  # six seconds more, however long the first start took
    longer = resume(tmp_path / "run", change(config, train={"deadline": later}), quiet=True)
    assert longer.step > result.step


def test_set_up_counts(tiny, change, tmp_path, monkeypatch):
    def slow(*arguments):
        time.sleep(2.0)
        return resolve(*arguments)

    monkeypatch.setattr(run_module, "resolve", slow)
    config = change(tiny, train={"deadline": "2s", "steps": 10**6}, eval={"every": 0}, checkpoint={"every": 0})
    assert train(config, tmp_path / "run", quiet=True).step == 1, "no time is left"


def test_time_before_running_out_of_memory_is_counted_once():
    clock = Clock(100.0, lambda step: 1.0, before=30.0, start=20.0)
    clock.hook(clock.state, None)
    assert clock.state.seconds == 50.0
    again = Clock(
        100.0, lambda step: 1.0, before=30.0, start=21.0
    )  # memory ran out: the same start, with a smaller micro-batch
    again.hook(clock.state, None)
    assert clock.state.seconds == 51.0
