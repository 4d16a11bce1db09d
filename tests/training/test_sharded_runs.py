"""Runs whose processes hold shards: the numbers of one process, checkpoints that any layout opens, and failures of a part."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import TCPStore

from bardling.checkpoint.joint_write import JointWrite
from bardling.checkpoint.load import load_model
from bardling.checkpoint.store import CheckpointStore
from bardling.config.recipes import config_to_toml
from bardling.errors import UserError
from bardling.training.run import resume, train


@pytest.fixture
def config(tiny, change):
    model = {"family": "llama", "n_kv_head": 1}
    optim = {"name": "muon", "muon_lr": 0.01, "muon_precision": "float32", "ema_decay": 0.9}
    return change(tiny, model=model, optim=optim, train={"steps": 20, "batch_size": 8, "micro_batch": 2}, eval={"every": 4})


def records(run, kind="train"):
    return [record for line in (run / "metrics.jsonl").read_text().splitlines() if (record := json.loads(line))["kind"] == kind]


def samples(run):
    return [json.loads(line)["texts"] for line in (run / "samples.jsonl").read_text().splitlines()]


def agree(run, other, norms=1e-5):
    for key, error in (("loss", 1e-5), ("grad_norm", norms)):
        one, two = ([record[key] for record in records(each)] for each in (run, other))
        assert two == pytest.approx(one, rel=error)
    one, two = ({record["step"]: record["loss"] for record in records(each, "val")} for each in (run, other))
    assert {step: two[step] for step in one} == pytest.approx(one, rel=1e-5)
    digests = [[record["order_digest"] for record in records(each)] for each in (run, other)]
    assert digests[0] == digests[1]


def test_shards_train_save_and_continue_as_one_process(config, change, tmp_path, torchrun):
    whole, run, recipe = tmp_path / "whole", tmp_path / "run", tmp_path / "recipe.toml"
    short = change(config, train={"steps": 10}, optim={"decay_steps": 20})
    recipe.write_text(config_to_toml(short))
    done = torchrun(2, "train", recipe, "--out", run, "--parallel.layout", "fsdp", "--parallel.reshard", "false")
    assert done.returncode == 0, done.stderr
    assert "layout FSDP2 (shard 2): as configured" in done.stdout

    folder = run / "checkpoints" / "step-000010"
    parts = sorted(path.name for path in folder.glob("model*"))
    assert parts == [f"model-0000{part}-of-00002.safetensors" for part in (1, 2)] + ["model.safetensors.index.json"]
    transformers = pytest.importorskip("transformers")
    tokens = torch.arange(12).view(1, -1)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
    torch.testing.assert_close(load_model(run)(tokens), theirs, rtol=0, atol=1e-5)

    resume(run, change(short, train={"steps": 20}), quiet=True)  # in one process, which has no shards
    train(change(config, optim={"decay_steps": 20}), whole, quiet=True)
    agree(whole, run)
    assert samples(run)[1:] == samples(whole)  # there is one more, at the end of the first part
    assert [path.name for path in (run / "checkpoints" / "step-000020").glob("model*")] == ["model.safetensors"]


@pytest.mark.slow
def test_a_run_moves_from_layout_to_layout(config, change, tmp_path, torchrun):
    whole, run, recipe = tmp_path / "whole", tmp_path / "run", tmp_path / "recipe.toml"
    config = change(config, model={"n_kv_head": 2})
    train(change(config, optim={"decay_steps": 20}), whole, quiet=True)
    recipe.write_text(config_to_toml(change(config, train={"steps": 3}, optim={"decay_steps": 20})))
    moves = [
        (4, "--parallel.shard", "4"),
        (2, "--parallel.shard", "1", "--parallel.tensor", "2"),
        (4, "--parallel.shard", "2", "--parallel.tensor", "2"),
        (4, "--parallel.shard", "2", "--parallel.tensor", "1"),
        (4, "--parallel.context", "2"),
        (2, "--parallel.context", "1", "--parallel.shard", "1"),
        (3, "--parallel.shard", "3"),
    ]
    for number, (processes, *layout) in enumerate(moves):
        what = ("train", recipe, "--out", run) if number == 0 else ("resume", run, "--train.steps", 3 * (number + 1))
        if processes == 3:
            layout += ["--train.batch_size", "8"]  # which does not divide among 3
        done = torchrun(processes, *what, *layout)
        assert (done.returncode == 0) == (processes != 3), done.stderr
    resume(run, change(config, optim={"decay_steps": 20}), quiet=True)
    agree(whole, run)


@pytest.mark.slow
def test_a_run_killed_in_each_layout_is_the_undisturbed_run(config, change, tmp_path):
    whole, run, recipe = tmp_path / "whole", tmp_path / "run", tmp_path / "recipe.toml"
    config = change(config, model={"n_kv_head": 2}, train={"steps": 40}, checkpoint={"every": 2}, eval={"every": 10})
    train(config, whole, quiet=True)
    recipe.write_text(config_to_toml(config))
    legs = [(1,), (4, "--parallel.shard", "4"), (2, "--parallel.shard", "1", "--parallel.tensor", "2"), (1,)]
    for number, (processes, *layout) in enumerate(legs):
        before = latest(run)
        what = ("train", recipe, "--out", run) if number == 0 else ("resume", run, *(layout or ["--parallel.tensor", "1"]))
        kill_at_step(before + 6 + number % 2, run, processes, *what)
        assert before < latest(run) < 40
    command = [sys.executable, "-m", "bardling", "resume", str(run)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    agree(whole, run, norms=1e-4)  # differences in rounding grow over the steps
    assert samples(run) == samples(whole)


def latest(run):
    return max(CheckpointStore(run / "checkpoints", 3).steps(), default=0) if run.exists() else 0


def kill_at_step(step, run, processes, *what):
    """Run the command in several processes, and kill them and their launcher once they have taken a step."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    job = subprocess.Popen(
        [sys.executable, *launcher, "-m", "bardling", *map(str, what)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    # Workers are in sessions of their own, so they are found by their parent.
    end = time.monotonic() + 240
    try:
        while not (run / "metrics.jsonl").exists() or max((r["step"] for r in records(run)), default=0) < step:
            assert job.poll() is None
            assert time.monotonic() < end
            time.sleep(0.01)
    finally:
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        for process in [*map(int, children), job.pid]:
            os.kill(process, signal.SIGKILL)
        job.wait()


@pytest.fixture
def writers():
    """Two writers of one checkpoint, each with a connection of its own."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield [JointWrite(SimpleNamespace(store=store), number, 2) for number in range(2)]
    del store  # which was the server until here


def together(writers, folder, parts, lead):
    """Run both writers in threads; what the first one raised."""
    store, found = CheckpointStore(folder, 2), []

    def first():
        try:
            writers[0].lead(lambda write: store.save(1, write) if lead is None else lead(), parts[0])
        except (UserError, OSError) as error:
            found.append(error)

    threads = [threading.Thread(target=first), threading.Thread(target=writers[1].follow, args=(parts[1],))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return found


def part(name):
    return lambda folder: (folder / name).write_text(name) and None


def test_a_checkpoint_appears_once_all_parts_are_written(writers, tmp_path):
    for _ in range(2):  # a step that is saved again replaces the first
        assert together(writers, tmp_path, [part("a"), part("b")], None) == []
        store = CheckpointStore(tmp_path, 2)
        assert store.steps() == [1]
        assert store.verify(store.path(1)) == []
        assert {path.name for path in store.path(1).iterdir()} == {"a", "b", "manifest.json"}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_part_that_fails_leaves_no_checkpoint(writers, tmp_path):
    def full(folder):
        raise OSError(28, "No space left on device", str(folder / "b"))

    def wrong(folder):
        raise AttributeError("a fault")

    (error,) = together(writers, tmp_path, [part("a"), full], None)
    assert "rank 1 cannot write its part (No space left on device)" in str(error)
    assert CheckpointStore(tmp_path, 2).steps() == []
    (error,) = together(writers, tmp_path, [part("a"), wrong], None)
    assert str(error) == "rank 1 failed to write its part"
    assert list(tmp_path.iterdir()) == []


def test_a_first_process_that_fails_lets_the_others_go_on(writers, tmp_path):
    def fails():
        raise OSError(30, "Read-only file system")

    assert len(together(writers, tmp_path, [part("a"), part("b")], fails)) == 1
    assert together(writers, tmp_path, [part("a"), part("b")], None) == []
