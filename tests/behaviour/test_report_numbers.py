"""Numbers that are shown: tokens seen, smoothed curves, parameters and MFU are what they say."""

import dataclasses
import json
import math
import random
import re
import statistics
from types import SimpleNamespace

import pytest
import torch

from bardling.cli.main import main
from bardling.config.recipes import config_to_toml
from bardling.distributed.context import SINGLE
from bardling.monitor.jsonl import read_jsonl
from bardling.planning.batching import make_plan
from bardling.planning.costs import parameters
from bardling.report.curve import curve, smooth
from bardling.tools.bench import bench
from bardling.training.hooks.base import HookContext, StepTimer
from bardling.training.hooks.log import Log
from bardling.training.run import resume, train

# ---- tokens seen ----


def short(tiny, change, **values):
    return change(tiny, optim={"warmup_steps": 0}, train={"steps": 6}, sample={"every": 0}, eval={"every": 3}, **values)


@pytest.mark.parametrize("log_every", [1, 4])
def test_tokens_seen_after_a_resume_with_another_batch_size(tiny, change, tmp_path, log_every):
    config = change(short(tiny, change), train={"log_every": log_every})
    run = train(config, tmp_path / "run", quiet=True).folder
    resume(run, change(config, train={"steps": 12, "batch_size": 10}), quiet=True)
    records = read_jsonl(run / "metrics.jsonl")
    for kind in ("train", "val"):
        steps = [record["step"] for record in records if record["kind"] == kind]
        true = [16 * (4 * min(step, 6) + 10 * max(step - 6, 0)) / 1e6 for step in steps]
        assert steps[-1] == 12
        assert curve(records, kind, in_bits=True).tokens == pytest.approx(true)


def test_validations_of_an_earlier_version_lie_between_the_training_steps_that_count_tokens():
    records = [{"kind": "train", "step": step, "loss": 2.0, "tokens": tokens} for step, tokens in ((1, 64), (5, 320), (9, 960))]
    records += [{"kind": "val", "step": step, "loss": 2.0} for step in (5, 7, 9)]
    assert curve(records, "val", in_bits=False).tokens == pytest.approx([320e-6, 640e-6, 960e-6])


# ---- smoothing ----


@pytest.mark.parametrize("seed", range(5))
def test_a_smoothed_curve_of_noise_is_near_its_mean_from_the_first_value_on(seed):
    draw = random.Random(seed)
    values = [2.23 + draw.gauss(0, 0.3) for _ in range(400)]
    values[0] = 2.76
    smoothed = smooth(values)
    assert abs(smoothed[0] - 2.23) < 0.35 < abs(values[0] - 2.23)
    assert all(abs(value - 2.23) < 0.35 for value in smoothed)
    assert statistics.fmean(smoothed) == pytest.approx(statistics.fmean(values), abs=0.02)


def test_a_smoothed_curve_does_not_lag_behind_a_falling_loss():
    falling = [5 - 0.02 * number for number in range(100)]
    assert smooth(falling) == pytest.approx(falling), "a line is its own average, also at its ends"
    decaying = [2 + 3 * math.exp(-number / 40) for number in range(200)]
    assert smooth(decaying)[20:180] == pytest.approx(decaying[20:180], abs=0.08)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], []),
        ([3.0], [3.0]),
        ([3.0, 1.0], [3.0, 1.0]),
        ([2.0, math.nan, 2.0, math.inf, 2.0], [2.0] * 5),
        ([math.nan, math.nan], [math.nan, math.nan]),
    ],
)
def test_smoothing_few_values_or_missing_ones(values, expected):
    assert smooth(values) == pytest.approx(expected, nan_ok=True)


# ---- parameters ----


def test_every_command_counts_the_parameters_of_transformers(tiny, change, tmp_path, capsys):
    """Rows that pad the vocabulary are no parameters; here it is padded to 64."""
    transformers = pytest.importorskip("transformers")
    config = change(short(tiny, change), model={"vocab_multiple": 64, "bias": True}, eval={"every": 0})
    run = train(config, tmp_path / "run").folder
    announced = float(re.search(r"([0-9.]+)M parameters", capsys.readouterr().out)[1])
    (checkpoint,) = (run / "checkpoints").glob("step-*6")
    true = transformers.AutoModelForCausalLM.from_pretrained(checkpoint).num_parameters()
    assert announced == pytest.approx(true / 1e6, abs=0.005)
    for path in (checkpoint, exported(run, tmp_path / "hf"), exported(run, tmp_path / "nanogpt") / "ckpt.pt"):
        main(["info", str(path)])
        assert f"{true:,} (" in capsys.readouterr().out
    sized = change(config, model={"vocab_size": json.loads((checkpoint / "config.json").read_text())["vocab_size"]})
    assert parameters(sized.model) == true != parameters(sized.model, padding=True)
    (tmp_path / "recipe.toml").write_text(config_to_toml(sized))
    main(["plan", str(tmp_path / "recipe.toml")])
    assert f"{true:,}" in capsys.readouterr().out
    assert bench(sized, steps=1, warmup=1).parameters == true


def exported(run, out):
    main(["export", str(run), "--format", out.name, "--out", str(out)])
    return out


# ---- MFU ----


class Lines:
    def __init__(self):
        self.records, self.warnings = [], []

    def log(self, record):
        self.records.append(record)

    def warn(self, text):
        self.warnings.append(text)


def test_a_peak_that_the_run_exceeds_is_unknown_from_then_on(tiny):
    lines, plan = Lines(), make_plan(tiny.train, 16, 1)
    run = HookContext(lines, StepTimer(torch.device("cpu")), plan, SINGLE, None)
    hook = Log(run, every=1, sequences_per_epoch=None, flops_per_token=lambda context: 1000, peak_flops=1e12)
    one = torch.tensor(1.0)
    result = SimpleNamespace(loss=one, sums={}, grad_norm=one, lr=0.1)
    for step, peak in ((1, 1e12), (2, 1.0), (3, None), (4, None)):
        if peak is not None:
            hook.peak_flops = peak
        hook(SimpleNamespace(step=step, samples=4 * step, digest_samples=lambda: None), result)
    assert [record.mfu is None for record in lines.records] == [False, True, True, True]
    assert 0 < lines.records[0].mfu < 1
    (warning,) = lines.warnings
    assert "the peak is unknown" in warning


def test_bench_reports_no_mfu_above_the_peak(tiny, change, capsys):
    from bardling.cli.bench import show_result

    result = bench(change(tiny, model={"vocab_size": 64}), steps=2, warmup=1)
    slow = dataclasses.replace(result, matmul_flops=result.flops_per_second / 2, peak_flops=result.flops_per_second / 3)
    assert (slow.mfu, slow.mfu_of_matmul) == (None, None)
    show_result(slow, "random")
    assert capsys.readouterr().out.count("unknown") == 2
