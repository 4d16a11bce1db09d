"""The benchmark measures the real training loop, and its results are consistent."""

import dataclasses
import gzip
import json
import re
import statistics

import pytest
import torch

from bardling.cli.bench import show_result
from bardling.config import ModelConfig
from bardling.errors import UserError
from bardling.monitor.format import ms, si
from bardling.planning.costs import flops_per_token
from bardling.tools.bench import RandomSequences, bench


@pytest.fixture
def random_tiny(tiny, change):
    """A tiny recipe with gradient accumulation, whose data does not exist."""
    return change(tiny, data={"source": "/no/such/file", "tokenizer": "byte"}, train={"batch_size": 4, "micro_batch": 2})


def test_results_are_consistent(random_tiny):
    result = bench(random_tiny, steps=6, warmup=2)
    assert len(result.step_seconds) == 6
    assert all(seconds > 0 for seconds in result.step_seconds)
    assert result.plan.accumulation == 2
    assert result.model.vocab_size == 257
    tokens = 4 * 16
    assert result.tokens_per_second == pytest.approx(tokens / statistics.median(result.step_seconds))
    assert result.flops_per_token == flops_per_token(dataclasses.replace(random_tiny.model, vocab_size=257))
    assert result.mfu is None  # there is no vendor spec for a CPU's peak
    assert result.mfu_of_matmul == pytest.approx(result.flops_per_token * result.tokens_per_second / result.matmul_flops)
    with_spec = dataclasses.replace(result, peak_flops=2 * result.matmul_flops)
    assert with_spec.mfu == pytest.approx(result.mfu_of_matmul / 2)
    assert list(result.parts) == ["data", "forward", "backward", "optimizer"]
    assert min(result.parts[name] for name in ("forward", "backward", "optimizer")) > 0
    assert result.memory_bytes > 10**7
    assert result.trace is None


def test_every_step_trains_and_progress_reaches_the_end(random_tiny, monkeypatch):
    import bardling.training.loop as loop

    done, calls, original = [], [], loop.train_step
    monkeypatch.setattr(
        loop, "train_step", lambda *given, **options: calls.append(options["lr"]) or original(*given, **options)
    )
    bench(random_tiny, steps=3, warmup=2, progress=lambda step, total: done.append((step, total)))
    assert done == [(step, 8) for step in range(1, 9)]  # 2 of warm-up, 3 timed, 3 for the parts
    assert len(calls) == 8
    assert calls[:3] == sorted(calls[:3])  # the recipe's own learning rates: still warming up
    assert calls[0] < calls[2]


def test_the_data_of_the_recipe_can_be_used(tiny):
    result = bench(tiny, steps=2, warmup=1, data="real")
    assert 0 < result.model.vocab_size < 100
    assert result.parts["data"] > 0


def test_a_profile_leaves_a_trace_and_keeps_earlier_ones(random_tiny, tmp_path):
    for _ in range(2):
        result = bench(random_tiny, steps=1, warmup=1, profile=tmp_path / "deep" / "profile")
    traces = list((tmp_path / "deep" / "profile").iterdir())
    assert len(traces) == 2
    assert result.trace in traces
    names = {event.get("name") for event in json.loads(gzip.decompress(result.trace.read_bytes()))["traceEvents"]}
    assert "aten::addmm" in names
    seconds = [row.seconds for row in result.operators]
    assert seconds == sorted(seconds, reverse=True)
    calls = {row.name: row.calls for row in result.operators}
    # Two blocks of two matrices in attention and two in the MLP, all with biases, in two forward passes.
    assert calls["aten::addmm"] == 2 * 4 * 2


def test_random_tokens_are_a_function_of_the_sample():
    source = RandomSequences(11, 5)
    batch = source.batch(3, 2)
    assert batch.inputs.shape == batch.targets.shape == (2, 5)
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    assert torch.equal(batch.inputs, source.batch(3, 2).inputs)
    assert not torch.equal(batch.inputs, source.batch(4, 2).inputs)
    assert int(source.batch(0, 500).inputs.max()) == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, r"--steps 0: must be at least 1"),
        ({"warmup": 0}, r"--warmup 0: must be at least 1"),
    ],
)
def test_bad_options_are_named(random_tiny, options, message):
    with pytest.raises(UserError, match=message):
        bench(random_tiny, **options)


def test_a_file_as_trace_folder_is_refused_first(random_tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: cannot create this folder for --profile: file exists: name another folder"):
        bench(random_tiny, steps=1, profile=tmp_path / "file")


def test_several_processes_are_refused(random_tiny, monkeypatch):
    import contextlib

    import bardling.tools.bench as module
    from bardling.distributed.context import Context

    two = contextlib.nullcontext(Context(0, 2, torch.device("cpu")))
    monkeypatch.setattr(module, "distributed", lambda device: two)
    with pytest.raises(UserError, match="without torchrun"):
        bench(random_tiny, steps=1)


def test_running_out_of_memory_names_a_remedy(random_tiny, monkeypatch):
    def full(self, notes):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr("bardling.tools.bench._Bench.measure", full)
    with pytest.raises(UserError, match=r"^train\.micro_batch = 2: .*: try --train\.micro_batch 1$"):
        bench(random_tiny, steps=1)


def test_the_table_fits_into_80_columns_of_a_terminal(random_tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    result = bench(random_tiny, steps=1, warmup=1, profile=tmp_path)
    result = dataclasses.replace(
        result,
        device="NVIDIA H200",
        peak_flops=989e12,
        matmul_flops=723.4e12,
        step_seconds=tuple(0.2 + i / 1000 for i in range(20)),
        memory_bytes=123_456_789_012,
        model=ModelConfig(n_layer=48, n_head=25, n_embd=1600, block_size=1024, vocab_size=50257),
        trace=result.trace.rename(tmp_path / "t"),
    )
    show_result(result, "random")
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    table = [line for line in lines[lines.index("") :] if not line.startswith("trace:")]
    assert max(map(len, table)) <= 80
    [step] = [line for line in table if line.startswith("step time")]
    assert "210 ms" in step  # the median, 209.5, rounded
    assert "MFU (vendor peak)" in "\n".join(table)
    assert "989 TFLOP/s" in "\n".join(table)
    assert sum(line.startswith("aten::") or "%" in line for line in table) >= 12


def test_units():
    assert [ms(0.00123), ms(0.0123), ms(0.6123), ms(1.234), ms(12.3)] == ["1.23 ms", "12.3 ms", "612 ms", "1.23 s", "12.3 s"]
    speeds = [si(speed, "FLOP/s") for speed in (1.754e11, 9.89e14, 1.29e12)]
    assert speeds == ["175 GFLOP/s", "989 TFLOP/s", "1.29 TFLOP/s"]
