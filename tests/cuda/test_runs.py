"""Whole runs on a GPU: every precision trains, interrupted runs end as uninterrupted ones, and memory is used as planned."""

import json
import math
import re

import pytest
import torch

from bardling.checkpoint.run_folder import RunFolder
from bardling.model.gpt import GPT
from bardling.monitor.records import TIMING_FIELDS
from bardling.training.run import resume, train


@pytest.fixture
def on_gpu(tiny, change):
    """A run of 30 steps with several forward passes per step."""
    return change(tiny, device="cuda", precision="auto", train={"batch_size": 8, "micro_batch": 4})


def records(run, kind="train"):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING_FIELDS} for line in lines if line["kind"] == kind]


def final(run):
    checkpoint = RunFolder(run).store().latest(print)
    return {name: (checkpoint / f"{name}.safetensors").read_bytes() for name in ("model", "optimizer")}


def losses(run):
    return [record["loss"] for record in records(run)]


VARIANTS = {
    "float32": {"precision": "float32"},
    "bfloat16": {"precision": "bfloat16"},
    "float16": {"precision": "float16"},
    "dropout, EMA, Muon": {"model": {"dropout": 0.1}, "optim": {"name": "muon", "ema_decay": 0.9}},
    "recomputed": {"train": {"recompute": "blocks"}},
    "llama, documents": {"model": {"family": "llama", "n_kv_head": 1}, "data": {"document_mask": True, "tokenizer": "byte"}},
    "compiled": {"compile": "on"},
    "CUDA graphs": {"compile": "on", "cuda_graphs": True},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_that_stops_and_resumes_ends_bitwise_as_an_uninterrupted_one(on_gpu, change, corpus, tmp_path, name):
    config = change(on_gpu, deterministic=True, **VARIANTS[name])
    if config.data.document_mask:  # one document per line
        path = tmp_path / "text.jsonl"
        path.write_text("".join(json.dumps({"text": line}) + "\n" for line in corpus.read_text().splitlines()))
        config = change(config, data={"source": str(path)})
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(config, whole, quiet=True)
    short = change(config, train={"steps": 15}, optim={"decay_steps": 30})
    train(short, halves, quiet=True)
    resume(halves, change(config, optim={"decay_steps": 30}), quiet=True)
    assert losses(whole) == losses(halves)
    assert final(whole) == final(halves)
    assert losses(whole)[-1] < losses(whole)[0]


def test_losses_are_close_to_the_cpus(on_gpu, change, tmp_path):
    train(change(on_gpu, precision="float32", deterministic=True), tmp_path / "gpu", quiet=True)
    train(change(on_gpu, device="cpu", precision="float32"), tmp_path / "cpu", quiet=True)
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-4)


def test_a_bad_batch_is_skipped_on_the_device(on_gpu, change, tmp_path, monkeypatch):
    original, calls = GPT.forward, 0

    def forward(self, tokens, targets=None, **options):
        nonlocal calls
        result = original(self, tokens, targets, **options)
        if self.training:
            calls += 1
            if calls == 11:
                return result * math.nan
        return result

    monkeypatch.setattr(GPT, "forward", forward)
    train(on_gpu, tmp_path / "run", quiet=True)
    assert len(records(tmp_path / "run", "event")) == 1
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "run")[6:])


def test_a_run_that_exceeds_memory_continues_with_smaller_passes(on_gpu, change, tmp_path, gpu, capsys):
    model = {"n_layer": 8, "n_head": 4, "n_embd": 512, "block_size": 512}
    config = change(
        on_gpu,
        model=model,
        train={"steps": 4, "batch_size": 256, "micro_batch": 256},
        optim={"warmup_steps": 0},
        eval={"every": 0},
        sample={"every": 0},
    )
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_per_process_memory_fraction(4e9 / torch.cuda.get_device_properties(gpu).total_memory)
        train(config, tmp_path / "run")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "memory ran out at step 1: continuing with" in capsys.readouterr().out


def test_automatic_passes_fit(on_gpu, change, tmp_path, capsys):
    model = {"n_layer": 8, "n_head": 4, "n_embd": 512, "block_size": 512}
    config = change(
        on_gpu,
        model=model,
        train={"steps": 3, "batch_size": 512, "micro_batch": "auto"},
        optim={"warmup_steps": 0},
        eval={"every": 0},
        sample={"every": 0},
    )
    torch.cuda.empty_cache()
    train(config, tmp_path / "run")
    output = capsys.readouterr().out
    assert "the largest that fits" in output
    assert "memory ran out" not in output


def test_commands_measure_and_generate_the_same_as_on_a_cpu(on_gpu, change, bardling, tmp_path):
    run = tmp_path / "run"
    train(change(on_gpu, precision="float32"), run, quiet=True)
    texts, values = [], []
    for device in ("cuda", "cpu"):
        common = ["--device", device]
        texts.append(
            bardling("sample", run, "--prompt", "The king", "--temperature", "0", "--max_new_tokens", "40", *common).stdout
        )
        values.append(float(re.search(r"loss +([0-9.]+)", bardling("eval", run, "--precision", "float32", *common).stdout)[1]))
    assert texts[0] == texts[1]
    assert values[0] == pytest.approx(values[1], rel=1e-3)
