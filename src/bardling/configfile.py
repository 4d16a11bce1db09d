"""Recipes: TOML files that hold a `RunConfig`, shipped with the package or written by the user.

Every value is checked against the dataclass field it goes to; what does not fit ends in a `UserError` that names the file, the
key and the nearest valid name. Only keys that differ from the defaults need to stand in a recipe.
"""

import dataclasses
import os
import stat
import tomllib
import types
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from bardling.config import RunConfig
from bardling.errors import UserError, closest

T = TypeVar("T")

LARGEST_RECIPE = 1 << 20  # bytes; a recipe is a page of text, so anything larger is some other file


def recipe_names() -> list[str]:
    """Names of the shipped recipes, sorted."""
    folder = resources.files("bardling") / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def recipe_text(name: str) -> str:
    """The TOML text of the shipped recipe `name`."""
    return (resources.files("bardling") / "recipes" / f"{name}.toml").read_text(encoding="utf-8")


def recipe_keys(name_or_path: str) -> set[str]:
    """The dotted names of the values that a recipe sets itself ("model.n_layer"); it must be one that loads."""
    text = recipe_text(name_or_path) if name_or_path in recipe_names() else read_text_file(Path(name_or_path))
    values = tomllib.loads(text)
    nested = {f"{section}.{key}" for section, table in values.items() if isinstance(table, dict) for key in table}
    return nested | {key for key, value in values.items() if not isinstance(value, dict)}


def load_recipe(name_or_path: str, *, whole: bool = True) -> RunConfig:
    """Read a recipe by its shipped name or by the path of a TOML file.

    Args:
        whole: its sections must fit each other; False: options may still see to that, and `checked` asks what came of it.

    Raises:
        UserError: there is no such recipe, the file is not valid TOML, or a key or value does not fit.
    """
    if name_or_path in recipe_names():
        return parse_recipe(recipe_text(name_or_path), f"recipe {name_or_path}", whole=whole)
    path = Path(name_or_path)
    if path.suffix == ".toml" or path.is_file():
        return parse_recipe(read_text_file(path), str(path), whole=whole)
    names = recipe_names()
    raise UserError(
        f"{name_or_path}: no shipped recipe has this name{closest(name_or_path, names)} and there is no such file; "
        f"shipped: {', '.join(names)}"
    )


def read_text_file(path: Path) -> str:
    """Read a small UTF-8 file, with errors that name it."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would wait for ever, and a device never end
            raise UserError(f"{path}: is not a file")
        if status.st_size > LARGEST_RECIPE:
            raise UserError(f"{path}: {status.st_size:,} bytes is too large for a configuration file")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({os.strerror(error.errno or 0)})") from None


def parse_recipe(text: str, where: str, *, whole: bool = True) -> RunConfig:
    """Make a `RunConfig` of TOML `text`; `where` names the text in errors, and `whole` is as in `load_recipe`."""
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also for numbers of thousands of digits
        raise UserError(f"{where}: is not valid TOML: {error}") from None
    return config_from_dict(RunConfig if whole else _Loose, data, where)


def checked(config: RunConfig) -> RunConfig:
    """The same, of which the sections fit each other.

    Raises:
        UserError: they do not.
    """
    return RunConfig(**{item.name: getattr(config, item.name) for item in dataclasses.fields(RunConfig)})


class _Loose(RunConfig):
    """A configuration whose sections are sound each, but need not fit each other."""

    def __post_init__(self) -> None:
        """Leave that to `checked`."""


def config_from_dict(cls: type[T], data: dict[str, Any], where: str, prefix: str = "") -> T:
    """Make the dataclass `cls` of nested plain values, as TOML and JSON give them.

    Raises:
        UserError: an unknown key, or a value of another type than its field's.
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
    """Return `value` as `hint` wants it: an integer may stand for a float, a list for a tuple, nothing else is bent."""
    if isinstance(value, int) and value.bit_length() > 63:
        raise UserError(f"{where}: {key}: a whole number of {value.bit_length()} bits is too large")
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, dict):
            return config_from_dict(hint, value, where, f"{key}.")
    elif get_origin(hint) is Literal:
        if value in get_args(hint):
            return value
        choices = [str(choice) for choice in get_args(hint)]
        raise UserError(f"{where}: {key} = {_shown(value)}: choose one of {', '.join(choices)}{closest(str(value), choices)}")
    elif get_origin(hint) in (Union, types.UnionType):
        for option in get_args(hint):
            if option is type(None):
                if value is None:
                    return None
                continue
            try:
                return _convert(option, value, where, key)
            except UserError:
                continue  # another member of the union may fit; if none does, the error below names them all
    elif get_origin(hint) is tuple:
        parts = get_args(hint)
        if isinstance(value, list | tuple):
            if parts[-1] is Ellipsis:
                return tuple(_convert(parts[0], part, where, key) for part in value)
            if len(value) == len(parts):
                return tuple(_convert(part, item, where, key) for part, item in zip(parts, value, strict=True))
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    raise UserError(f"{where}: {key} = {_shown(value)}: expected {_describe(hint)}")


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, or lists in lists in lists
        return f"a {type(value).__name__}"
    return text if len(text) <= 200 else text[:199] + "…"


def _describe(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text in quotes", type(None): "nothing"}
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
    """Nested plain values of a config; settings that are unset (None) are left out, since TOML has no word for them."""
    values: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            values[item.name] = config_to_dict(value)
        elif value is not None:
            values[item.name] = list(value) if isinstance(value, tuple) else value
    return values


def config_to_toml(config: RunConfig) -> str:
    """The whole configuration as TOML: a recipe that gives the same run."""
    import tomli_w  # here, because only a run that starts writes TOML

    return tomli_w.dumps(config_to_dict(config))
