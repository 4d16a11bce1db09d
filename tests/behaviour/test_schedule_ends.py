"""The learning rate where its schedule ends, is too short for its warmup, or changes when a run is resumed."""

import json
import re

import pytest
import torch

from bardling.checkpoint.run_folder import RunFolder
from bardling.config import OptimConfig
from bardling.distributed.context import SINGLE
from bardling.errors import UserError
from bardling.planning.batching import Horizon
from bardling.planning.schedules import learning_rate
from bardling.training.recovery.deadline import Deadline
from bardling.training.run import resume, train
from bardling.training.state import TrainState


@pytest.fixture
def short(tiny, change):
    """`short(steps=, **optim)`: a configuration that only trains."""

    def make(steps, **optim):
        quiet = {"sample": {"every": 0}, "eval": {"every": 0}, "checkpoint": {"every": 0}}
        return change(tiny, train={"steps": steps}, optim={"lr": 4e-3, "warmup_steps": 2, **optim}, **quiet)

    return make


def rates(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["lr"] for record in lines if record["kind"] == "train"}


def test_steps_after_a_decay_to_0_are_refused(short, tmp_path):
    says = re.escape(
        "optim.decay_steps = 10: the decay ends at a learning rate of 0, so steps 11 to 30 would change nothing: "
        "set train.steps = 10, optim.decay_steps = 30, or optim.min_lr above 0"
    )
    with pytest.raises(UserError, match=says):
        train(short(30, decay_steps=10, min_lr=0.0), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("optim", [{"decay_steps": 6}, {}], ids=["as many steps", "unset"])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_a_decay_to_0_may_end_with_the_run(short, tmp_path, schedule, optim):
    run = train(short(6, schedule=schedule, min_lr=0.0, **optim), tmp_path / "run", quiet=True).folder
    assert all(rate > 0 for rate in rates(run).values())
    with pytest.raises(UserError, match=r"decay_steps = 6: .* steps 7 to 9 would change nothing: set train.steps = 6"):
        resume(run, short(9, schedule=schedule, min_lr=0.0, decay_steps=6))
    assert resume(run, quiet=True).step == 6


def test_a_constant_end_of_a_decay_is_reported(short, tmp_path, capsys):
    run = train(short(8, decay_steps=4, min_lr=1e-3), tmp_path / "run").folder
    says = "the learning rate stays at 0.001 from step 5 to step 8, because its decay from 0.004 ends at optim.decay_steps = 4"
    assert says in capsys.readouterr().out
    assert {step: rate for step, rate in rates(run).items() if step > 4} == dict.fromkeys(range(5, 9), 1e-3)


def test_more_steps_on_a_finished_run_report_the_rise(short, tmp_path, capsys):
    run = train(short(8, min_lr=1e-4), tmp_path / "run", quiet=True).folder
    resume(run, short(16, min_lr=1e-4))
    out = " ".join(capsys.readouterr().out.split())
    rise = f"{rates(run)[9]:.3g}"
    assert f"WARNING: the learning rate rises from 0.0001 to {rise} at step 9, the first of this start" in out
    assert "--optim.decay_steps 8 keeps it at 0.0001" in out


def test_the_remedy_of_the_rise_works(short, tmp_path, capsys):
    run = train(short(8, min_lr=1e-4), tmp_path / "run", quiet=True).folder
    resume(run, short(16, min_lr=1e-4, decay_steps=8))
    assert "rises" not in capsys.readouterr().out
    assert rates(run)[9] == rates(run)[16] == 1e-4


def test_fewer_steps_report_the_fall(short, change, tmp_path, stopped, capsys):
    run = stopped(short(40), 4)
    resume(run, change(RunFolder(run).config(), train={"steps": 6}))
    expected = [learning_rate(4, short(1).optim, steps) for steps in (40, 6)]
    assert f"changed: learning rate of step 5: {expected[0]:.3g} -> {expected[1]:.3g}" in capsys.readouterr().out


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """`stopped(config, step)`: a run that a signal stopped after a step."""

    def make(config, step):
        from bardling.training.recovery.signals import Stopped
        from bardling.training.step import train_step

        def until(state, *arguments, **named):
            if state.step == step:
                raise Stopped
            return train_step(state, *arguments, **named)

        with monkeypatch.context() as patch:
            patch.setattr("bardling.training.loop.train_step", until)
            with pytest.raises(SystemExit):
                train(config, tmp_path / "stopped", quiet=True)
        return tmp_path / "stopped"

    return make


def test_an_unchanged_resume_reports_nothing(short, stopped, capsys):
    resume(stopped(short(8), 4))
    out = capsys.readouterr().out
    assert "rises" not in out
    assert "changed:" not in out


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_a_trial_shorter_than_the_warmup_shortens_it_and_returns_to_it(short, tmp_path, schedule, capsys):
    run = train(short(5, schedule=schedule, warmup_steps=100), tmp_path / "run").folder
    assert "optim.warmup_steps: 100 -> 4, because the run has only 5;" in capsys.readouterr().out
    assert [rates(run)[step] for step in range(1, 5)] == pytest.approx([4e-3 * step / 5 for step in range(1, 5)])
    assert rates(run)[5] == 4e-3
    longer = short(120, schedule=schedule, warmup_steps=100)
    assert RunFolder(run).config().optim.warmup_steps == 100
    resume(run, longer, quiet=True)
    assert rates(run)[6] == pytest.approx(4e-3 * 6 / 101)
    assert rates(run)[101] == 4e-3


def test_a_resumed_trial_keeps_its_shortened_warmup(short, tmp_path, stopped):
    config = short(5, warmup_steps=100)
    whole = train(config, tmp_path / "whole", quiet=True).folder
    run = stopped(config, 2)
    resume(run, quiet=True)
    assert rates(run) == rates(whole)


def test_a_warmup_that_fits_is_not_touched(short, tmp_path, capsys):
    run = train(short(5, warmup_steps=4), tmp_path / "run").folder
    assert "warmup" not in capsys.readouterr().out
    assert rates(run)[4] == pytest.approx(4e-3 * 4 / 5)


def test_a_constant_schedule_keeps_its_warmup(short, tmp_path):
    """More steps later must give the same weights as a longer run."""
    run = train(short(3, schedule="constant", warmup_steps=100), tmp_path / "run", quiet=True).folder
    assert rates(run)[3] == pytest.approx(4e-3 * 3 / 101)


def test_another_trainers_run_keeps_its_warmup(short, tmp_path):
    first = train(short(3, schedule="constant", warmup_steps=50), tmp_path / "first", quiet=True).folder
    checkpoint = first / "checkpoints" / "step-000003"
    run = train(short(6, warmup_steps=50), tmp_path / "run", continue_from=str(checkpoint), quiet=True).folder
    assert rates(run)[4] == pytest.approx(4e-3 * 4 / 51)
    resume(run, short(8, warmup_steps=50), quiet=True)
    assert rates(run)[8] == pytest.approx(4e-3 * 8 / 51)


def test_a_new_plan_that_raises_the_rate_in_the_decay_says_so():
    """A run that speeds up by a factor of two, nine tenths into its decay."""
    now, texts, horizon = [0.0], list[str](), Horizon(100)
    optim = OptimConfig(lr=1e-3, min_lr=0.0, schedule="linear", warmup_steps=0)
    state = TrainState(torch.nn.Linear(1, 1), None)  # type: ignore[arg-type]
    hook = Deadline(
        100.0,
        horizon,
        SINGLE,
        started_at=0.0,
        seconds_before=0.0,
        finishing_time=lambda rate: 0.0,
        lr_at=lambda step, steps: learning_rate(step, optim, steps),
        on_change=lambda steps, text: texts.append(text),
        clock=lambda: now[0],
    )
    hook(state, None)
    plans = []
    while state.step < horizon.steps:
        state.step += 1
        now[0] += 1.0 if state.step < 90 else 0.2
        before = learning_rate(state.step, optim, horizon.steps)
        planned = state.planned
        hook(state, object())  # type: ignore[arg-type]
        after = learning_rate(state.step, optim, horizon.steps)
        if planned and state.step < horizon.steps and after > 1.05 * before:
            plans.append(f"raises the learning rate of step {state.step + 1} from {before:.3g} to {after:.3g}")
    assert plans, "the plan never changed"
    assert [text for text in texts if "raises" in text] == [text for text in texts if any(plan in text for plan in plans)]
    assert sum("raises" in text for text in texts) == len(plans)
