"""A `config.toml` edited by hand: a resumed run compares it with its checkpoint, and readers take the checkpoint's settings."""

import re
import shutil
import tomllib

import pytest
import tomli_w

from bardling.checkpoint.run_folder import RunFolder
from bardling.cli.main import main
from bardling.config.recipes import config_from_dict, config_to_dict
from bardling.config.run import RunConfig
from bardling.errors import UserError
from bardling.training.run import resume, train

STEPS = 6
EDITS = {
    "model.norm_eps": 0.1,
    "model.rope_theta": 500.0,
    "model.logit_softcap": 5.0,
    "model.block_size": 8,
    "model.n_embd": 32,
    "model.n_layer": 3,
    "model.vocab_size": 64,
    "model.tied": True,
    "seed": 7,
    "data.source": "stdlib",
    "data.tokenizer": "byte",
    "data.val_fraction": 0.2,
    "optim.name": "muon",
}
"""Settings that a run keeps once it has started."""


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    values = {
        "device": "cpu",
        "precision": "float32",
        "compile": "off",
        "model": {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "family": "llama", "vocab_multiple": 8},
        "data": {"source": str(corpus), "tokenizer": "char", "val_fraction": 0.1},
        "optim": {"lr": 3e-3, "warmup_steps": 2},
        "train": {"steps": STEPS, "batch_size": 4},
        "eval": {"every": 0, "windows": 4},
        "sample": {"every": 0},
    }
    return train(config_from_dict(RunConfig, values, "test"), tmp_path_factory.mktemp("edited") / "run", quiet=True).folder


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def edit(run, key, value):
    """Change one setting of config.toml."""
    values = tomllib.loads((run / "config.toml").read_text())
    *sections, name = key.split(".")
    place = values
    for section in sections:
        place = place[section]
    place[name] = value
    (run / "config.toml").write_text(tomli_w.dumps(values))


def refusal(*arguments):
    with pytest.raises(UserError) as error:
        resume(*arguments, quiet=True)
    return str(error.value)


def files(run):
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "config.toml"}


@pytest.mark.parametrize("key", EDITS)
def test_an_edit_is_refused_with_the_message_of_the_same_option(run, key):
    before = files(run)
    original = (run / "config.toml").read_text()
    edit(run, key, EDITS[key])
    message = refusal(run)
    assert f"{key} = {EDITS[key]!r}: a run that has started keeps" in message
    edited = RunFolder(run).config()
    (run / "config.toml").write_text(original)
    assert message == refusal(run, edited)
    assert files(run) == before


def test_a_config_without_its_settings_is_refused(run):
    (run / "config.toml").write_text("")
    assert re.search(r"= .*: a run that has started keeps ", refusal(run))


def test_an_edit_that_a_run_can_follow_is_reported(run, capsys):
    edit(run, "optim.lr", 1e-2)
    resume(run)
    assert "changed: optim.lr: 0.003 -> 0.01" in capsys.readouterr().out


def test_steps_raised_in_the_file_continue_the_run(run, capsys):
    edit(run, "train.steps", STEPS + 2)
    assert resume(run).step == STEPS + 2
    assert f"changed: train.steps: {STEPS} -> {STEPS + 2}" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["eval", "--precision", "float32"], ["info", "--step", "2"]])
def test_readers_use_the_settings_that_the_run_was_trained_with(run, capsys, command):
    argv = [command[0], str(run), *command[1:]]
    main(argv)
    expected = capsys.readouterr().out
    edit(run, "model.block_size", 8)
    edit(run, "seed", 7)
    edit(run, "data.val_fraction", 0.3)
    main(argv)
    assert capsys.readouterr().out == expected


def test_a_run_without_a_checkpoint_follows_its_file(run):
    """A run that was killed before its first checkpoint starts anew, with whatever its configuration says now."""
    shutil.rmtree(run / "checkpoints")
    (run / "environment.json").unlink()
    edit(run, "train.steps", 3)
    assert resume(run, quiet=True).step == 3
    assert config_to_dict(RunFolder(run).trained_config())["train"]["steps"] == 3
