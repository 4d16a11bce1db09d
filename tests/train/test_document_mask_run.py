"""Runs that keep documents apart: exact on resume, measured so in validation and by `bardling eval`, refused without any."""

import json
import re

import pytest

from bardling.errors import UserError
from bardling.train.run import resume, train


def records(run, kind):
    return [record for line in (run / "metrics.jsonl").read_text().splitlines() if (record := json.loads(line))["kind"] == kind]


@pytest.fixture
def apart(tiny, change, corpus, tmp_path):
    """Documents of a line each, a few in every window."""
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in corpus.read_text().splitlines()))
    return change(
        tiny,
        data={"source": str(path), "tokenizer": "byte", "document_mask": True},
        model={"block_size": 96, "dropout": 0.1},
        train={"steps": 6, "micro_batch": 2},
        eval={"every": 3, "windows": 1000},
        checkpoint={"every": 1, "keep_last": 20},
        sample={"every": 6},
        optim={"warmup_steps": 2},
    )


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_a_run_resumes_exactly_at_every_step(apart, change, tmp_path, family, stopped_at, weights):
    config = change(apart, model={"family": family, "sliding_window": 24 if family == "qwen3" else None})
    whole = train(config, tmp_path / "whole", quiet=True).folder
    for step in range(1, 6):
        copy = stopped_at(step, whole, tmp_path / f"from{step}")
        resume(copy, quiet=True)
        assert weights(copy, 6) == weights(whole, 6), step
        assert [r["loss"] for r in records(copy, "val")] == [r["loss"] for r in records(whole, "val")]


def test_training_and_validation_differ_from_a_run_that_packs_blindly(apart, change, tmp_path):
    steady = change(apart, model={"dropout": 0.0})
    one = train(steady, tmp_path / "one", quiet=True).folder
    two = train(change(steady, data={"document_mask": False}), tmp_path / "two", quiet=True).folder
    for kind in ("train", "val"):
        first, second = records(one, kind)[-1]["loss"], records(two, kind)[-1]["loss"]
        assert first != pytest.approx(second, rel=1e-5)


def test_eval_measures_as_the_run_did(apart, change, tmp_path, bardling):
    run = train(apart, tmp_path / "run", quiet=True).folder
    said = bardling("eval", run, "--device", "cpu", "--precision", "float32").stdout
    found = re.search(r"loss\s+([\d.]+) nats", said)
    assert found is not None
    assert float(found[1]) == pytest.approx(records(run, "val")[-1]["loss"], abs=1e-4)


def test_a_run_may_begin_to_keep_documents_apart(apart, change, tmp_path, capsys):
    blind = change(apart, data={"document_mask": False})
    run = train(blind, tmp_path / "run", quiet=True).folder
    longer = change(apart, train={"steps": 8}, optim={"decay_steps": 6})
    assert resume(run, longer).finished
    assert "changed: data.document_mask: False -> True" in capsys.readouterr().out


def test_the_context_may_grow_meanwhile(apart, change, tmp_path, stopped_at, weights):
    growing = change(apart, train={"context_start": 24, "recompute": "blocks"})
    whole = train(growing, tmp_path / "whole", quiet=True).folder
    for step in (1, 3):
        copy = stopped_at(step, whole, tmp_path / f"from{step}")
        resume(copy, quiet=True)
        assert weights(copy, 6) == weights(whole, 6)


def test_passes_are_chosen_with_documents_too(apart, change, tmp_path):
    config = change(apart, train={"batch_size": 4, "micro_batch": "auto"})
    assert train(config, tmp_path / "run", quiet=True).finished


def test_refused_in_one_line_and_nothing_is_written(apart, change, corpus, tmp_path):
    with pytest.raises(UserError, match=r"^data\.document_mask = True: .* holds a single document: leave it out$"):
        train(change(apart, data={"source": str(corpus)}), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
