"""`--model.depth`: derived values are shown, and what the user gives stays."""

from bardling.cli.dial import turned
from bardling.cli.train import parse_recipe_and_options
from bardling.configfile import recipe_keys


def dialled(*argv):
    recipe, options = parse_recipe_and_options("train", ["quickstart", *argv], "Train.")
    return turned(options.config, recipe, argv)


def test_the_command_line_dial_rules_over_the_recipe_and_is_said(capsys):
    config = dialled("--model.depth", "6")
    shown = capsys.readouterr().err
    assert (config.model.n_layer, config.model.n_embd, config.model.n_head) == (6, 384, 6)
    assert "model.n_embd = 384" in shown
    assert "train.steps" in shown
    assert config.model.depth == 0, "a saved configuration derives nothing again"
    assert config.model.family == "qwen3"


def test_given_values_stay():
    config = dialled("--model.depth", "6", "--model.n_embd", "256", "--model.n_head=4", "--train.steps", "77")
    assert (config.model.n_layer, config.model.n_embd, config.model.n_head, config.train.steps) == (6, 256, 4, 77)


def test_a_recipes_own_dial_leaves_the_recipes_values(tmp_path, capsys):
    path = tmp_path / "deep.toml"
    path.write_text("[model]\ndepth = 4\n[train]\nsteps = 50\nbatch_size = 8\n[optim]\nwarmup_steps = 5\n")
    assert recipe_keys(str(path)) == {"model.depth", "train.steps", "train.batch_size", "optim.warmup_steps"}
    recipe, options = parse_recipe_and_options("train", [str(path)], "Train.")
    config = turned(options.config, recipe, [])
    assert (config.model.n_layer, config.model.n_embd, config.train.steps, config.train.batch_size) == (4, 256, 50, 8)


def test_without_the_dial_nothing_is_said(capsys):
    assert dialled().model.n_layer == 4
    assert capsys.readouterr().err == ""
