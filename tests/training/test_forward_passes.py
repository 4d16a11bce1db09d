"""Every process runs the same number of forward passes, whatever hooks are enabled: sharded weights would hang otherwise."""

import json
import os
import subprocess
import sys

import pytest

from bardling.config.recipes import config_to_toml

# Trains a recipe and writes how many forward passes this rank ran: in each kind of work, and in all.
DRIVER = """
import json, os, sys
from collections import Counter
from pathlib import Path
from bardling.config.recipes import load_recipe
from bardling.distributed.context import Context
from bardling.model.gpt import GPT, Transformer
from bardling.training.run import train

count, activity = Counter(), ["start"]
original, forward = Context.activity, Transformer.forward

def record(self, name, *arguments, **options):
    activity[0] = name.split()[0]
    original(self, name, *arguments, **options)

def counted(self, *arguments, **options):
    count[activity[0]] += 1
    return forward(self, *arguments, **options)

Context.activity, Transformer.forward = record, counted
token, factor = int(sys.argv[3]), float(sys.argv[4])
whole = GPT.forward

def explode(self, tokens, targets=None, *, reduction="sum", tally=None, **rest):
    if targets is None or not self.training and reduction == "sum":
        return whole(self, tokens, targets, reduction=reduction, tally=tally, **rest)
    losses = whole(self, tokens, targets, reduction="none", **rest)
    losses = losses * __import__("torch").where((tokens == token).cumsum(1) > 0, factor, 1.0)
    if reduction == "none":
        return losses
    return losses.sum() if tally is None else losses.sum() * __import__("torch").ones(2)

GPT.forward = explode
train(load_recipe(sys.argv[1]), Path(sys.argv[2]) / "run", quiet=True)
Path(sys.argv[2], f"rank{os.environ['RANK']}.json").write_text(json.dumps(count))
"""


@pytest.fixture
def recipe(tiny, change, tmp_path):
    """Every hook enabled, an uneven number of validation sequences and task items, and documents that upset some steps."""
    rows = []
    for number in range(14):
        words = ["king", "rose", "love"] * 5
        text = "".join(f"the {word} met the sea {(n + number) % 10} times. " for n, word in enumerate(words))
        rows.append(text[:200] + "§" + text[201:] if number == 9 else text)
    source, task = tmp_path / "text.jsonl", tmp_path / "little.jsonl"
    source.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    pairs = [("king", "met"), ("rose", "met the sea"), ("love", "met")]
    items = [{"ctx": f"the {a}", "endings": [b, "sea", "times the"], "label": 0, "ind": n} for n, (a, b) in enumerate(pairs)]
    items.append({"ctx": "t", "endings": ["he king", "sea"], "label": 0, "ind": 3})
    task.write_text("".join(json.dumps(item) + "\n" for item in items))
    config = change(
        tiny,
        data={"source": str(source), "tokenizer": "byte", "val_fraction": 0.2},
        train={"steps": 60, "batch_size": 4, "micro_batch": "auto", "log_every": 5},
        eval={"every": 20, "windows": 5, "tasks": (str(task),), "tasks_every": 30},
        sample={"every": 20, "max_new_tokens": 6},
        checkpoint={"every": 20},
        guard={"policy": "rollback", "window": 16, "max_rollbacks": 8},
    )
    path = tmp_path / "recipe.toml"
    path.write_text(config_to_toml(config))
    return path


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_all_ranks_run_the_same_number_of_forward_passes(recipe, tmp_path, layout):
    recipe.write_text(recipe.read_text().replace('layout = "auto"', f'layout = "{layout}"'))
    marker = "§".encode()[0]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    command += [str(script), str(recipe), str(tmp_path), str(marker), "60"]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert any((tmp_path / "run").glob("checkpoints/*/model-00002*")) == (layout == "fsdp")
    one, two = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert one == two
    assert {"validate", "sample", "tasks", "explaining", "trying"} <= one.keys(), f"some work never ran: {one}"
