"""A start that fails before its first step leaves no folder that claims to contain a run, and can be repeated."""

import shutil

import pytest
import torch

from bardling.cli.main import main
from bardling.errors import JobLost, UserError
from bardling.training.run import resume, train


@pytest.fixture
def config(tiny, change):
    return change(tiny, train={"steps": 3}, optim={"warmup_steps": 1}, sample={"every": 0}, eval={"every": 0})


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


FAILURES = {
    "the first forward pass": ("bardling.training.loop.seed_dropout", RuntimeError("x")),
    "the log": ("bardling.training.session.RunMonitor._open", UserError("wandb: no account")),
    "memory": ("bardling.training.loop.train_step", torch.OutOfMemoryError("x")),
    "Ctrl-C": ("bardling.training.loop.train_step", KeyboardInterrupt()),
    "the announcement": ("bardling.training.session.announce", OSError(5, "Input/output error")),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_start_can_be_repeated(config, tmp_path, monkeypatch, failure):
    target, error = FAILURES[failure]
    run = tmp_path / "runs" / "first"
    with monkeypatch.context() as patch:
        patch.setattr(target, failing(error))
        with pytest.raises((type(error), UserError)):
            train(config, run, quiet=True)
    assert not run.exists()
    train(config, run, quiet=True)


def test_memory_that_runs_out_at_once_names_an_option_of_the_same_command(config, change, tmp_path, monkeypatch):
    monkeypatch.setattr("bardling.training.session.UpdateTracker.updating", True, raising=False)
    monkeypatch.setattr("bardling.training.loop.train_step", failing(torch.OutOfMemoryError("x")))
    monkeypatch.setattr("bardling.training.session.FIRST_STEPS", 0)
    with pytest.raises(UserError, match=r"ran out at step 1: start with: --train.micro_batch 2$"):
        train(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_failure_after_a_step_keeps_the_run(config, tmp_path, monkeypatch):
    from bardling.training.step import train_step

    def second_fails(state, *arguments, **named):
        if state.step == 1:
            raise RuntimeError("x")
        return train_step(state, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr("bardling.training.loop.train_step", second_fails)
        with pytest.raises(RuntimeError, match="x"):
            train(config, tmp_path / "run", quiet=True)
    resume(tmp_path / "run", quiet=True)


def test_a_resumed_run_that_fails_at_once_is_kept(config, change, tmp_path, monkeypatch):
    train(config, tmp_path / "run", quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr("bardling.training.loop.train_step", failing(RuntimeError("x")))
        with pytest.raises(RuntimeError, match="x"):
            resume(tmp_path / "run", change(config, train={"steps": 5}), quiet=True)
    assert resume(tmp_path / "run", change(config, train={"steps": 5}), quiet=True).step == 5


def test_a_lost_process_leaves_a_run_that_can_be_resumed(config, tmp_path, monkeypatch):
    """As the message of the loss says."""
    with monkeypatch.context() as patch:
        patch.setattr("bardling.training.loop.train_step", failing(JobLost("rank 1")))
        with pytest.raises(JobLost):
            train(config, tmp_path / "run", quiet=True)
    resume(tmp_path / "run", quiet=True)


def test_files_of_another_trainer_are_kept(config, change, tmp_path, monkeypatch):
    first = train(config, tmp_path / "first", quiet=True).folder
    main(["export", str(first), "--format", "nanogpt", "--out", str(tmp_path / "out")])
    shutil.copy(first / "tokenizer.json", tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    longer, checkpoint = change(config, train={"steps": 5}), str(tmp_path / "out" / "ckpt.pt")
    with monkeypatch.context() as patch:
        patch.setattr("bardling.training.session.announce", failing(RuntimeError("x")))
        with pytest.raises(RuntimeError, match="x"):
            train(longer, tmp_path / "out", continue_from=checkpoint, quiet=True)
    assert not (tmp_path / "out" / "config.toml").exists()
    assert {name: (tmp_path / "out" / name).read_bytes() for name in before} == before
    assert train(longer, tmp_path / "out", continue_from=checkpoint, quiet=True).step == 5
