"""Parsing of `bardling COMMAND RECIPE [options]`: the recipe's values are the defaults, and options override them."""

from collections.abc import Sequence
from typing import Annotated, TypeVar

import tyro

from bardling.cli.parse import note, parse, spelled_out
from bardling.config import RunConfig
from bardling.config.recipes import load_recipe, recipe_keys, recipe_names, validated
from bardling.errors import UserError

T = TypeVar("T")
# The field of a command's options that holds the run's configuration; its options have no prefix: --train.steps.
Config = Annotated[RunConfig, tyro.conf.arg(name="")]


def split_first(argv: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The leading positional argument ('' if there is none) and the rest."""
    return (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("", argv)


def wants_help(argv: Sequence[str]) -> bool:
    return "-h" in argv or "--help" in argv


def parse_recipe_command(command: str, cls: type[T], argv: Sequence[str], description: str) -> tuple[str, Sequence[str], T]:
    """Parse `RECIPE [options]` into `cls`, a dataclass with a field `config: RunConfig`.

    Returns the recipe, the arguments after it, and the options.
    """
    recipe, rest = split_first(spelled_out(argv, cls))
    names = ", ".join(recipe_names())
    if not recipe and not wants_help(rest):
        raise UserError(f"{command}: no recipe given; name a TOML file or one of {names}")
    config = load_recipe(recipe, validate=not rest) if recipe else RunConfig()
    options = parse(
        cls,
        rest,
        prog=f"bardling {command} {recipe or 'RECIPE'}",
        description=f"{description} RECIPE is a TOML file or one of {names}; options override its values.",
        default=cls(config=config),  # type: ignore[call-arg]
    )
    return recipe, rest, options


def given_settings(config: RunConfig, recipe: str, argv: Sequence[str]) -> set[str]:
    """Dotted names of the settings that keep their values when others follow from `model.depth`.

    A depth on the command line overrides the recipe's values; one in the recipe, only the defaults. A tokenizer counts as
    given, also for `model.init`, if it is in a recipe of the user's own.
    """
    given = {word[2:].split("=", 1)[0].replace("-", "_") for word in argv if word.startswith("--")}
    if recipe and recipe not in recipe_names():
        given |= {"data.tokenizer"} & recipe_keys(recipe)
    return given if "model.depth" in given or not config.model.depth else given | recipe_keys(recipe)


def with_depth(config: RunConfig, recipe: str, argv: Sequence[str]) -> RunConfig:
    """`config`, validated, with the values that follow from its `model.depth`, which are printed."""
    config = validated(config)
    if not config.model.depth:
        return config
    from bardling.planning.depth import apply_depth  # here, because few runs use it

    def show(key: str, value: object, why: str) -> None:
        note(f"{key} = {value:g}  ({why})")

    return apply_depth(config, given_settings(config, recipe, argv), record=show)
