"""Command line parsing: options override the recipe, and errors are one line that suggests the closest name."""

import os
import subprocess
import sys

import pytest

from bardling.cli.export import ExportOptions
from bardling.cli.main import main
from bardling.cli.parse import parse
from bardling.cli.recipe import parse_recipe_command
from bardling.cli.train import TrainOptions
from bardling.errors import UserError


def options(*argv):
    return parse_recipe_command("train", TrainOptions, ["quickstart", *argv], "Train.")[2]


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
        (["--model.n_layer", "3.5"], "expected an integer, not '3.5'"),
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


def test_unknown_commands_and_missing_recipes_exit_with_status_2(capsys):
    for argv, says in (
        (["trian"], "did you mean 'train'"),
        (["train"], "no recipe given"),
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
    assert "Maximum context length (tokens)" in text
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


def test_an_option_can_fix_an_incomplete_recipe(tmp_path, bardling):
    recipe = tmp_path / "short.toml"
    recipe.write_text("[optim]\ndecay_steps = 12\n[model]\nn_layer = 1\nn_embd = 12\n")
    bardling("plan", recipe, "--optim.warmup_steps", "2")
    refused = "optim.warmup_steps = 100 leaves no step for the decay, which ends at step 12: lower it to at most 11"
    for command in ("train", "plan", "bench", "verify"):
        assert f"short.toml: {refused}" in bardling(command, recipe, check=2).stderr
        assert f"bardling: {refused}" in bardling(command, recipe, "--seed", "1", check=2).stderr
    assert "did you mean '--train.steps'" in bardling("plan", recipe, "--train.stps", "3", check=2).stderr


def test_every_command_parses_booleans_alike(tmp_path, bardling):
    recipe = tmp_path / "small.toml"
    recipe.write_text("[model]\nn_layer = 1\nn_embd = 12\nblock_size = 8\n[train]\nbatch_size = 2\n")
    bardling("plan", recipe, "--model.bias", "False")
    bardling("bench", recipe, "--model.bias", "False", "--steps", "1", "--warmup", "1", "--compile", "off")


# Interrupts PyTorch's import of NumPy, which would lose an exception raised in it.
INTERRUPTS = """
import os, signal, sys
seen = []
def hook(event, arguments):
    if event == "import" and arguments[0] == "numpy.lib._polynomial_impl" and not seen:
        seen.append(os.kill(os.getpid(), signal.{name}))
sys.addaudithook(hook)
"""


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_during_an_import_stops_the_command_after_it(tmp_path, bardling, corpus, name, status):
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTS.format(name=name))
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    options = ("--data.source", corpus, "--data.tokenizer", "char", "--out", tmp_path / "run", "--train.steps", "100000")
    done = bardling("train", "quickstart", *options, check=status, env={"PYTHONPATH": path})
    assert done.stderr.splitlines()[-1] == "bardling: interrupted" or "stopped at step" in done.stderr + done.stdout


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "missing MODEL and --out PATH (see --help)"),
        (["run"], "missing --out PATH (see --help)"),
        (["run", "--out"], "--out: missing a value"),
    ],
)
def test_missing_arguments_are_named(argv, says):
    with pytest.raises(UserError) as error:
        parse(ExportOptions, argv, prog="bardling export", description="Export.")
    assert str(error.value) == says
