"""Saving while training goes on: the same files as when it waits, failures that end nothing, and what resume believes."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import wait

import pytest
import torch

from bardling.checkpoint import saver as saving
from bardling.checkpoint import store as storing
from bardling.checkpoint.run_folder import RunFolder
from bardling.checkpoint.saver import Saver
from bardling.config import CheckpointConfig, TrainConfig
from bardling.config.recipes import config_to_dict, config_to_toml
from bardling.distributed.context import SINGLE
from bardling.distributed.device import Precision
from bardling.errors import UserError
from bardling.monitor.jsonl import read_jsonl
from bardling.monitor.records import TIMING_FIELDS
from bardling.planning.batching import make_plan
from bardling.training.build import Execution, build
from bardling.training.hooks.base import HookContext, StepTimer
from bardling.training.hooks.save import Save
from bardling.training.run import resume, train


def contents(folder):
    """A run's last state: every file of every checkpoint but the configuration, which names the way of saving."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted((folder / "checkpoints").rglob("*"))
        if path.is_file() and path.name not in ("run_config.json", "manifest.json")
    }


def metrics(folder):
    return [{k: v for k, v in record.items() if k not in TIMING_FIELDS} for record in read_jsonl(folder / "metrics.jsonl")]


def steps(folder):
    return RunFolder(folder).store().steps()


@pytest.fixture
def started(tiny, change, tmp_path):
    """A state after one step, and `saver()`, which makes savers of a run of its own."""
    config = change(tiny, model={"vocab_size": 64})

    class Started:
        state = build(config.model, config.optim, Execution(Precision("float32", "test", "cpu")), SINGLE).state
        run = tmp_path / "run"

        def step(self):
            for parameter in self.state.model.parameters():
                parameter.grad = torch.randn_like(parameter)
            self.state.optimizer.step()
            self.state.step += 1

        def saver(self, flush=lambda: None, **checkpoint):
            saved = dataclasses.replace(config.checkpoint, **checkpoint)
            facts = {"tokenizer": None, "run_config": config_to_dict(config)}
            return Saver(RunFolder(self.run), saved, SINGLE, **facts, note=self.told.append, flush=flush)

    started = Started()
    started.told = []  # what was said
    started.step()
    return started


@pytest.fixture
def slow_disk(monkeypatch):
    """A writer that waits until it is let go, before it writes anything."""
    gate = threading.Event()
    real = saving.write_checkpoint

    def write(*args, **options):
        assert gate.wait(300)
        real(*args, **options)

    monkeypatch.setattr(saving, "write_checkpoint", write)
    yield gate
    gate.set()


# --- the same content -----------------------------------------------------------------------------------------------------


def test_a_run_saves_the_same_bytes_either_way(tiny, change, tmp_path):
    for name, asynchronous in (("a", True), ("b", False)):
        config = change(tiny, checkpoint={"every": 3, "keep_last": 100, "asynchronous": asynchronous})
        train(config, tmp_path / name, quiet=True)
    assert {3, 6, 9, 30} <= set(steps(tmp_path / "a"))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")


def test_the_state_may_change_while_it_is_written(started, slow_disk):
    saver = started.saver()
    saver.prepare(started.state)
    expected = {name: tensor.clone() for name, tensor in started.state.model.state_dict().items()}
    saver.save(started.state)
    assert steps(started.run) == [], "save has returned before anything is written"
    started.step()
    started.state.hooks_done["validate"] = 99
    slow_disk.set()
    saver.wait()
    from bardling.checkpoint.contents import read_checkpoint

    found = read_checkpoint(RunFolder(started.run).store().path(1))
    assert found.training["step"] == 1
    assert found.training["hooks_done"] == {}
    for name, tensor in expected.items():
        assert torch.equal(found.model_state[name], tensor), name
        assert not torch.equal(started.state.model.state_dict()[name], tensor), name


