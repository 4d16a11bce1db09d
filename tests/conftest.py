"""What many tests need: a little text, and a run that takes a second."""

import contextlib
import dataclasses
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch
from torch import Tensor, nn

from bardling.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
)

# How long an example takes is the machine's affair.
hypothesis.settings.register_profile("patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("patient")


@pytest.fixture(scope="session", autouse=True)
def dataset_cache(tmp_path_factory):
    """Datasets that tests make go to a folder of the session, never to the user's cache."""
    before = os.environ.get("BARDLING_CACHE")
    os.environ["BARDLING_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["BARDLING_CACHE"]
    else:
        os.environ["BARDLING_CACHE"] = before


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A text file of about 40 kB with some structure to learn."""
    random_words = random.Random(0)
    words = ["king", "queen", "rose", "thorn", "night", "day", "love", "war", "sea", "storm"]
    lines = []
    for number in range(1200):
        first, second = random_words.sample(words, 2)
        lines.append(f"The {first} and the {second} met {number % 7} times.\n")
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def tiny(corpus) -> RunConfig:
    """A configuration whose every step takes a few milliseconds."""
    return RunConfig(
        device="cpu",
        precision="float32",
        compile="off",
        model=ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_multiple=8),
        data=DataConfig(source=str(corpus), tokenizer="char", val_fraction=0.1),
        optim=OptimConfig(lr=3e-3, warmup_steps=5),
        train=TrainConfig(steps=30, batch_size=4, log_every=1),
        eval=EvalConfig(every=10, windows=8),
        sample=SampleConfig(every=15, max_new_tokens=8),
        checkpoint=CheckpointConfig(every=10, keep_last=3),
    )


@pytest.fixture
def change():
    """`change(config, section=dict(field=value), field=value)`: a config with some values replaced."""

    def replace(config: RunConfig, **values) -> RunConfig:
        for name, value in values.items():
            if isinstance(value, dict):
                value = dataclasses.replace(getattr(config, name), **value)
            config = dataclasses.replace(config, **{name: value})
        return config

    return replace


@pytest.fixture
def bardling():
    """Run the command in a process of its own: `bardling("train", ..., check=0)` returns the finished process."""

    def command(*argv: str, check: int | None = 0, **options) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "bardling", *map(str, argv)],
            capture_output=True,
            text=True,
            timeout=600,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100", **options.pop("env", {})},
            **options,
        )
        assert check is None or done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return command


@pytest.fixture
def torchrun():
    """Run the command in several processes: `torchrun(2, "train", ...)` returns the finished process."""

    def command(processes: int, *argv: str) -> subprocess.CompletedProcess[str]:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        return subprocess.run(
            [sys.executable, *launcher, "-m", "bardling", *map(str, argv)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )

    return command


@pytest.fixture
def held_bytes() -> Callable[..., int]:
    """`held_bytes(model, precision, *inputs, **named)`: bytes that autograd keeps after a forward pass, parameters left out."""

    def measure(model: nn.Module, precision: str, *inputs: Tensor, **named: Tensor) -> int:
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        seen: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage  # held, so that no address is used twice
            return tensor

        narrow = torch.autocast("cpu", dtype=torch.bfloat16) if precision == "bfloat16" else contextlib.nullcontext()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), narrow:
            model(*inputs, **named)
        return sum(storage.nbytes() for storage in seen.values())

    return measure
