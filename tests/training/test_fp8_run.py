"""Float8 runs, on a CPU treated as a GPU that supports float8: exact resume, two processes, plans and refusals."""

import json
import subprocess
import sys

import pytest
import torch

from bardling.checkpoint.load import load
from bardling.config import RunConfig
from bardling.config.recipes import config_to_toml
from bardling.distributed import device
from bardling.distributed.device import choose_precision
from bardling.errors import UserError
from bardling.planning.plan import plan
from bardling.training.run import resume, train


@pytest.fixture
def able(monkeypatch):
    monkeypatch.setattr(device, "_require_fp8", lambda device: None)


@pytest.fixture
def short(tiny, change):
    return change(
        tiny,
        precision="bfloat16",
        fp8=True,
        model={"n_embd": 32, "dropout": 0.1},
        train={"steps": 6, "batch_size": 4, "micro_batch": 2},
        checkpoint={"every": 1, "keep_last": 20},
        sample={"every": 3},
        optim={"warmup_steps": 2},
    )


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_resuming_at_any_step_is_exact(able, short, change, tmp_path, name, stopped_at, weights):
    config = change(short, optim={"name": name})
    run = train(config, tmp_path / "run", quiet=True).folder
    plain = train(change(config, fp8=False), tmp_path / "plain", quiet=True).folder
    assert weights(run, 6) != weights(plain, 6)
    for step in range(1, 6):
        copy = stopped_at(step, run, tmp_path / f"from{step}")
        resume(copy, quiet=True)
        assert weights(copy, 6) == weights(run, 6), step
    assert {tensor.dtype for tensor in load(run).state.values()} == {torch.float32}
    assert load(run).state.keys() == load(plain).state.keys()


def test_fp8_can_be_disabled_on_resume(able, short, change, tmp_path, capsys):
    run = train(short, tmp_path / "run", quiet=True).folder
    resume(run, change(short, fp8=False, train={"steps": 8}))
    assert "changed: fp8: True -> False" in capsys.readouterr().out


def test_layers_that_stay_in_bfloat16_are_listed(able, short, change, tmp_path, capsys):
    train(change(short, model={"mlp_hidden": 100}), tmp_path / "run")
    said = " ".join(capsys.readouterr().out.split())
    assert "linear layers of blocks in float8, except mlp.c_fc, mlp.c_proj, whose sizes are not multiples of 16" in said


RANK = """
import sys
from bardling.cli.main import main
from bardling.distributed import device
device._require_fp8 = lambda device: None
sys.exit(main(sys.argv[1:]))
"""


def test_two_processes_give_nearly_the_losses_of_one(able, short, change, tmp_path):
    config = change(short, model={"dropout": 0.0}, sample={"every": 0}, train={"log_every": 1})
    one = train(config, tmp_path / "one", quiet=True).folder
    (tmp_path / "two.toml").write_text(config_to_toml(config))
    (tmp_path / "rank.py").write_text(RANK)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, tmp_path / "rank.py", "train", tmp_path / "two.toml", "--out", tmp_path / "two"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    losses = [
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").open() if '"train"' in line]
        for run in (one, tmp_path / "two")
    ]
    # Each process scales its own tensors, so rounding differs.
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


def test_devices_without_float8_are_refused_in_one_line(monkeypatch, short, tmp_path):
    with pytest.raises(UserError, match=r"fp8 = True on cpu: needs an NVIDIA GPU.*--precision bfloat16") as error:
        train(short, tmp_path / "run", quiet=True)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    with pytest.raises(UserError, match=r"compute capability 8\.6, but float8 needs 8\.9"):
        choose_precision("auto", torch.device("cuda:0"), fp8_excluded=[])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    chosen = choose_precision("auto", torch.device("cuda:0"), fp8_excluded=[])
    assert chosen.name == "bfloat16"
    assert chosen.why.endswith("linear layers of blocks in float8")


def test_plans_account_for_float8(change):
    config = change(RunConfig(), model={"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50257})
    plain = plan(config, device_name="NVIDIA H200")
    ours = plan(change(config, fp8=True), device_name="NVIDIA H200")
    assert ours.memory.activations.blocks < plain.memory.activations.blocks
    assert ours.memory.weights == plain.memory.weights
    assert plain.seconds / 1.6 < ours.seconds < plain.seconds / 1.3
    unknown = plan(change(config, fp8=True, model={"mlp_hidden": 100}), device_name="L4")
    assert unknown.seconds is None
    assert any("No float8 peak is known for L4" in note for note in unknown.notes)
    assert any("Sizes of mlp.c_fc, mlp.c_proj are not multiples of 16" in note for note in unknown.notes)