def test_no_thread_outlives_its_save(started):
    """A thread keeps its OpenMP threads; with more of these than cores, those of training sleep after every operator."""

    def writers():
        return [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint-writer")]

    saver = started.saver()
    for action in (saver.prepare, saver.save):
        action(started.state)
        saver.wait()
        for thread in writers():
            thread.join(60)
        assert writers() == []
    assert steps(started.run) == [1]


def test_one_save_at_a_time_and_memory_that_does_not_grow(started, slow_disk):
    saver = started.saver(keep_last=10)
    saver.save(started.state)
    threading.Timer(0.05, slow_disk.set).start()
    places = set()
    for _ in range(3):
        started.step()
        saver.save(started.state)
        places.add(tuple(view.data_ptr() for view in saver._memory._views.values()))
    saver.finish(started.state)
    assert steps(started.run) == [1, 2, 3, 4]
    assert len(places) == 1


def test_figures_are_durable_before_the_checkpoint_appears(started):
    order = []
    saver = started.saver(flush=lambda: order.append(("flushed", steps(started.run))))
    saver.save(started.state)
    saver.wait()
    assert order == [("flushed", [])]
    assert steps(started.run) == [1]


def test_a_signal_just_after_a_save_does_not_write_it_again(started, monkeypatch):
    written = []
    real = saving.write_checkpoint
    monkeypatch.setattr(saving, "write_checkpoint", lambda *args, **options: (written.append(1), real(*args, **options)))
    saver = started.saver()
    saver.save(started.state)
    saver.save(started.state, last=True)
    saver.finish(started.state)
    assert len(written) == 1
    started.state.hooks_done["validate"] = 1  # something has been done since
    saver.save(started.state, last=True)
    assert len(written) == 2


def test_without_memory_for_copies_it_saves_while_training_waits(started, monkeypatch, capsys):
    def refuse(*args, **options):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr("mmap.mmap", refuse)
    saver = started.saver()
    saver.prepare(started.state)
    saver.save(started.state)
    assert steps(started.run) == [1]
    assert "training waits while checkpoints are written" in capsys.readouterr().err


# --- failures -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken_disk(monkeypatch):
    """`broken_disk(number)`: the next fsyncs, as many as asked for, fail as those of a dying disk do."""
    real, left = os.fsync, [0]

    def fsync(descriptor):
        if left[0] > 0 and threading.current_thread().name.startswith("checkpoint-writer"):
            left[0] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)

    monkeypatch.setattr(storing.os, "fsync", fsync)

    def fail(times):
        left[0] = times

    return fail


def test_a_failed_save_is_said_at_the_next_step_and_tried_again_at_the_next_interval(
    tiny, change, tmp_path, broken_disk, monkeypatch
):
    config = change(tiny, checkpoint={"every": 10, "keep_last": 10, "save_best": False})
    seen = []
    real = saving.Saver.save

    def save(self, state, *, last=False):
        self.wait()  # so that it is this save that fails
        if state.step == 10:
            broken_disk(1)
        real(self, state, last=last)
        wait([self._job] if self._job else [])  # so that the next step is the first that can say it

    def warn(self, text):
        seen.append((metrics(tmp_path / "run")[-1]["step"], text))

    monkeypatch.setattr(saving.Saver, "save", save)
    monkeypatch.setattr(saving.Saver, "_warn", warn)
    train(config, tmp_path / "run", quiet=True)
    assert len(seen) == 1
    assert seen[0][0] == 11
    assert "the checkpoint of step 10 was NOT saved" in seen[0][1]
    assert "input/output error" in seen[0][1].lower()
    assert steps(tmp_path / "run") == [20, 30]


def test_the_last_save_is_tried_twice(tiny, change, tmp_path, broken_disk, monkeypatch):
    real = saving.Saver.save

    def save(self, state, *, last=False):
        self.wait()  # so that it is this save that fails
        if last and not hasattr(self, "tried"):
            self.tried = True
            broken_disk(1)
        real(self, state, last=last)

    monkeypatch.setattr(saving.Saver, "save", save)
    train(tiny, tmp_path / "run", quiet=True)
    assert steps(tmp_path / "run")[-1] == 30


