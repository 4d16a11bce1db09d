"""Kills, full disks, failing syncs and damage at random moments, and the page that says which test shows what."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bardling.checkpoint.run_folder import RunFolder
from bardling.errors import UserError
from bardling.training.run import train

PROJECT = Path(__file__).parents[1]
linux = pytest.mark.skipif(sys.platform != "linux", reason="the faults come from the Linux kernel")


def chaos(*arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(PROJECT / "benchmarks" / "chaos.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def figures(output: str) -> tuple[int, int, int, int, int]:
    """Trials, those that ended well, survived, and are equal; the most steps lost."""
    pattern = r"^trials (\d+), ended well (\d+), survived (\d+), (?:bitwise )?equal (\d+), steps lost \(max\) (\d+);"
    found = re.search(pattern, output, re.MULTILINE)
    assert found, output
    trials, well, survived, equal, lost = map(int, found.groups())
    return trials, well, survived, equal, lost


@linux
def test_each_fault_once_at_a_random_moment():
    trials, well, survived, equal, lost = figures(chaos("--trials", "11", "--seed", "7", "--limit", "60"))
    assert trials == well == survived == equal == 11
    assert lost < 60  # nothing began anew; the status of the script says that each lost no more than it may


@linux
@pytest.mark.slow
def test_twenty_trials_end_as_an_undisturbed_run():
    """One of them is stopped while the compiler runs."""
    trials, well, survived, equal, lost = figures(chaos("--trials", "20", "--seed", "11", "--limit", "60"))
    assert trials == well == survived == equal == 20
    assert lost < 60


@linux
@pytest.mark.slow
def test_processes_with_shards_end_as_an_undisturbed_run():
    """Every fault of this layout once, in one process or in both."""
    trials, well, survived, equal, lost = figures(chaos("--layout", "shard", "--trials", "9", "--seed", "3", "--limit", "60"))
    assert trials == well == survived == equal == 9
    assert lost < 60


@linux
def test_the_layer_below_fsync_makes_the_chosen_calls_fail_and_no_others():
    # In a process of its own: a filter for system calls can never be taken off again.
    script = """
import os, sys, tempfile
sys.path.insert(0, "benchmarks")
from faults import FsyncFaults
faults = FsyncFaults(range(2, 4))
pid = os.fork()
if pid == 0:
    faults.begin_child()
    failed = []
    with tempfile.TemporaryFile() as file:
        for number in range(1, 6):
            try:
                (os.fsync if number % 2 else os.fdatasync)(file.fileno())
            except OSError as error:
                failed.append((number, error.errno))
    os._exit(0 if failed == [(2, 5), (3, 5)] else 1)
faults.begin_parent()
_, status = os.waitpid(pid, 0)
assert status == 0, status
assert (faults.count, faults.failed) == (5, 2), (faults.count, faults.failed)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def test_a_start_that_was_killed_is_no_obstacle_to_the_next(tiny, change, tmp_path, monkeypatch):
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    short, run = change(tiny, optim={"warmup_steps": 0}, train={"steps": 2}), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_config", killed)  # the last thing that makes a folder a run
        with pytest.raises(KeyboardInterrupt):
            train(short, run, quiet=True)
    assert (run / "dataset.json").exists()
    train(short, run, quiet=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="is not an empty folder"):
        train(short, tmp_path / "mine", quiet=True)


def test_every_fault_on_the_page_names_tests_that_exist():
    text = (PROJECT / "docs" / "reliability.md").read_text()
    rows = re.findall(r"^\| (?!fault \||-)(.+?) \| (.+?) \| (.+?) \|$", text, re.MULTILINE)
    assert len(rows) > 30
    for fault, _, shown in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", shown)
        scripts = re.findall(r"`(benchmarks/[\w/]+\.py)`", shown)
        assert named, fault
        for path, name in named:
            assert (PROJECT / path).is_file(), f"{fault}: {path}"
            assert not name or f"def {name}(" in (PROJECT / path).read_text(), f"{fault}: {path}::{name}"
        for path in scripts:
            assert (PROJECT / path).is_file(), f"{fault}: {path}"
    whole = " ".join(fault for fault, _, _ in rows).lower()
    for word in (
        "sigkill",
        "sigterm",
        "sigint",
        "sigusr1",
        "disk",
        "fsync",
        "byte",
        "cut",
        "spike",
        "memory",
        "dead",
        "deadline",
    ):
        assert word in whole, word
