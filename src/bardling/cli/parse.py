"""Arguments through `tyro`: dataclasses in, help and checked values out, errors in one line.

`tyro` draws its errors as boxes of several lines. Here they become a `UserError`: unknown options are compared with the valid
ones, and the first sentence of any other complaint is kept.
"""

import contextlib
import dataclasses
import io
import re
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

import tyro

from bardling.errors import UserError, closest

T = TypeVar("T")


def parse(cls: type[T], argv: Sequence[str], *, prog: str, description: str, default: T | None = None) -> T:
    """Parse `argv` into the dataclass `cls`; `--help` prints and exits with status 0.

    Raises:
        UserError: an unknown option, or a value that does not fit.
    """
    complaint = io.StringIO()
    options: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(complaint):
            answer: tuple[T, list[str]] = tyro.cli(
                cls,
                args=list(argv),
                prog=prog,
                description=description,
                return_unknown_args=True,
                use_underscores=True,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.HelptextFromCommentsOff),
                **options,
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(_one_line(complaint.getvalue())) from None
    value, unknown = answer
    if unknown:
        names = option_names(cls)
        wrong = next((word for word in unknown if word.startswith("-")), unknown[0])
        option = wrong.split("=", 1)[0]
        if option.startswith("-"):
            raise UserError(
                f"unknown option {option}{closest(option.replace('-', '_'), names) or ' (see --help)'}".replace("'__", "'--")
            )
        raise UserError(f"unexpected argument {wrong!r} (see --help)")
    return value


def option_names(cls: Any, prefix: str = "") -> list[str]:
    """Options of a dataclass, dotted, with underscores also for the leading dashes (so that spellings compare evenly)."""
    names = []
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        hint = hints[item.name]
        if dataclasses.is_dataclass(hint):
            # `config` is the run's configuration, whose sections are spelled without it.
            names += option_names(hint, prefix if item.name == "config" else f"{prefix}{item.name}.")
        else:
            names.append(f"__{prefix}{item.name}")
    return names


def _one_line(box: str) -> str:
    """The message inside one of tyro's boxes: its text up to the first rule, on one line."""
    lines = []
    for line in box.splitlines():
        if line.startswith(("╭", "╰")):
            continue
        text = line.strip("│ ").strip()
        if set(text) == {"─"}:
            break
        lines.append(text)
    message = re.sub(r"\s+", " ", " ".join(lines)).strip().removeprefix("Error parsing ")
    message = re.sub(r"^config(\.\w+)?: ", "", message)  # the field that holds the configuration is no part of its keys
    return message.replace("invalid literal for int() with base 10:", "expected a whole number, not") or "invalid arguments"
