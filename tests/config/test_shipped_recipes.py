"""The shipped recipes: model sizes and batch sizes."""

import dataclasses

import pytest

from bardling.config.recipes import load_recipe, recipe_names, recipe_text
from bardling.planning.presets import size


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
def test_gpt2_recipes_have_gpt2s_sizes_and_power_of_two_batches(recipe, of):
    config = load_recipe(recipe)
    assert dataclasses.replace(config.model, vocab_size=50257) == size(of)
    tokens = config.train.batch_size * config.model.block_size
    assert tokens in (2**16, 2**18, 2**19, 2**20)
    assert config.optim.final_lr == pytest.approx(config.optim.lr / 10)


def test_the_openwebtext_recipe_has_nanogpts_settings():
    config = load_recipe("gpt2-openwebtext")
    assert config.train.batch_size * config.model.block_size == 491_520
    assert (config.train.steps, config.optim.warmup_steps, config.optim.final_lr) == (600_000, 2000, 6e-5)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_has_a_description_and_a_valid_micro_batch(name):
    assert recipe_text(name).startswith("# ")
    config = load_recipe(name)
    micro_batch = config.train.micro_batch
    assert micro_batch == "auto" or config.train.batch_size % (micro_batch or 1) == 0
