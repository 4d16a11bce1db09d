"""Options in the forms that other programs accept: flags with and without a value, negated flags, values that begin with a
dash; and settings whose size alone would fill the memory."""

import time

import pytest

from bardling.cli.eval import EvalOptions
from bardling.cli.info import InfoOptions
from bardling.cli.main import main
from bardling.cli.parse import parse
from bardling.cli.plan import PlanOptions
from bardling.cli.recipe import given_settings, parse_recipe_command
from bardling.cli.report import ReportOptions
from bardling.cli.sample import SampleOptions
from bardling.cli.train import TrainOptions
from bardling.errors import UserError


def train(*argv):
    return parse_recipe_command("train", TrainOptions, ["quickstart", *argv], "Train.")[2].config


def recipe_free(cls, *argv):
    return parse(cls, argv, prog="x", description="x")


TRUE = ["--X", "--X true", "--X True", "--X=true", "--X=True", "--X=TRUE", "--X=1", "--X=yes", "--X=on"]
FALSE = ["--no-X", "--no_X", "--X false", "--X False", "--X=false", "--X=False", "--X=0", "--X=no", "--X=off"]


@pytest.mark.parametrize(("form", "value"), [*((form, True) for form in TRUE), *((form, False) for form in FALSE)])
def test_every_form_of_a_flag(form, value):
    options = form.replace("X", "deterministic").split()
    assert train(*options, "--seed", "3").deterministic is value
    assert train("--seed", "3", *options).seed == 3
    assert recipe_free(SampleOptions, *form.replace("X", "special").split(), "run").special is value
    assert recipe_free(SampleOptions, "run", *form.replace("X", "best").split()).best is value


@pytest.mark.parametrize(
    ("argv", "section", "name", "value"),
    [
        ("--model.bias=false", "model", "bias", False),
        ("--model.no-bias", "model", "bias", False),
        ("--no-model.bias", "model", "bias", False),
        ("--model.no_bias", "model", "bias", False),
        ("--model.tied", "model", "tied", True),
        ("--model.no-tied", "model", "tied", False),
        ("--model.tied None", "model", "tied", None),
        ("--model.zero-init", "model", "zero_init", True),
        ("--model.zero-init=off", "model", "zero_init", False),
        ("--checkpoint.no-save-best", "checkpoint", "save_best", False),
        ("--optim.cautious_decay", "optim", "cautious_decay", True),
        ("--monitor.tensorboard", "monitor", "tensorboard", True),
    ],
)
def test_flags_in_sections(argv, section, name, value):
    assert getattr(getattr(train(*argv.split()), section), name) is value


def test_fp8():
    assert train("--fp8", "--precision", "bfloat16").fp8 is True
    assert train("--no-fp8").fp8 is False


@pytest.mark.parametrize(("cls", "name", "rest"), [(InfoOptions, "verify", "run"), (EvalOptions, "best", "run"),
                                                   (PlanOptions, "sweep", ""), (ReportOptions, "compressors", "")])  # fmt: skip
def test_the_flags_of_all_commands(cls, name, rest):
    assert getattr(recipe_free(cls, *rest.split(), f"--{name}"), name) is True
    assert getattr(recipe_free(cls, *rest.split(), f"--no-{name}"), name) is False
    assert getattr(recipe_free(cls, *rest.split()), name) is False


def test_a_flag_takes_no_argument_that_is_not_a_truth_value():
    assert recipe_free(SampleOptions, "--best", "runs/first").model == "runs/first"


def test_negated_flags_count_as_given_settings():
    _, rest, options = parse_recipe_command("train", TrainOptions, ["quickstart", "--model.depth", "4", "--no-fp8"], "Train.")
    assert {"model.depth", "fp8"} <= given_settings(options.config, "quickstart", rest)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--fp8=maybe", "maybe"),
        ("--fp8 --no-fp8", "--fp8 is given twice ('True' and 'False')"),
        ("--fp8 --fp8", "--fp8 is given twice"),
        ("--no-fp8=true", "unknown option --no-fp8"),
        ("--no-seed", "unknown option --no-seed"),
        ("--seed --sed", "--seed: missing a value; if '--sed' is the value, write --seed=--sed"),
    ],
)
def test_contradictions_and_mistakes_are_one_line(argv, says):
    with pytest.raises(UserError) as error:
        train(*argv.split())
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["-abc", "-", "-1", "- a list", "--- title", "-- two words", "-h2", "--seed is an option"])
def test_a_prompt_that_begins_with_a_dash(text):
    options = recipe_free(SampleOptions, "run", "--prompt", text, "--seed", "3")
    assert (options.prompt, options.seed) == (text, 3)
    assert recipe_free(SampleOptions, "run", f"--prompt={text}").prompt == text


def test_a_prompt_that_looks_like_an_option_is_refused_with_the_form_that_works():
    with pytest.raises(UserError) as error:
        recipe_free(SampleOptions, "run", "--prompt", "--abc")
    assert str(error.value) == "--prompt: missing a value; if '--abc' is the value, write --prompt=--abc"
    assert recipe_free(SampleOptions, "run", "--prompt=--abc").prompt == "--abc"
    with pytest.raises(UserError, match="--prompt: missing a value"):
        recipe_free(SampleOptions, "run", "--prompt", "--seed", "3")


def test_numbers_and_lists_keep_their_form():
    assert train("--optim.betas", "0.8", "0.9").optim.betas == (0.8, 0.9)
    with pytest.raises(UserError, match=r"train\.steps"):
        train("--train.steps", "-5")


@pytest.mark.parametrize(
    ("option", "value", "limit"),
    [
        ("model.n_layer", "10000000", "at most 1000"),
        ("model.n_layer", "1001", "at most 1000"),
        ("model.n_layer", "1" + "0" * 17, "at most 1000"),
        ("train.batch_size", "10000000000", "at most 10000000"),
        ("model.depth", "100000000", "between 1 and 200"),
    ],
)
@pytest.mark.parametrize("form", ["option", "recipe"])
def test_a_size_that_would_fill_the_memory_is_refused_at_once(option, value, limit, form, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    section, name = option.split(".")
    (tmp_path / "huge.toml").write_text(f"[{section}]\n{name} = {value}\n" if form == "recipe" else "")
    start = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        main(["plan", "huge.toml", "--gpu", "H100-SXM", *([f"--{option}", value] if form == "option" else [])])
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert f"{option} = {value}: must be {limit}" in printed
    assert printed.count("\n") == 1
    assert time.monotonic() - start < 5
