"""Fixtures for tests of resumed runs."""

import shutil

import pytest


@pytest.fixture
def weights():
    """`weights(run, step)`: the weight file of a checkpoint, as bytes."""
    return lambda run, step: (run / "checkpoints" / f"step-{step:06d}" / "model.safetensors").read_bytes()


@pytest.fixture
def stopped_at():
    """`stopped_at(step, run, copy)`: copies a run as it was when the checkpoint of this step was its latest."""

    def make(step, run, copy):
        shutil.copytree(run, copy)
        for checkpoint in (copy / "checkpoints").iterdir():
            if int(checkpoint.name.removeprefix("step-")) > step:
                shutil.rmtree(checkpoint)
        return copy

    return make