def test_a_last_save_that_fails_is_one_line_with_the_remedy_and_loses_nothing_older(
    tiny, change, tmp_path, broken_disk, monkeypatch
):
    real = saving.Saver.save

    def save(self, state, *, last=False):
        self.wait()  # so that it is this save that fails
        if last:
            broken_disk(1000)
        real(self, state, last=last)

    with monkeypatch.context() as patch:
        patch.setattr(saving.Saver, "save", save)
        with pytest.raises(UserError, match=r"the state at step 30 could not be saved \(.*bardling resume") as error:
            train(tiny, tmp_path / "run", quiet=True)
    assert "\n" not in str(error.value)
    assert steps(tmp_path / "run")[-1] == 20
    broken_disk(0)
    assert resume(tmp_path / "run", quiet=True).step == 30
    train(tiny, tmp_path / "whole", quiet=True)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    last = "checkpoints/step-000030/model.safetensors"
    assert (tmp_path / "run" / last).read_bytes() == (tmp_path / "whole" / last).read_bytes()


def test_figures_that_cannot_be_written_count_as_a_failed_save(started, capsys):
    def refuse():
        raise UserError("metrics.jsonl: cannot be written (No space left on device): make room")

    saver = started.saver(flush=refuse)
    saver.save(started.state)
    assert steps(started.run) == []
    assert "the checkpoint of step 1 was NOT saved: metrics.jsonl: cannot be written" in capsys.readouterr().err
    assert started.told
    with pytest.raises(UserError, match="the state at step 1 could not be saved"):
        saver.finish(started.state)


def test_an_error_elsewhere_lets_the_writer_finish(tiny, tmp_path, slow_disk, monkeypatch):
    """What ends a run does not cost the checkpoint that is being written."""
    from bardling.training import loop

    real = loop.train_step

    def step(state, *args, **options):
        if state.step < 15:
            return real(state, *args, **options)
        threading.Timer(0.05, slow_disk.set).start()
        raise RuntimeError("something else")

    monkeypatch.setattr(loop, "train_step", step)  # after step 15, while the checkpoint of step 10 is being written
    with pytest.raises(RuntimeError, match="something else"):
        train(tiny, tmp_path / "run", quiet=True)
    assert steps(tmp_path / "run") == [10]
    assert RunFolder(tmp_path / "run").store().verify(RunFolder(tmp_path / "run").store().path(10)) == []


# --- intervals of time ----------------------------------------------------------------------------------------------------


def test_a_time_saves_when_it_has_passed_since_the_last_save(started):
    now = [0.0]
    config = CheckpointConfig(every="1m30s", keep_last=100)
    plan = make_plan(TrainConfig(steps=40), 8, 1)
    run = HookContext(None, StepTimer(torch.device("cpu")), plan, SINGLE, Precision("float32", "test", "cpu"))
    hook = Save(run, started.saver(keep_last=100), config, clock=lambda: now[0])
    for _ in range(12):
        now[0] += 40.0
        started.step()
        hook(started.state, object())
    hook._saver.wait()
    assert steps(started.run) == [4, 7, 10, 13]  # the state began at step 1, the clock at 0: 120 s, 240 s, ...


def test_saves_by_time_change_nothing_else(tiny, change, tmp_path):
    often = change(tiny, checkpoint={"every": "0.001s", "keep_last": 100})
    train(often, tmp_path / "often", quiet=True)
    train(tiny, tmp_path / "plain", quiet=True)
    assert steps(tmp_path / "often") == list(range(1, 31))
    assert metrics(tmp_path / "often") == metrics(tmp_path / "plain")
    shutil.rmtree(tmp_path / "often" / "checkpoints" / "step-000030")
    for step in range(18, 30):
        shutil.rmtree(tmp_path / "often" / "checkpoints" / f"step-{step:06d}")
    assert resume(tmp_path / "often", quiet=True).step == 30
    assert metrics(tmp_path / "often") == metrics(tmp_path / "plain")
    last = "checkpoints/step-000030/model.safetensors"
    assert (tmp_path / "often" / last).read_bytes() == (tmp_path / "plain" / last).read_bytes()


