"""`bardling eval MODEL --data`: files are measured whole, with the same result for a run and its export."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from bardling.cli.main import main
from bardling.config.recipes import config_from_dict
from bardling.config.run import RunConfig
from bardling.data.tokens.dataset import open_data
from bardling.data.tokens.prepare import prepare
from bardling.evaluate.overlap import training_overlap
from bardling.training.run import train


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory) -> Path:
    values = {
        "device": "cpu",
        "precision": "float32",
        "compile": "off",
        "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 32},
        "data": {"source": str(corpus), "tokenizer": "byte", "val_fraction": 0.3},
        "optim": {"lr": 1e-2, "warmup_steps": 2},
        "train": {"steps": 20, "batch_size": 4},
        "eval": {"every": 0, "windows": 4},
        "sample": {"every": 0},
    }
    return train(config_from_dict(RunConfig, values, "test"), tmp_path_factory.mktemp("eval") / "run", quiet=True).folder


@pytest.fixture
def measure(capsys):
    """`measure(model, data)`: the rows that `bardling eval` prints."""

    def evaluate(model, data, *options):
        capsys.readouterr()
        main(["eval", str(model), "--data", str(data), "--device", "cpu", "--precision", "float32", *options])
        rows = re.split(r"\n(?=\S)", capsys.readouterr().out)
        return {key: " ".join(value.split()) for key, value in (re.split(r"  +", row, maxsplit=1) for row in rows if row)}

    return evaluate


def losses(run, ids, context):
    """The loss of each token but the first, in sequences that begin every `context` tokens, by transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(run / "checkpoints" / "step-000020", dtype=torch.float32)
    found = []
    for start in range(0, len(ids) - 1, context):
        part = torch.tensor(ids[start : start + context + 1])
        with torch.no_grad():
            logits = model(part[None, :-1]).logits[0]
        found.append(torch.nn.functional.cross_entropy(logits, part[1:], reduction="none"))
    return torch.cat(found)


TEXTS = ["hello world, you there", "The king met 5", "ab", "The rose and the sea met 3 times.\n" * 9]


@pytest.mark.parametrize("text", TEXTS)
def test_a_file_is_measured_from_its_second_token_to_its_last(run, tmp_path, measure, text):
    path = tmp_path / "text.txt"
    path.write_text(text)
    rows = measure(run, path)
    expected = losses(run, list(text.encode()), 32)
    assert rows["measured on"].startswith(f"{len(text) - 1} tokens of ")
    assert float(rows["loss"].split()[0]) == pytest.approx(expected.mean().item(), abs=1e-4)
    assert float(rows["perplexity"]) == pytest.approx(math.exp(expected.mean().item()), abs=1e-2, rel=1e-4)


def test_all_documents_of_several_are_measured(run, tmp_path, measure):
    texts = [f"The {word} of number {number}." for number, word in enumerate(["king", "rose", "king", "sea"] * 30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "files").mkdir()
    for number, text in enumerate(texts[:2]):
        (tmp_path / "files" / f"{number}.txt").write_text(text)
    assert measure(run, tmp_path / "rows.jsonl")["measured on"].startswith(f"{sum(map(len, texts)) + len(texts) - 1:,} tokens")
    assert measure(run, tmp_path / "files")["measured on"].startswith(f"{sum(map(len, texts[:2])) + 2 - 1} tokens")


def test_copies_of_one_text_can_be_evaluated(run, tmp_path, measure):
    """Nothing is held out, so they need not differ."""
    (tmp_path / "rows.jsonl").write_text('{"text": "The king."}\n' * 3)
    assert measure(run, tmp_path / "rows.jsonl")["measured on"].startswith(f"{3 * 10 - 1} tokens")


@pytest.mark.parametrize("data", ["file", "prepared"])
def test_a_run_and_its_export_agree(run, tmp_path, measure, corpus, data):
    export = shutil.copytree(run / "checkpoints" / "step-000020", tmp_path / "export")
    path = corpus
    if data == "prepared":
        path = tmp_path / "prepared"
        prepare(str(corpus), path, "byte", val_fraction=0.1)
    one, two = measure(run, path), measure(export, path)
    assert one.pop("overlap")
    assert one == two
    if data == "prepared":
        assert one["measured on"].startswith(f"{len(corpus.read_bytes()) - int(len(corpus.read_text()) * 0.9) - 1:,} tokens")


def test_a_named_dataset_keeps_its_validation_split(run, tmp_path, measure, monkeypatch):
    folder = tmp_path / "lib"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.py").write_text(f"x = {number}\n" * 20 * (number + 1))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(folder))
    rows = measure(run, "stdlib")
    assert int(rows["measured on"].split()[0]) < 20 * 6 * 3, "only the shortest file"


def test_text_that_was_trained_on_is_reported(run, tmp_path, measure, corpus):
    text = corpus.read_text()
    cases = {"training": text[:4096], "validation": text[-4096:], "new": "0123456789" * 200}
    found = {}
    for name, content in cases.items():
        (tmp_path / f"{name}.txt").write_text(content)
        found[name] = measure(run, tmp_path / f"{name}.txt")["overlap"]
    assert found["training"] == f"100.0% of this text is also training text of {run}"
    assert found["new"] == f"0.0% of this text is also training text of {run}"
    assert 0 < float(found["validation"].partition("%")[0]) < 100, "its lines are built from few words"


def test_the_overlap_with_packed_text_is_unknown_and_a_validation_text_is_named(tmp_path, measure, capsys):
    """Rows hold documents in another order, and parts of long ones, so a search would miss most of the text."""
    for name in ("train", "val"):
        rows = [f"The {name} text of number {number}, which goes on for {number} more." for number in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    values = {
        "device": "cpu",
        "precision": "float32",
        "compile": "off",
        "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 32},
        "data": {
            "source": str(tmp_path / "train.jsonl"),
            "val_source": str(tmp_path / "val.jsonl"),
            "tokenizer": "byte",
            "packing": "documents",
        },
        "train": {"steps": 2, "batch_size": 4},
        "eval": {"every": 0},
        "sample": {"every": 0},
    }
    run = train(config_from_dict(RunConfig, values, "test"), tmp_path / "run", quiet=True).folder
    rows = measure(run, tmp_path / "train.jsonl")
    assert rows["overlap"] == f"unknown, because the training text of {run} is packed into rows"
    main(["eval", str(run), "--device", "cpu", "--precision", "float32"])
    assert re.search(r"^measured on +[\d,]+ tokens of .*\bval-packed32-", capsys.readouterr().out, re.MULTILINE)


def test_overlap_is_that_of_a_plain_search(tmp_path):
    rng = np.random.default_rng(0)
    training = "".join(map(str, rng.integers(0, 10, 5000)))
    text = training[1003:1200] + "".join(map(str, rng.integers(0, 10, 200))) + training[4000:4100] + "x" * 50
    for name, content in (("training", training), ("text", text)):
        (tmp_path / f"{name}.txt").write_text(content)
    config = config_from_dict(RunConfig, {"data": {"tokenizer": "byte"}}, "test").data
    splits = []
    for name in ("training", "text"):
        import dataclasses

        splits.append(open_data(dataclasses.replace(config, source=str(tmp_path / f"{name}.txt")), 0).split("val"))
    pieces = [text[start : start + 32] for start in range(0, len(text) - 31, 32)]
    expected = sum(piece in training for piece in pieces) / len(pieces)
    assert 0.3 < expected < 0.7
    assert training_overlap(splits[1], splits[0]) == expected
