"""Recipes: TOML files that hold a `RunConfig`, shipped with the package or written by the user.

Every value is checked against the type of its dataclass field; an invalid one raises a `UserError` that names the file, the key
and the closest valid name. A recipe needs only the keys that differ from the defaults.
"""

import contextlib
import dataclasses
import tomllib
import types
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from bardling.config import RunConfig
from bardling.errors import UserError, closest
from bardling.files.paths import expand_home
from bardling.files.reading import read_small_text

T = TypeVar("T")


def recipe_names() -> list[str]:
    """Names of the shipped recipes, sorted."""
    folder = resources.files("bardling") / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def recipe_text(name: str) -> str:
    return (resources.files("bardling") / "recipes" / f"{name}.toml").read_text(encoding="utf-8")


def recipe_keys(name_or_path: str) -> set[str]:
    """Dotted names of the settings in a valid recipe, such as "model.n_layer"."""
    text = recipe_text(name_or_path) if name_or_path in recipe_names() else read_small_text(Path(expand_home(name_or_path)))
    return set(flatten(tomllib.loads(text)))


def load_recipe(name_or_path: str, *, validate: bool = True) -> RunConfig:
    """Read a recipe by its shipped name or by the path of a TOML file.

    Args:
        validate: check that the sections are consistent with each other; False if command-line options may still change them,
            to be checked with `validated` afterwards.

    Raises:
        UserError: there is no such recipe, the file is not valid TOML, or a key or value is invalid.
    """
    if name_or_path in recipe_names():
        return parse_recipe(recipe_text(name_or_path), f"recipe {name_or_path}", validate=validate)
    path = Path(expand_home(name_or_path))
    if path.suffix == ".toml" or path.is_file():
        return parse_recipe(read_small_text(path), str(path), validate=validate)
    names = recipe_names()
    raise UserError(
        f"{name_or_path}: no shipped recipe has this name{closest(name_or_path, names)} and no such file exists; "
        f"choose from {', '.join(names)}"
    )


def parse_recipe(text: str, where: str, *, validate: bool = True) -> RunConfig:
    """Parse TOML `text`; `where` names it in errors, and `validate` is as in `load_recipe`."""
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also for integers with thousands of digits
        raise UserError(f"{where}: is not valid TOML: {error}") from None
    section = data.get("data")
    if isinstance(section, dict) and section.get("sources") and section.get("source"):  # also if it is the default
        raise UserError(f"{where}: data.source = {section['source']!r}: data.sources name the text too; leave out one of them")
    return config_from_dict(RunConfig if validate else _Unvalidated, data, where)


def validated(config: RunConfig) -> RunConfig:
    """The same configuration, after checking that its sections are consistent with each other.

    Raises:
        UserError: they are not.
    """
    return RunConfig(**{item.name: getattr(config, item.name) for item in dataclasses.fields(RunConfig)})


class _Unvalidated(RunConfig):
    """A configuration whose sections are each valid but may be inconsistent with each other."""

    def __post_init__(self) -> None:
        """Skip the checks between sections; see `validated`."""


def config_from_dict(cls: type[T], data: dict[str, Any], where: str, prefix: str = "") -> T:
    """Build the dataclass `cls` from nested plain values, as read from TOML or JSON.

    Raises:
        UserError: a key is unknown, or a value has the wrong type.
    """
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key not in hints:
            raise UserError(f"{where}: unknown key {prefix + key}{closest(key, list(hints))}")
        values[key] = _convert(hints[key], value, where, prefix + key)
    try:
        return cls(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _convert(hint: Any, value: Any, where: str, key: str) -> Any:
    """Convert `value` to the type `hint`: an integer to a float and a list to a tuple, but nothing else."""
    if isinstance(value, int) and value.bit_length() > 63:
        raise UserError(f"{where}: {key}: an integer of {value.bit_length()} bits is too large")
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, dict):
            return config_from_dict(hint, value, where, f"{key}.")
    elif get_origin(hint) is Literal:
        if value in get_args(hint):
            return value
        choices = [str(choice) for choice in get_args(hint)]
        raise UserError(f"{where}: {key} = {_format(value)}: choose one of {', '.join(choices)}{closest(str(value), choices)}")
    elif get_origin(hint) in (Union, types.UnionType):
        for option in get_args(hint):
            # Another member of the union may match; otherwise the error below names them all.
            with contextlib.suppress(UserError):
                return _convert(option, value, where, key)
    elif get_origin(hint) is tuple:
        parts = get_args(hint)
        if isinstance(value, list | tuple):
            parts = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
            if len(value) == len(parts):
                return tuple(_convert(part, item, where, key) for part, item in zip(parts, value, strict=True))
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    raise UserError(f"{where}: {key} = {_format(value)}: expected {_describe(hint)}")


def _format(value: Any) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer with thousands of digits, or deeply nested lists
        return f"a {type(value).__name__}"
    return text if len(text) <= 200 else text[:199] + "…"


def _describe(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string in quotes", type(None): "nothing"}
    if hint in names:
        return names[hint]
    if get_origin(hint) is Literal:
        return " or ".join(repr(choice) for choice in get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in get_args(hint) if option is not type(None))
    if get_origin(hint) is tuple:
        return f"a list of {len(get_args(hint))} values, each {_describe(get_args(hint)[0])}"
    return "a table of settings"


def config_to_dict(config: Any) -> dict[str, Any]:
    """Convert a config to nested plain values; unset settings (None) are omitted, because TOML cannot express them."""

    def plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in items if value is not None}

    return dataclasses.asdict(config, dict_factory=plain)


def config_to_toml(config: RunConfig) -> str:
    """Format the configuration as TOML: a recipe for the same run."""
    import tomli_w  # imported here, because most commands do not write TOML

    return tomli_w.dumps(config_to_dict(config))


def changed_settings(before: RunConfig, after: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Settings that differ, as sorted dotted name -> (value before, value after); None if unset."""
    old, new = flatten(config_to_dict(before)), flatten(config_to_dict(after))
    return {key: (old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)}


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
