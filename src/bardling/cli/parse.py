"""Command line parsing with `tyro`: options are dataclasses, and errors are one line.

`tyro` prints errors as boxes of several lines. Here they become a `UserError`: for an unknown option it suggests the closest
valid one; of any other error it keeps the first section.
"""

import contextlib
import dataclasses
import io
import itertools
import os
import re
import sys
import typing
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

import tyro

from bardling.cli.paths import expand_paths, shadow_notes
from bardling.config.checks import INF
from bardling.errors import UserError, closest

T = TypeVar("T")

Model = tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
"""The argument that names a model."""


_REPEATED = {"--data.source": "give it once; to train on several files, name their folder or a glob pattern in quotes"}


def note(text: str) -> None:
    """Print a line about what the command does, on standard error."""
    print(f"bardling: {text}", file=sys.stderr)


def parse(cls: type[T], argv: Sequence[str], *, prog: str, description: str, default: T | None = None) -> T:
    """Parse `argv` into the dataclass `cls`; `--help` prints and exits with status 0, and a wrong option is a `UserError`."""
    refuse_repeated(argv)
    message = io.StringIO()
    options: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(message):
            parsed: tuple[T, list[str]] = tyro.cli(
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
        raise UserError(_one_line(message.getvalue())) from None
    value, unknown = parsed
    for wrong in unknown:
        if wrong.startswith("-"):
            option = wrong.split("=", 1)[0]
            advice = closest(option.replace("-", "_"), option_names(cls)).replace("'__", "'--")
            raise UserError(f"unknown option {option}{advice or ' (see --help)'}")
    if unknown:
        raise UserError(f"unexpected argument {unknown[0]!r} (see --help)")
    value = expand_paths(value)
    if os.environ.get("RANK", "0") == "0":
        for text in shadow_notes(value):
            note(text)
    return value


def require_options(minimum: int, options: object, *names: str) -> None:
    """Raise a `UserError` unless each named option is unset, or at least `minimum` and finite."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not minimum <= value < INF:
            raise UserError(f"--{name} {value}: must be at least {minimum}{' and finite' if isinstance(value, float) else ''}")


def refuse_repeated(argv: Sequence[str]) -> None:
    """Raise a `UserError` if an option occurs twice: only the last one would count."""
    seen: dict[str, str] = {}
    for index, word in enumerate(argv):
        if not word.startswith("--"):
            continue
        name, equals, value = word.partition("=")
        key = name.replace("-", "_")
        value = value if equals else " ".join(argv[index + 1 : index + 2])
        if key in seen:
            remedy = _REPEATED.get(name, "give it once; an option with several values takes all of them at once")
            raise UserError(f"{name} is given twice ({seen[key]!r} and {value!r}): {remedy}")
        seen[key] = value


def option_names(cls: Any, prefix: str = "") -> list[str]:
    """The dotted option names of a dataclass, with underscores in place of leading dashes (for `closest`)."""
    names = []
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        hint = hints[item.name]
        if dataclasses.is_dataclass(hint):
            # `config` is the run's configuration; its sections are named without it: --train.steps.
            names += option_names(hint, prefix if item.name == "config" else f"{prefix}{item.name}.")
        else:
            names.append(f"__{prefix}{item.name}")
    return names


def _one_line(box: str) -> str:
    """The message in one of tyro's boxes, which has borders of spaces and dashes in some terminals: its text up to the first
    horizontal rule, on one line."""
    lines = [line[2:].rstrip(" │") for line in box.splitlines()[1:]]  # without the title and the left border
    lines = list(itertools.dropwhile(_is_rule, lines))
    text = list(itertools.takewhile(lambda line: not _is_rule(line), lines))
    if text and text[0].startswith("Missing from"):
        names = [line.strip() for line in text[1:] if re.match(r" {4}\S", line)]  # the help below is indented further
        return f"missing {' and '.join(names)} (see --help)"
    message = " ".join(" ".join(text).split()).removeprefix("Error parsing ")
    message = re.sub(r"^config(\.\w+)?: ", "", message)  # keys are named without the field that holds the configuration
    message = re.sub(r"^Missing value for argument '(.+?)'.*", r"\1: missing a value", message)
    return message.replace("invalid literal for int() with base 10:", "expected an integer, not") or "invalid arguments"


def _is_rule(line: str) -> bool:
    return not line.strip(" ─-╯╰")
