"""A guard that skips: a loss or gradient that has shifted for good becomes the reference, while NaN ends the run."""

import json
import math

import pytest

from bardling.errors import UserError
from bardling.model.gpt import GPT
from bardling.training.run import train


@pytest.fixture
def guarded(tiny, change):
    quiet = {"sample": {"every": 0}, "eval": {"every": 0}, "checkpoint": {"every": 0}}
    guard = {"policy": "skip", "window": 8, "max_skips": 3}
    return change(
        tiny, train={"steps": 24}, optim={"schedule": "constant", "warmup_steps": 0, "lr": 1e-4}, guard=guard, **quiet
    )


def scaled(monkeypatch, factor):
    """Multiply the loss of training passes by `factor(number of the pass)`."""
    original, passes = GPT.forward, [0]

    def forward(self, *arguments, **options):
        result = original(self, *arguments, **options)
        if not self.training:
            return result
        passes[0] += 1
        return result * factor(passes[0])

    monkeypatch.setattr(GPT, "forward", forward)


def records(run, kind):
    return [record for line in (run / "metrics.jsonl").read_text().splitlines() if (record := json.loads(line))["kind"] == kind]


@pytest.mark.parametrize("factor", [10.0, 1e4])
def test_a_shifted_loss_is_skipped_three_times_and_then_trained_on(guarded, tmp_path, monkeypatch, capsys, factor):
    scaled(monkeypatch, lambda number: factor if number > 12 else 1.0)
    run = train(guarded, tmp_path / "run")
    assert run.step == 24
    assert [event["step"] for event in records(run.folder, "event")] == [13, 14, 15]
    assert {event["action"] for event in records(run.folder, "event")} == {"skip"}
    assert "step 15: after 3 bad steps in a row, loss" in capsys.readouterr().out


def test_later_spikes_are_found_at_the_new_level(guarded, change, tmp_path, monkeypatch):
    scaled(monkeypatch, lambda number: 200.0 if number == 24 else 10.0 if number > 12 else 1.0)
    run = train(change(guarded, train={"steps": 26}), tmp_path / "run", quiet=True).folder
    assert [event["step"] for event in records(run, "event")] == [13, 14, 15, 24]


def test_a_loss_that_stays_nan_ends_the_run(guarded, tmp_path, monkeypatch):
    scaled(monkeypatch, lambda number: math.nan if number > 12 else 1.0)
    with pytest.raises(UserError, match=r"step 15: .*bad step 3 in a row \(guard.max_skips = 3\), so training has diverged"):
        train(guarded, tmp_path / "run", quiet=True)
