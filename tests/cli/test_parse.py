"""Command line errors: one line, with the nearest name."""

import subprocess
import sys

import pytest

from bardling.cli.main import main
from bardling.cli.parse import parse
from bardling.cli.train import TrainOptions, parse_recipe_and_options
from bardling.errors import UserError


def options(*argv):
    return parse_recipe_and_options("train", ["quickstart", *argv], "Train.")[1]


def test_dotted_options_override_the_recipe_and_leave_the_rest():
    base = options().config
    changed = options(
        "--model.n_layer", "2", "--optim.betas", "0.8", "0.9", "--model.bias", "False", "--train.micro-batch=8"
    ).config
    assert (changed.model.n_layer, changed.optim.betas, changed.model.bias, changed.train.micro_batch) == (
        2,
        (0.8, 0.9),
        False,
        8,
    )
    assert changed.model.n_embd == base.model.n_embd
    assert changed.data == base.data


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--model.n_laye", "3"], "--model.n_laye (did you mean '--model.n_layer'?)"),
        (["--n_layer", "3"], "unknown option --n_layer"),
        (["--model.n_layer", "3.5"], "expected a whole number, not '3.5'"),
        (["--compile", "maybe"], "'auto', 'on', 'off'"),
        (["--model.n_embd", "102"], "not divisible"),
        (["stray"], "unexpected argument 'stray'"),
        (["--seed"], "--seed"),
    ],
)
def test_wrong_options_are_one_line(argv, says):
    with pytest.raises(UserError) as error:
        options(*argv)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_verbs_and_missing_recipes_exit_with_two(capsys):
    for argv, says in (
        (["trian"], "did you mean 'train'"),
        (["train"], "name a recipe first"),
        (["train", "nosuch"], "no shipped recipe"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2
        printed = capsys.readouterr().err
        assert says in printed
        assert printed.count("\n") == 1


def test_help_shows_units_defaults_and_the_recipes_values(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "quickstart", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "Longest context (tokens)" in text
    assert "bpe:2048" in text


def test_help_does_not_import_torch():
    for argv in (["--help"], ["train", "--help"]):
        code = (
            "import sys\n"
            "from bardling.cli.main import main\n"
            f"try: main({argv})\n"
            "except SystemExit: pass\n"
            "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_parse_takes_plain_defaults():
    assert parse(TrainOptions, ["--seed", "5"], prog="x", description="x").config.seed == 5
