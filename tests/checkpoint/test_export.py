"""An export that was killed leaves no copies of the model behind for ever, and does not stand in the way of the next one."""

import os
import subprocess
import sys

import pytest

from bardling.checkpoint.export import export_hf, export_nanogpt
from bardling.training.run import train


@pytest.fixture
def run(tiny, change, tmp_path):
    train(change(tiny, optim={"warmup_steps": 0}, train={"steps": 2}, sample={"every": 0}), tmp_path / "run", quiet=True)
    return tmp_path / "run"


@pytest.fixture
def gone():
    """The number of a process that is no more."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_what_killed_exports_left_is_removed_by_the_next(run, tmp_path, gone):
    living = os.getppid()
    for number in (gone, os.getpid(), living):  # in a container a killed process's number may be ours
        for name, file in (("hf", "model.safetensors"), ("nano", "ckpt.pt")):
            (tmp_path / f".{name}.{number}.partial").mkdir()
            (tmp_path / f".{name}.{number}.partial" / file).write_bytes(b"half")
    export_hf(str(run), tmp_path / "hf")
    export_nanogpt(str(run), tmp_path / "nano")
    assert sorted(path.name for path in tmp_path.glob(".*")) == [f".hf.{living}.partial", f".nano.{living}.partial"]
    assert (tmp_path / "hf" / "model.safetensors").stat().st_size > 4
    assert sorted(path.name for path in (tmp_path / "nano").iterdir()) == ["ckpt.pt", "meta.pkl"]
