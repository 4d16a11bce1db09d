"""Fixtures of the server's tests."""

from pathlib import Path

import pytest
import torch
from serve_help import TEMPLATE, running_server, write_folder

import bardling
from bardling.config.recipes import config_from_dict
from bardling.model.gpt import GPT


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("models") / "tiny", template=TEMPLATE)


@pytest.fixture(scope="session")
def model(folder) -> GPT:
    return bardling.load_model(folder)


@pytest.fixture(scope="module")
def served(folder):
    with running_server(folder, slots=4, queue=8) as served:
        yield served


@pytest.fixture
def greedy(model):
    """`greedy(text, count)`: the ids that follow a text."""

    def continue_text(text: str | list[int], count: int) -> list[int]:
        prompt = list(text.encode()) if isinstance(text, str) else text
        steps = bardling.generate(model, [prompt], max_new_tokens=count, temperature=0, eot_id=256)
        return [row[0] for row in steps]

    return continue_text


@pytest.fixture
def scores(model):
    """`scores(ids)`: the model's log-probabilities after each id [T, V]."""

    def compute(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([ids]))[0].log_softmax(-1)

    return compute


@pytest.fixture(scope="session")
def run(corpus, tmp_path_factory) -> Path:
    """The run runs/first, with checkpoints of the steps 10, 20 and 30."""
    values = {
        "device": "cpu",
        "precision": "float32",
        "compile": "off",
        "model": {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 64},
        "data": {"source": str(corpus), "tokenizer": "byte"},
        "train": {"steps": 30, "batch_size": 2},
        "eval": {"every": 10, "windows": 2},
        "sample": {"every": 0},
        "checkpoint": {"every": 10, "keep_last": 3},
    }
    path = tmp_path_factory.mktemp("place") / "runs" / "first"
    bardling.train(config_from_dict(bardling.RunConfig, values, "test"), path, quiet=True)
    return path
