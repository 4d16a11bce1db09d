"""Runs with document masking: exact on resume, applied in validation and `bardling eval`, refused without documents."""

import json
import re

import pytest

from bardling.errors import UserError
from bardling.training.run import resume, train


def records(run, kind):
    return [record for line in (run / "metrics.jsonl").read_text().splitlines() if (record := json.loads(line))["kind"] == kind]


@pytest.fixture
def apart(tiny, change, corpus, tmp_path):
    """One document per line, several in each sequence."""
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


def test_training_and_validation_differ_from_a_run_without_masking(apart, change, tmp_path):
    steady = change(apart, model={"dropout": 0.0})
    one = train(steady, tmp_path / "one", quiet=True).folder
    two = train(change(steady, data={"document_mask": False}), tmp_path / "two", quiet=True).folder
    for kind in ("train", "val"):
        first, second = records(one, kind)[-1]["loss"], records(two, kind)[-1]["loss"]
        assert first != pytest.approx(second, rel=1e-5)


def test_eval_gives_the_validation_loss_of_the_run(apart, change, tmp_path, bardling):
    run = train(apart, tmp_path / "run", quiet=True).folder
    output = bardling("eval", run, "--device", "cpu", "--precision", "float32").stdout
    found = re.search(r"loss\s+([\d.]+) nats", output)
    assert found is not None
    assert float(found[1]) == pytest.approx(records(run, "val")[-1]["loss"], abs=1e-4)


def test_masking_can_be_enabled_on_resume(apart, change, tmp_path, capsys):
    blind = change(apart, data={"document_mask": False})
    run = train(blind, tmp_path / "run", quiet=True).folder
    longer = change(apart, train={"steps": 8}, optim={"decay_steps": 6})
    resume(run, longer)
    assert "changed: data.document_mask: False -> True" in capsys.readouterr().out


def test_resuming_with_a_growing_context_is_exact(apart, change, tmp_path, stopped_at, weights):
    growing = change(apart, train={"context_start": 24, "recompute": "blocks"})
    whole = train(growing, tmp_path / "whole", quiet=True).folder
    for step in (1, 3):
        copy = stopped_at(step, whole, tmp_path / f"from{step}")
        resume(copy, quiet=True)
        assert weights(copy, 6) == weights(whole, 6)


def test_auto_micro_batch_works_with_masking(apart, change, tmp_path):
    config = change(apart, train={"batch_size": 4, "micro_batch": "auto"})
    train(config, tmp_path / "run", quiet=True)


def test_a_single_document_is_refused_before_anything_is_written(apart, change, corpus, tmp_path):
    with pytest.raises(UserError, match=r"^data\.document_mask = True: .* contains a single document: omit the setting$"):
        train(change(apart, data={"source": str(corpus)}), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
