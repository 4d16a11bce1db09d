"""`bardling eval` with overlapping sequences, several models, a table and a curve."""

import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch

from bardling.checkpoint.load import load
from bardling.cli.eval import run as command
from bardling.cli.main import main
from bardling.config import DataConfig
from bardling.config.recipes import config_from_dict
from bardling.config.run import RunConfig
from bardling.data.batches import IGNORE
from bardling.data.batches.loader import SlidingSequences
from bardling.data.tokens.dataset import open_data
from bardling.errors import UserError
from bardling.training.run import train

CONTEXT = 16


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    values = {
        "device": "cpu",
        "precision": "float32",
        "compile": "off",
        "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": CONTEXT},
        "data": {"source": str(corpus), "tokenizer": "byte", "val_fraction": 0.1},
        "optim": {"lr": 1e-2, "warmup_steps": 2},
        "train": {"steps": 12, "batch_size": 4},
        "eval": {"every": 0, "windows": 4},
        "sample": {"every": 0},
        "checkpoint": {"every": 4, "keep_last": 3},
    }
    return train(config_from_dict(RunConfig, values, "test"), tmp_path_factory.mktemp("tables") / "run", quiet=True).folder


@pytest.fixture
def evaluate(capsys):
    """`evaluate(...)`: what `bardling eval` prints, without its notes on the data."""

    def printed(*argv):
        capsys.readouterr()
        main(["eval", *map(str, argv), "--device", "cpu", "--precision", "float32"])
        return capsys.readouterr().out

    return printed


def plain_losses(model, ids, stride):
    """The loss of each token but the first: with as much context as there is in the first sequence that reaches it."""
    found = []
    for place in range(len(ids) - 1):
        begin = 0 if place < CONTEXT else math.ceil((place + 1 - CONTEXT) / stride) * stride
        with torch.no_grad():
            logits = model(torch.tensor([ids[begin : place + 1]]))[0, -1]
        found.append(-float(logits.double().log_softmax(-1)[ids[place + 1]]))
    return found


@pytest.mark.parametrize("stride", [1, 5, 16])
@pytest.mark.parametrize("length", [70, 17, 9])
def test_overlapping_sequences_equal_a_plain_computation(run, evaluate, tmp_path, stride, length):
    text = "The king and the naïve queen met 3 times, and 9 times by the sea."[: length - 1]
    (tmp_path / "text.txt").write_text(text)
    out = evaluate(run, "--data", tmp_path / "text.txt", "--stride", stride, "--batch_size", 3)
    ids = list(text.encode())
    losses = plain_losses(load(run).build(), ids, stride)
    assert re.search(r"^loss +(\S+)", out, re.MULTILINE)[1] == f"{sum(losses) / len(losses):.4f}"
    assert re.search(r"^perplexity +(\S+)", out, re.MULTILINE)[1] == f"{math.exp(sum(losses) / len(losses)):.2f}"
    bits = sum(losses) / math.log(2) / len(losses)  # every byte but the first is a token
    assert re.search(r"^bits per byte +(\S+)", out, re.MULTILINE)[1] == f"{bits:.4f}"
    assert f"{len(ids) - 1} tokens of" in out


@pytest.mark.parametrize("stride", [1, 7, 16])
def test_each_token_is_a_target_once_with_enough_context(run, corpus, stride):
    split = open_data(DataConfig(str(corpus), "byte")).split("val")
    sequences, seen = SlidingSequences(split, CONTEXT, stride), []
    for sample in range(sequences.n):
        targets = sequences.batch(sample, 1).targets[0]
        places = (targets != IGNORE).nonzero().flatten().tolist()
        assert sample == 0 or min(places) >= CONTEXT - stride
        seen += [sample * stride + place for place in places]
    assert seen == list(range(len(split) - 1))
    together = sequences.batch(0, sequences.n).targets
    assert int((together != IGNORE).sum()) == len(split) - 1


def test_a_stride_of_the_context_is_no_overlap(run, evaluate):
    assert evaluate(run, "--stride", CONTEXT) == evaluate(run)


