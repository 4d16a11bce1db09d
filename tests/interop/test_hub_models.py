"""Models from the hub, which is a local server that speaks its protocol."""

import json
from pathlib import Path

import pytest
import torch

from bardling.checkpoint.export import export_hf
from bardling.checkpoint.load import load
from bardling.errors import UserError
from bardling.training.run import train
from model_hub import serve

constants = pytest.importorskip("huggingface_hub.constants")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serve(tmp_path, monkeypatch, constants) as server:
        yield server


@pytest.fixture
def gpt2(hub, tiny, change, tmp_path):
    """A tiny GPT-2 under the name of the real one, with a pickled copy beside it as on the real hub."""
    folder = train(change(tiny, train={"steps": 8}), tmp_path / "first", quiet=True).folder
    export_hf(str(folder), tmp_path / "gpt2")
    files = {path.name: path.read_bytes() for path in (tmp_path / "gpt2").iterdir()}
    hub.models["openai-community/gpt2"] = {**files, "pytorch_model.bin": b"a pickle"}
    return folder


def test_gpt2_is_fetched_by_name_without_anything_that_could_run(hub, gpt2):
    loaded, own = load("gpt2"), load(gpt2)
    assert all(torch.equal(loaded.state[name], own.state[name]) for name in own.state)
    assert loaded.tokenizer.fingerprint == own.tokenizer.fingerprint
    assert "pytorch_model.bin" not in hub.fetched
    assert "model.safetensors" in hub.fetched


def test_a_run_starts_from_weights_on_the_hub_with_a_shorter_context(hub, gpt2, tiny, change, tmp_path):
    config = change(tiny, model={"init": "gpt2", "block_size": 8, "dropout": 0.1}, train={"steps": 6}, checkpoint={"every": 3})
    result = train(config, tmp_path / "tuned", quiet=True)
    tuned = load(result.folder)
    assert (tuned.config.block_size, tuned.config.dropout, tuned.config.n_embd) == (8, 0.1, 16)
    first = json.loads((result.folder / "metrics.jsonl").read_text().splitlines()[0])
    scratch = json.loads((gpt2 / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] < scratch["loss"] - 0.1, "it starts where the weights were, not at random"


def test_names_that_the_hub_does_not_have_are_one_line(hub):
    with pytest.raises(
        UserError, match="no such local folder, and the model nobody/nothing: does not exist on the hub"
    ) as error:
        load("nobody/nothing")
    assert "\n" not in str(error.value)


def test_a_gated_model_is_not_reported_as_missing(hub):
    hub.models["some/gated"] = "gated"
    with pytest.raises(UserError, match=r"model some/gated: is gated: accept its terms at .*set HF_TOKEN") as error:
        load("some/gated")
    assert "\n" not in str(error.value)


def test_without_network_the_error_names_the_remedy(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(UserError, match=r"gpt2-medium: .*cannot be downloaded from http://127.0.0.1:9") as error:
        load("gpt2-medium")
    assert "\n" not in str(error.value)


def test_a_folder_that_exists_is_never_taken_for_a_name(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("user/model").mkdir(parents=True)
    with pytest.raises(UserError, match="user/model: is not a run folder"):
        load("user/model")
