"""The EMA of the weights is validated, saved as the model, and exact after a resume."""

import json

import torch

from bardling.checkpoint.load import load
from bardling.data.batches.loader import EvalSequences
from bardling.data.tokens.dataset import open_data
from bardling.distributed.device import Precision
from bardling.evaluate.loss import evaluate_loss
from bardling.training.run import resume, train


def validations(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in lines if record["kind"] == "val"]


def test_the_ema_is_validated_and_saved_as_the_model(tiny, change, tmp_path):
    config = change(tiny, optim={"ema_decay": 0.9})
    run = train(config, tmp_path / "run", quiet=True).folder
    plain = train(tiny, tmp_path / "plain", quiet=True).folder
    assert validations(run) != validations(plain)
    losses = [
        [json.loads(line)["loss"] for line in (path / "metrics.jsonl").open() if '"train"' in line] for path in (run, plain)
    ]
    assert losses[0] == losses[1], "the EMA does not change training"
    sequences = EvalSequences(open_data(config.data).split("val"), config.model.block_size, config.eval.windows)
    result = evaluate_loss(load(run).build(), sequences, batch_size=4, precision=Precision("float32", "test", "cpu"))
    assert abs(result.loss - validations(run)[-1]) < 1e-6


def test_a_resumed_run_has_the_same_weights_and_ema(tiny, change, tmp_path):
    config = change(tiny, optim={"ema_decay": 0.9, "schedule": "constant"})
    longer = change(config, train={"steps": 40})
    train(config, tmp_path / "a", quiet=True)
    resume(tmp_path / "a", longer, quiet=True)
    train(longer, tmp_path / "b", quiet=True)
    for file in ("model.safetensors", "optimizer.safetensors"):
        one, other = ((tmp_path / name / "checkpoints" / "step-000040" / file).read_bytes() for name in "ab")
        assert one == other
    assert torch.isfinite(load(tmp_path / "a").state["transformer.wte.weight"]).all()
