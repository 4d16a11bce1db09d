"""The shipped recipes: sizes as their names say, and runs that end."""

import dataclasses

import pytest

from bardling.configfile import load_recipe, recipe_names, recipe_text
from bardling.model.sizes import size


@pytest.mark.parametrize(
    ("recipe", "of"),
    [
        ("gpt2-124m", "gpt2"),
        ("gpt2-medium", "gpt2-medium"),
        ("gpt2-large", "gpt2-large"),
        ("gpt2-xl", "gpt2-xl"),
        ("gpt2-xs", "gpt2-xs"),
        ("gpt2-xxs", "gpt2-xxs"),
    ],
)
def test_gpt2_recipes_have_gpt2s_sizes_and_batches_of_whole_powers_of_two(recipe, of):
    config = load_recipe(recipe)
    assert dataclasses.replace(config.model, vocab_size=50257) == size(of)
    tokens = config.train.batch_size * config.model.block_size
    assert tokens in (2**16, 2**18, 2**19, 2**20)
    assert config.optim.final_lr == pytest.approx(config.optim.lr / 10)


def test_the_long_openwebtext_run_has_nanogpts_figures():
    config = load_recipe("gpt2-openwebtext")
    assert config.train.batch_size * config.model.block_size == 491_520
    assert (config.train.steps, config.optim.warmup_steps, config.optim.final_lr) == (600_000, 2000, 6e-5)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_says_what_it_is_and_divides(name):
    assert recipe_text(name).startswith("# ")
    config = load_recipe(name)
    assert config.train.batch_size % (config.train.micro_batch or 1) == 0
