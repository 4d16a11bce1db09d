"""A run that is killed anywhere, any number of times, ends exactly as an uninterrupted one."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from bardling.config.recipes import config_to_toml
from bardling.monitor.records import TIMING_FIELDS
from bardling.training.run import train


def metrics(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMING_FIELDS} for line in lines]


def samples(run):
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def weights(run, step):
    return (run / "checkpoints" / f"step-{step:06d}" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, corpus):
    """A recipe with frequent checkpoints of some size, so that kills can hit one while it is written."""
    folder = tmp_path_factory.mktemp("recipe")
    path = folder / "killed.toml"
    path.write_text(
        f"""
        device = "cpu"
        precision = "float32"
        compile = "off"
        [model]
        n_layer = 2
        n_head = 2
        n_embd = 64
        block_size = 32
        dropout = 0.1
        [data]
        source = "{corpus}"
        tokenizer = "char"
        val_fraction = 0.1
        [optim]
        warmup_steps = 10
        [train]
        steps = 200
        batch_size = 4
        micro_batch = 2
        log_every = 1
        [eval]
        every = 40
        windows = 32
        [sample]
        every = 50
        max_new_tokens = 12
        [checkpoint]
        every = 10
        keep_last = 2
        """
    )
    return path


SLOW_DISK = """
import os, sys, time
real = os.fsync
def fsync(file):
    time.sleep(0.05)
    real(file)
os.fsync = fsync
from bardling.cli.main import main
main(sys.argv[1:])
"""


def start(*argv, slow_disk=False):
    """Start the command. On a slow disk, a save takes half a second, about as long as ten steps: enough time to hit it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *(["-c", SLOW_DISK] if slow_disk else ["-m", "bardling"]), *map(str, argv)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def undisturbed(recipe, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    process = start("train", recipe, "--out", run)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return run


def wait_until(process, condition):
    """Poll as fast as possible: the moments that matter last milliseconds."""
    end = time.monotonic() + 300
    while process.poll() is None and not condition():
        assert time.monotonic() < end, "the condition was never met"
        time.sleep(0.0005)


def being_written(run):
    """Names of incomplete checkpoints that already have files: one being saved, and those of killed saves."""
    try:
        found = {path.parent.name for path in run.glob("checkpoints/.tmp-*/*")}
    except FileNotFoundError:  # it has just been finished
        return set()
    # Checkpoints older than the latest complete one are being deleted, under the same kind of name.
    newest = max((int(path.name.split("-")[1]) for path in run.glob("checkpoints/step-*")), default=0)
    return {name for name in found if int(name.split("-")[2]) > newest}


def lines(run):
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def assert_same(run, undisturbed):
    assert weights(run, 200) == weights(undisturbed, 200)
    assert metrics(run) == metrics(undisturbed)
    assert samples(run) == samples(undisturbed)


def test_sigkill_at_random_moments_and_while_saving(recipe, undisturbed, tmp_path):
    run, chance = tmp_path / "run", random.Random(3)

    def go(**options):
        begun = (run / "config.toml").exists()
        return start("resume", run, **options) if begun else start("train", recipe, "--out", run, **options)

    caught_saving = 0
    for _ in range(10):
        if caught_saving == 2:
            break
        target, before = lines(run) + chance.randrange(5, 30), being_written(run)
        process = go(slow_disk=True)
        wait_until(process, lambda target=target: lines(run) >= target)
        wait_until(process, lambda before=before: being_written(run) - before)
        time.sleep(chance.random() * 0.2)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        caught_saving += bool(being_written(run) - before)  # what a killed save leaves
    assert caught_saving == 2
    for _ in range(3):  # at any moment
        target = lines(run) + chance.randrange(5, 45)
        process = go()
        wait_until(process, lambda target=target: lines(run) >= target)
        time.sleep(chance.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    process = go()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert_same(run, undisturbed)
    assert not list(run.glob("checkpoints/.tmp-*")), "leftovers of killed saves are removed"


def test_sigterm_saves_and_exits_with_143(recipe, undisturbed, tmp_path):
    run, chance = tmp_path / "run", random.Random(5)
    process = start("train", recipe, "--out", run, slow_disk=True)
    for _ in range(3):
        target = lines(run) + chance.randrange(5, 40)
        wait_until(process, lambda target=target: lines(run) >= target)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 143, output
        logged = [record["step"] for record in metrics(run) if record["kind"] == "train"][-1]
        assert (run / "checkpoints" / f"step-{logged:06d}").is_dir(), "the last logged step is saved"
        process = start("resume", run, slow_disk=True)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert_same(run, undisturbed)


def test_a_signal_during_validation_or_sampling_stops_at_once_and_the_work_is_done_on_resume(
    tiny, change, tmp_path, monkeypatch
):
    from bardling.training.hooks import sample, validate
    from bardling.training.run import resume

    whole = train(tiny, tmp_path / "whole", quiet=True).folder
    for number, (module, name) in enumerate(((validate, "evaluate_loss"), (sample, "generate"))):
        original, calls = getattr(module, name), 0

        def interrupted(*args, original=original, **options):
            nonlocal calls
            calls += 1
            if calls == 2:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.01)
            return original(*args, **options)

        out = tmp_path / f"broken{number}"
        monkeypatch.setattr(module, name, interrupted)
        with pytest.raises(SystemExit) as stop:
            train(tiny, out, quiet=True)
        monkeypatch.setattr(module, name, original)
        assert stop.value.code == 143
        assert (out / "checkpoints" / f"step-{20 if name == 'evaluate_loss' else 30:06d}").is_dir()
        resume(out, quiet=True)
        assert metrics(out) == metrics(whole)
        assert samples(out) == samples(whole)
        assert weights(out, 30) == weights(whole, 30)


def test_partial_files_of_a_killed_start_are_removed(tiny, change, tmp_path):
    from bardling.training.run import resume

    run = tmp_path / "run"
    run.mkdir()
    (run / ".environment.json.7.partial").write_text("{")
    train(tiny, run, quiet=True)
    assert not list(run.glob(".*")), "a killed start does not prevent another one and leaves nothing"
    (run / ".config.toml.7.partial").write_text("[mod")
    resume(run, change(tiny, train={"steps": 32}), quiet=True)
    assert not list(run.glob(".*"))


def test_a_finished_run_continues_when_steps_are_raised(tiny, change, tmp_path):
    from bardling.training.run import resume

    constant = change(tiny, optim={"schedule": "constant"})
    longer = change(constant, train={"steps": 40})
    train(constant, tmp_path / "a", quiet=True)
    assert resume(tmp_path / "a", longer, quiet=True).step == 40
    train(longer, tmp_path / "b", quiet=True)
    assert weights(tmp_path / "a", 40) == weights(tmp_path / "b", 40)


def test_the_recipe_in_the_run_folder_reproduces_the_run(tiny, tmp_path):
    from bardling.config.recipes import load_recipe

    train(tiny, tmp_path / "a", quiet=True)
    train(load_recipe(str(tmp_path / "a" / "config.toml")), tmp_path / "b", quiet=True)
    assert weights(tmp_path / "a", 30) == weights(tmp_path / "b", 30)
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert config_to_toml(load_recipe(str(tmp_path / "b" / "config.toml"))) == (tmp_path / "a" / "config.toml").read_text()
