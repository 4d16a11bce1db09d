"""A checkpoint that holds an EMA of the weights can be continued in a new run, from the weights in training."""

import json

import pytest

from bardling.training.run import train


def losses(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in lines if record["kind"] == "train"}


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("decay", [0.9, 0.0])
def test_the_new_run_continues_as_the_old_one_would_have(tiny, change, tmp_path, name, decay):
    quiet = {"sample": {"every": 0}, "eval": {"every": 0}, "checkpoint": {"every": 4}}
    config = change(tiny, train={"steps": 8}, optim={"name": name, "ema_decay": 0.9, "warmup_steps": 2}, **quiet)
    whole = train(config, tmp_path / "whole", quiet=True).folder
    checkpoint = whole / "checkpoints" / "step-000004"
    again = change(config, optim={"ema_decay": decay})
    run = train(again, tmp_path / "again", continue_from=str(checkpoint), quiet=True).folder
    assert losses(run) == {step: loss for step, loss in losses(whole).items() if step > 4}
    files = [folder / "checkpoints" / "step-000008" / "model.safetensors" for folder in (whole, run)]
    assert (files[0].read_bytes() == files[1].read_bytes()) == (decay > 0), "with an EMA, the file holds its weights"


def test_a_shorter_context_crops_the_weights_in_training_too(tiny, change, tmp_path):
    quiet = {"sample": {"every": 0}, "eval": {"every": 0}}
    config = change(tiny, train={"steps": 4}, optim={"ema_decay": 0.9, "warmup_steps": 2}, **quiet)
    checkpoint = train(config, tmp_path / "first", quiet=True).folder / "checkpoints" / "step-000004"
    shorter = change(config, model={"block_size": 8}, train={"steps": 6})
    assert train(shorter, tmp_path / "run", continue_from=str(checkpoint), quiet=True).step == 6