def test_two_processes_agree_on_the_step_that_the_time_chooses(tiny, change, tmp_path):
    config = change(tiny, train={"steps": 20, "batch_size": 8}, checkpoint={"every": "0.001s", "keep_last": 100})
    (tmp_path / "two.toml").write_text(config_to_toml(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "bardling", "train"]
    done = subprocess.run(
        [*command, tmp_path / "two.toml", "--out", tmp_path / "two"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(steps(tmp_path / "two")) > 3
    run = RunFolder(tmp_path / "two")
    assert [run.store().verify(run.store().path(step)) for step in steps(run.path)] == [[]] * len(steps(run.path))
    train(change(tiny, train={"steps": 20, "batch_size": 8}), tmp_path / "one", quiet=True)
    losses = [[record["loss"] for record in metrics(tmp_path / name) if record["kind"] == "train"] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


# --- what resume believes -------------------------------------------------------------------------------------------------


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(bytes(data))


def foreign_optimizer(path):
    """Whole by its manifest, and yet nonsense."""
    from bardling.checkpoint import checksums as manifest

    facts = json.loads(path.read_text())
    facts["samples"] = "many"
    path.write_text(json.dumps(facts))
    folder = path.parent
    before = manifest.read_manifest(folder)
    (folder / "manifest.json").write_text(manifest.build_manifest(folder, before.step, before.best).to_json())


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """A run, and what it looked like when it was whole."""
    from bardling.config import CheckpointConfig, DataConfig, EvalConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig

    config = RunConfig(
        device="cpu",
        precision="float32",
        compile="off",
        model=ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_multiple=8),
        data=DataConfig(source=str(corpus), tokenizer="char", val_fraction=0.1),
        optim=OptimConfig(warmup_steps=5),
        train=TrainConfig(steps=30, batch_size=4, log_every=1),
        eval=EvalConfig(every=10, windows=4),
        checkpoint=CheckpointConfig(every=10, keep_last=3),
    )
    return train(config, tmp_path_factory.mktemp("finished") / "run", quiet=True).folder


@pytest.mark.parametrize(
    ("damage", "file", "reason"),
    [
        (cut, "optimizer.safetensors", "is damaged and skipped: optimizer.safetensors has"),
        (flip, "optimizer.safetensors", "is damaged and skipped: optimizer.safetensors has changed"),
        (flip, "training.json", "is damaged and skipped: training.json has changed"),
        (flip, "model.safetensors", "is damaged and skipped: model.safetensors has changed"),
        (flip, "rng.safetensors", "is damaged and skipped: rng.safetensors has changed"),
        (cut, "manifest.json", "is damaged and skipped: manifest.json: is not valid JSON"),
        (foreign_optimizer, "training.json", "cannot be used and is skipped: "),
    ],
)
def test_resume_falls_back_with_the_reason_and_ends_the_same(finished, tmp_path, capsys, damage, file, reason):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    damage(run / "checkpoints" / "step-000030" / file)
    assert resume(run, quiet=True).step == 30
    said = capsys.readouterr().err
    assert f"step-000030: {reason}" in said
    assert len(said.splitlines()) == 1
    assert contents(run) == contents(finished)
    assert metrics(run) == metrics(finished)


def test_with_every_checkpoint_damaged_resume_stops(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for step in steps(run):
        flip(run / "checkpoints" / f"step-{step:06d}" / "optimizer.safetensors")
    with pytest.raises(UserError, match="every checkpoint of this run is damaged"):
        resume(run, quiet=True)
    assert capsys.readouterr().err.count("is damaged and skipped") == len(steps(run))
