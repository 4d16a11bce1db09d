"""Integers that a run's files cannot hold are refused at the start, so that no run starts that cannot be resumed."""

import pytest

from bardling.cli.main import main
from bardling.config import RunConfig, TrainConfig
from bardling.config.recipes import config_to_toml, parse_recipe
from bardling.errors import UserError
from bardling.training.run import resume, train


@pytest.mark.parametrize("seed", [2**63, 2**64, 2**70, -(2**63) - 1, 10**30])
def test_a_seed_of_more_than_63_bits_is_refused(seed):
    with pytest.raises(UserError, match=rf"^seed: an integer of {seed.bit_length()} bits is too large: use at most 63 bits$"):
        RunConfig(seed=seed)


def test_other_integers_are_refused_by_name():
    with pytest.raises(UserError, match=r"^train\.log_every: an integer of 65 bits is too large"):
        RunConfig(train=TrainConfig(log_every=2**64))


@pytest.mark.parametrize("option", ["--seed", "--train.log_every", "--checkpoint.keep_every"])
def test_the_command_line_refuses_them_before_anything_is_written(option, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "quickstart", "--out", str(tmp_path / "run"), option, str(2**70)])
    assert stop.value.code == 2
    assert f"{option[2:]}: an integer of 71 bits is too large" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("seed", [2**63 - 1, -(2**63) + 1, -1, 0])
def test_the_largest_seeds_are_read_back(seed):
    config = RunConfig(seed=seed)
    assert parse_recipe(config_to_toml(config), "test") == config


def test_a_run_with_a_large_seed_resumes(tiny, change, tmp_path):
    config = change(tiny, seed=2**63 - 1, train={"steps": 2}, optim={"warmup_steps": 1})
    run = train(config, tmp_path / "run", quiet=True).folder
    assert resume(run, change(config, train={"steps": 3}), quiet=True).step == 3
