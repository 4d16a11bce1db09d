"""`--model.depth`: derived values are printed, and explicit ones are kept."""

from bardling.cli.recipe import parse_recipe_command, with_depth
from bardling.cli.train import TrainOptions
from bardling.config.recipes import recipe_keys


def derived(*argv):
    recipe, _, options = parse_recipe_command("train", TrainOptions, ["quickstart", *argv], "Train.")
    return with_depth(options.config, recipe, argv)


def test_a_depth_on_the_command_line_overrides_the_recipe_and_is_printed(capsys):
    config = derived("--model.depth", "6")
    shown = capsys.readouterr().err
    assert (config.model.n_layer, config.model.n_embd, config.model.n_head) == (6, 384, 6)
    assert "model.n_embd = 384" in shown
    assert "train.steps" in shown
    assert config.model.depth == 0, "a saved configuration derives nothing again"
    assert config.model.family == "qwen3"


def test_explicit_values_are_kept():
    config = derived("--model.depth", "6", "--model.n_embd", "256", "--model.n_head=4", "--train.steps", "77")
    assert (config.model.n_layer, config.model.n_embd, config.model.n_head, config.train.steps) == (6, 256, 4, 77)


def test_a_depth_in_a_recipe_keeps_the_other_values_of_the_recipe(tmp_path, capsys):
    path = tmp_path / "deep.toml"
    path.write_text("[model]\ndepth = 4\n[train]\nsteps = 50\nbatch_size = 8\n[optim]\nwarmup_steps = 5\n")
    assert recipe_keys(str(path)) == {"model.depth", "train.steps", "train.batch_size", "optim.warmup_steps"}
    recipe, _, options = parse_recipe_command("train", TrainOptions, [str(path)], "Train.")
    config = with_depth(options.config, recipe, [])
    assert (config.model.n_layer, config.model.n_embd, config.train.steps, config.train.batch_size) == (4, 256, 50, 8)


def test_without_a_depth_nothing_is_printed(capsys):
    assert derived().model.n_layer == 4
    assert capsys.readouterr().err == ""