def test_strides_that_cannot_be_are_refused(run, evaluate):
    with pytest.raises(UserError, match="--stride 17: must be 1 to the context of 16 tokens"):
        evaluate_error(["eval", str(run), "--stride", "17"])
    with pytest.raises(UserError, match="--windows 3: cannot be combined with --stride"):
        evaluate_error(["eval", str(run), "--stride", "4", "--windows", "3"])
    with pytest.raises(UserError, match="--stride 0: must be at least 1"):
        evaluate_error(["eval", str(run), "--stride", "0"])


def evaluate_error(argv):
    command([*argv[1:], "--device", "cpu", "--precision", "float32"])


def test_all_checkpoints_make_a_table_and_a_curve(run, evaluate, tmp_path):
    (tmp_path / "text.txt").write_text("The king and the queen met 3 times.\n" * 3)
    items = [{"ctx": "The king and the", "endings": ["queen met", "zzzz"], "label": 0}] * 3
    (tmp_path / "little.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    options = ["--data", tmp_path / "text.txt", "--tasks", tmp_path / "little.jsonl"]
    out = evaluate(f"{run}@all", *options, "--out", tmp_path / "curve.png").splitlines()
    header, rows = re.split("  +", out[0]), [re.split("  +", line.strip()) for line in out[2:5]]
    assert header[:4] == ["model", "loss", "perplexity", "bits per byte"]
    assert header[4:] == ["little accuracy_norm", "little accuracy"]
    assert [row[0] for row in rows] == [f"{run}@step-{step:06d}" for step in (4, 8, 12)]
    for row in rows:
        alone = evaluate(row[0], *options)
        assert re.search(r"^loss +(\S+)", alone, re.MULTILINE)[1] == row[1]
        assert re.search(r"^bits per byte +(\S+)", alone, re.MULTILINE)[1] == row[3]
        assert f"{row[4]} accuracy, ending losses normalised by tokens" in alone
    assert float(rows[2][1]) < float(rows[0][1])
    assert out[-1] == str(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    evaluate(f"{run}@all", *options, "--out", tmp_path / "curve.png")  # replaces its own image


def test_models_without_a_step_are_in_the_table_but_not_in_the_curve(run, evaluate, tmp_path):
    (tmp_path / "text.txt").write_text("The king and the queen met 3 times.\n")
    main(["export", str(run), "--out", str(tmp_path / "exported")])
    models = [f"{run}@step-4", run, tmp_path / "exported"]
    out = evaluate(*models, "--data", tmp_path / "text.txt", "--out", tmp_path / "curve.svg")
    cells = [re.split("  +", line.strip()) for line in out.splitlines()[2:5]]
    assert [row[0] for row in cells] == list(map(str, models))
    assert cells[1][1:] == cells[2][1:], "a run and its export"
    assert (tmp_path / "curve.svg").read_text().startswith("<?xml")


def test_a_curve_needs_several_checkpoints_and_a_free_file(run, tmp_path):
    with pytest.raises(UserError, match=r"--out .*: needs several checkpoints of a run: name them, or use RUN@all"):
        evaluate_error(["eval", str(run), "--out", str(tmp_path / "curve.png")])
    (tmp_path / "mine.png").write_bytes(b"mine")
    with pytest.raises(UserError, match="already exists and was not drawn by"):
        evaluate_error(["eval", f"{run}@all", "--out", str(tmp_path / "mine.png")])
    with pytest.raises(UserError, match="missing MODEL"):
        evaluate_error(["eval", "--data", "x"])


def test_the_help_does_not_import_torch():
    script = "import sys; from bardling.cli.main import main\ntry: main(['eval', '--help'])\nexcept SystemExit: pass\n"
    done = subprocess.run(
        [sys.executable, "-c", script + "print(sorted({'torch', 'lm_eval', 'transformers'} & set(sys.modules)))"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "100"},
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert "lm-eval:NAME" in " ".join(done.stdout.split())
