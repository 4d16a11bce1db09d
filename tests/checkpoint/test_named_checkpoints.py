"""`RUN@step-000400`, `RUN@best` and `RUN@all`: checkpoints of a run by name."""

import json
import shutil

import pytest
import torch

from bardling.checkpoint.load import checkpoint_specs, find_checkpoint, load, load_tokenizer_of, run_of
from bardling.cli.main import main
from bardling.config.recipes import config_from_dict
from bardling.config.run import RunConfig
from bardling.errors import UserError
from bardling.training.run import train


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    values = {
        "device": "cpu",
        "precision": "float32",
        "compile": "off",
        "model": {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8},
        "data": {"source": str(corpus), "tokenizer": "byte"},
        "train": {"steps": 6, "batch_size": 2},
        "eval": {"every": 0, "windows": 2},
        "sample": {"every": 0},
        "checkpoint": {"every": 2, "keep_last": 3},
    }
    return train(config_from_dict(RunConfig, values, "test"), tmp_path_factory.mktemp("named") / "run", quiet=True).folder


@pytest.mark.parametrize("name", ["step-000004", "step-4"])
def test_a_step_names_its_checkpoint(run, name):
    found, folder = load(f"{run}@{name}"), run / "checkpoints" / "step-000004"
    assert find_checkpoint(run.with_name(f"run@{name}")) == folder
    expected = load(folder)
    assert all(torch.equal(found.state[key], value) for key, value in expected.state.items())
    latest = load(run).state
    assert not all(torch.equal(latest[key], value) for key, value in expected.state.items())
    assert load_tokenizer_of(f"{run}@{name}").fingerprint == load_tokenizer_of(run).fingerprint
    assert run_of(f"{run}@{name}").path.resolve() == run.resolve()


def test_best_and_all(run):
    assert find_checkpoint(run.with_name("run@best")) == find_checkpoint(run, best=True)
    assert checkpoint_specs(f"{run}@all") == tuple(f"{run}@step-{step:06d}" for step in (2, 4, 6))
    assert checkpoint_specs(f"{run}@best") == (f"{run}@best",)


@pytest.mark.parametrize("name", ["step-000005", "step-", "step-4x", "last", ""])
def test_other_names_list_the_checkpoints(run, name):
    with pytest.raises(UserError, match=r"run@\S*: no such checkpoint; .*step-000002, step-000004, step-000006, best$"):
        load(f"{run}@{name}")


def test_best_is_not_given_twice(run):
    with pytest.raises(UserError, match="omit --best"):
        load(f"{run}@step-4", best=True)


def test_an_existing_folder_with_such_a_name_is_that_folder(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(run / "checkpoints" / "step-000002", tmp_path / "run@step-4")
    assert find_checkpoint(tmp_path / "run@step-4") == tmp_path / "run@step-4"


def test_a_misspelt_run_is_reported_as_missing(run):
    with pytest.raises(UserError, match="no such folder"):
        load(f"{run}x@best")
    with pytest.raises(UserError, match="no such folder"):
        checkpoint_specs(f"{run}x@all")


def test_commands_take_the_names(run, tmp_path):
    main(["export", f"{run}@step-2", "--out", str(tmp_path / "out")])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["n_embd"] == 8
    exported, expected = load(tmp_path / "out").state, load(run / "checkpoints" / "step-000002").state
    assert all(torch.equal(exported[key], value) for key, value in expected.items())
