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
import shutil
import types
import typing
from collections.abc import Collection, Iterator, Sequence
from typing import Annotated, Any, TypeVar

import tyro

from bardling.cli.paths import expand_paths, shadow_notes
from bardling.config import SourceConfig
from bardling.config.checks import INF
from bardling.errors import UserError, closest
from bardling.files.streams import tell

T = TypeVar("T")

_REGISTRY = tyro.constructors.ConstructorRegistry()

Model = tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
"""The argument that names a model."""

Texts = tyro.conf.UseAppendAction[tuple[str, ...]]
"""An option that is repeated for several texts: `--stop A --stop B`."""


_LEAST_WIDTH = 60  # columns of the help; a narrower terminal wraps its lines
_BOOLEANS = {
    **dict.fromkeys(("", "true", "1", "yes", "on"), "True"),
    **dict.fromkeys(("false", "0", "no", "off"), "False"),
    "none": "None",
}
_REPEATED = {
    "--data.source": "give it once; to train on several files, name their folder, a glob pattern in quotes, or --data.sources"
}


@_REGISTRY.primitive_rule
def _source_rule(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """How a source of a mixture is written as one word."""
    if info.type is not SourceConfig:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="WEIGHT:SOURCE",
        instance_from_str=lambda words: _source(words[0]),
        is_instance=lambda value: isinstance(value, SourceConfig),
        str_from_instance=lambda source: [source.source],
    )


def _source(word: str) -> SourceConfig:
    """The source of `WEIGHT:SOURCE`, `WEIGHT,WEIGHT:SOURCE` (for two stages) or `SOURCE`."""
    before, colon, source = word.partition(":")
    try:
        weights = tuple(map(float, before.split(",")))
    except ValueError:
        return SourceConfig(word)
    return SourceConfig(source, weights if len(weights) > 1 else weights[0]) if colon else SourceConfig(word)


def note(text: str) -> None:
    """Print a line about what the command does, on standard error."""
    tell(text)


def parse(cls: type[T], argv: Sequence[str], *, prog: str, description: str, default: T | None = None) -> T:
    """Parse `argv` into the dataclass `cls`; `--help` prints and exits with status 0, and a wrong option is a `UserError`."""
    argv = spelled_out(argv, cls)
    refuse_repeated(argv, _repeatable(cls))
    message = io.StringIO()
    options: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(message), _wide_enough():
            parsed: tuple[T, list[str]] = tyro.cli(
                cls,
                args=list(argv),
                prog=prog,
                description=description,
                return_unknown_args=True,
                use_underscores=True,
                registry=_REGISTRY,
                config=(tyro.conf.FlagConversionOff, tyro.conf.HelptextFromCommentsOff),
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


@contextlib.contextmanager
def _wide_enough() -> Iterator[None]:
    """Let `tyro` lay out its help for at least `_LEAST_WIDTH` columns: with very few it never ends."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(max(_LEAST_WIDTH, shutil.get_terminal_size()[0]))
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before


def spelled_out(argv: Sequence[str], cls: Any) -> list[str]:
    """`argv` as `tyro` reads it: `--fp8`, `--no-fp8` and `--fp8=false` become `--fp8 True` or `--fp8 False`, and a value that
    begins with a dash is joined to its option: `--prompt=-abc`."""
    hints, repeatable = dict(_options(cls)), _repeatable(cls)
    words, result = list(argv), list[str]()
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        key = name[2:].replace("-", "_") if name.startswith("--") else ""
        section, dot, last = key.rpartition(".")
        positive = section.removeprefix("no_") + dot + (last if section.startswith("no_") else last.removeprefix("no_"))
        if key not in hints and positive in hints and not equals and bool in _members(hints[positive]):
            result += [f"--{positive}", "False"]
        elif key in hints and bool in _members(hints[key]):
            if not equals and words and words[0].lower() in ("true", "false", "none"):
                value = words.pop(0)
            result += [f"--{key}", _BOOLEANS.get(value.lower(), value)]
        elif key in hints and not equals and words and (key in repeatable or not _is_tuple(hints[key])):
            result.append(f"{word}={words.pop(0)}" if _is_value(words[0], word, hints) else word)
        else:
            result.append(word)
    return result


def _is_tuple(hint: Any) -> bool:
    return any(typing.get_origin(member) is tuple for member in _members(hint))


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _is_value(word: str, option: str, known: Collection[str]) -> bool:
    """Whether a word that follows an option is its value although it begins with a dash."""
    if not word.startswith("--") or " " in word:
        return word.startswith("-") and word not in ("-", "-h")
    name = word[2:].partition("=")[0].replace("-", "_")
    if name not in known and name.removeprefix("no_") not in known and word not in ("--help", "--debug"):
        raise UserError(f"{option}: missing a value; if {word!r} is the value, write {option}={word}")
    return False


def refuse_repeated(argv: Sequence[str], repeatable: Collection[str]) -> None:
    """Raise a `UserError` if an option that is not `repeatable` occurs twice: only the last one would count."""
    seen: dict[str, str] = {}
    for index, word in enumerate(argv):
        if not word.startswith("--"):
            continue
        name, equals, value = word.partition("=")
        key = name.replace("-", "_")
        value = value if equals else " ".join(argv[index + 1 : index + 2])
        if key in seen and key[2:] not in repeatable:
            remedy = _REPEATED.get(name, "give it once; an option with several values takes all of them at once")
            raise UserError(f"{name} is given twice ({seen[key]!r} and {value!r}): {remedy}")
        seen[key] = value


def _repeatable(cls: Any) -> list[str]:
    """The names of the options of type `Texts`."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return [name for name, hint in hints.items() if hint == Texts]


def option_names(cls: Any) -> list[str]:
    """The dotted option names of a dataclass, with underscores in place of leading dashes (for `closest`)."""
    return [f"__{name}" for name, _ in _options(cls)]


def _options(cls: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted names of the options of a dataclass, and their types."""
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        hint = hints[item.name]
        if dataclasses.is_dataclass(hint):
            # `config` is the run's configuration; its sections are named without it: --train.steps.
            yield from _options(hint, prefix if item.name == "config" else f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", hint


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
