"""What tests of resumed runs share."""

import shutil

import pytest


@pytest.fixture
def weights():
    """`weights(run, step)`: the weights' file of a checkpoint, as bytes."""
    return lambda run, step: (run / "checkpoints" / f"step-{step:06d}" / "model.safetensors").read_bytes()


@pytest.fixture
def stopped_at():
    """`stopped_at(step, run, copy)`: copies a run to where none is, as it was when it had a checkpoint of this step."""

    def make(step, run, copy):
        shutil.copytree(run, copy)
        for checkpoint in (copy / "checkpoints").iterdir():
            if int(checkpoint.name.removeprefix("step-")) > step:
                shutil.rmtree(checkpoint)
        return copy

    return make
