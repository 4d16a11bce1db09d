"""Tasks and monitoring services during a run."""

import json

import pytest

from bardling.config.recipes import config_to_toml
from bardling.training.run import resume, train


@pytest.fixture
def task(tmp_path):
    """A task whose correct ending continues the training text."""
    path = tmp_path / "little.jsonl"
    items = [
        {
            "ind": number,
            "activity_label": "x",
            "ctx": f"The {first} and the",
            "endings": [f"{second} met", "TTT", "TTTT", "TTTTT"],
            "label": 0,
        }
        for number, (first, second) in enumerate([("king", "queen"), ("rose", "thorn"), ("night", "day"), ("sea", "storm")])
    ]
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def records(run, kind):
    return [record for line in (run / "metrics.jsonl").read_text().splitlines() if (record := json.loads(line))["kind"] == kind]


def test_task_scores_do_not_depend_on_the_number_of_processes(tiny, change, task, tmp_path, torchrun):
    config = change(tiny, eval={"tasks": (str(task),), "tasks_every": 15})
    one = train(config, tmp_path / "one", quiet=True).folder
    found = records(one, "task")
    assert [(record["step"], record["task"], record["items"]) for record in found] == [(15, "little", 4), (30, "little", 4)]
    assert found[-1]["accuracy_norm"] == 1.0, "a model of this text prefers its endings"
    (tmp_path / "two.toml").write_text(config_to_toml(config))
    done = torchrun(2, "train", tmp_path / "two.toml", "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert records(tmp_path / "two", "task") == found


def test_tensorboard_shows_each_step_once_even_after_a_kill(tiny, change, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = change(tiny, monitor={"tensorboard": True})
    train(config, tmp_path / "run", quiet=True)
    resume(tmp_path / "run", change(config, train={"steps": 35}, optim={"decay_steps": 30}), quiet=True)
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    steps = [event.step for event in events.Scalars("train/loss")]
    assert steps == list(range(1, 36))
    logged = [record["loss"] for record in records(tmp_path / "run", "train")]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(logged)
