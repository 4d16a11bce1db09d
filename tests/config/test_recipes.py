"""Recipes: reading, writing, and errors that name file, key and nearest name."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bardling.config import RunConfig
from bardling.config.recipes import config_from_dict, config_to_dict, config_to_toml, load_recipe, parse_recipe, recipe_names
from bardling.errors import UserError


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_loads_and_survives_a_round_trip(name):
    config = load_recipe(name)
    assert parse_recipe(config_to_toml(config), "again") == config


def test_unset_values_stay_unset_in_a_round_trip():
    config = RunConfig()
    assert config.train.micro_batch is None
    assert parse_recipe(config_to_toml(config), "again") == config


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[model]\nn_laye = 3", "unknown key model.n_laye (did you mean 'n_layer'?)"),
        ("[modle]\nn_layer = 3", "unknown key modle (did you mean 'model'?)"),
        ("[model]\nn_layer = 3.5", "model.n_layer = 3.5: expected a whole number"),
        ("[model]\nn_layer = true", "model.n_layer = True: expected a whole number"),
        ("[model]\nbias = 1", "model.bias = 1: expected true or false"),
        ("[optim]\nbetas = [0.9]", "optim.betas = [0.9]: expected a list of 2 values"),
        ("[optim]\nschedule = 'cosin'", "choose one of cosine, linear, constant, wsd (did you mean 'cosine'?)"),
        ("[train]\nmicro_batch = 'big'", "train.micro_batch = 'big': expected a whole number"),
        ("model = 3", "model = 3: expected a table of settings"),
        ("seed = ", "is not valid TOML"),
        ("[model]\nn_embd = 100", "model.n_embd = 100 is not divisible"),
    ],
)
def test_errors_are_one_line_that_names_the_file_and_the_remedy(text, says):
    with pytest.raises(UserError) as error:
        parse_recipe(text, "my.toml")
    assert str(error.value).startswith("my.toml: ")
    assert says in str(error.value)
    assert "\n" not in str(error.value).strip()


def test_integers_convert_to_floats():
    config = parse_recipe("[optim]\nlr = 1\n[train]\ngrad_clip = 2", "x")
    assert config.optim.lr == 1.0
    assert isinstance(config.train.grad_clip, float)


def test_a_missing_recipe_suggests_the_closest_name(tmp_path):
    with pytest.raises(UserError, match="did you mean 'quickstart'"):
        load_recipe("quikstart")
    with pytest.raises(UserError, match="no such file"):
        load_recipe(str(tmp_path / "missing.toml"))


def test_a_file_that_is_not_text_is_named(tmp_path):
    (tmp_path / "a.toml").write_bytes(b"\x80abc")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        load_recipe(str(tmp_path / "a.toml"))


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from([field.name for field in dataclasses.fields(RunConfig)]) | st.text(max_size=8)


@given(st.dictionaries(keys, plain, max_size=4))
def test_any_nested_values_give_a_config_or_a_user_error(values):
    try:
        config = config_from_dict(RunConfig, values, "x")
    except UserError:
        return
    assert config_from_dict(RunConfig, config_to_dict(config), "again") == config


@pytest.mark.parametrize(
    "text",
    [
        "seed = " + "9" * 5000,
        "seed = 0x" + "f" * 20_000,
        "[optim]\nlr = " + "9" * 400,
        "[data]\nsource = [0x" + "f" * 20_000 + "]",
    ],
)
def test_numbers_with_thousands_of_digits_are_user_errors(text):
    with pytest.raises(UserError) as caught:
        parse_recipe(text, "x.toml")
    assert len(str(caught.value)) < 400
