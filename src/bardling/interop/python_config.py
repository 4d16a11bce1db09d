"""Reads settings from nanoGPT-style `.py` files and `--key=value` flags by parsing them; nothing is executed.

An evaluator walks the syntax tree. It supports assignments, literals, arithmetic on literals and earlier names, `int`, `float`,
`str` and `time.time()`, and refuses everything else with file, line number and line. Names that begin with an underscore are
intermediate values. So that no file is slow or needs much memory, there are limits: 256-bit integers, strings of 10,000
characters, expressions of 100 levels, files of 256 KiB.
"""

import ast
import contextlib
import math
import operator
import time
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from bardling.errors import UserError, closest
from bardling.files.paths import expand_home
from bardling.files.reading import read_small_text

Kind = type | types.UnionType
"""The type of a setting: `int`, `str`, ..., or a union such as `int | None`."""

_MAX_FILE_BYTES = 256 * 1024
_MAX_STRING_CHARS = 10_000
_MAX_DEPTH = 100  # levels of nesting
_MAX_INTEGER_BITS = 256
_MAX_SHOWN_CHARS = 120  # of a line in an error

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_}
_CONVERSIONS: dict[str, Callable[[Any], Any]] = {"int": int, "float": float, "str": str}
_TYPE_NAMES = {int: "an integer", float: "a number", bool: "True or False", str: "a quoted string", types.NoneType: "None"}

_ALLOWED_SYNTAX = (
    "only assignments of literals, arithmetic on them and on earlier names, str(), int(), float() and time.time() are allowed"
)


def read_py_config(path: Path, allowed: Mapping[str, Kind], known: Mapping[str, object] | None = None) -> dict[str, object]:
    """Read the settings that the nanoGPT-style configuration at `path` (UTF-8) assigns. `allowed` has the type of every key
    that may be set (integers are accepted for floats, and integral floats for integers), `known` further values that the file
    may refer to (defaults, and what earlier files set).
    """
    text = read_small_text(path, limit=_MAX_FILE_BYTES)
    reader = _Reader(allowed, dict(known or {}))
    try:
        reader.run(text)
    except ValueError as error:
        shown = "".join(text.split("\n")[reader.line - 1 : reader.line])
        raise UserError(f"{path}:{reader.line}: {_printable(shown.strip())}: {error}") from None
    return reader.settings


def parse_flat_flags(args: Sequence[str], allowed: Mapping[str, Kind]) -> dict[str, object]:
    """Read nanoGPT's `--key=value` flags; later flags override earlier ones.

    The value of a key of type `str` is taken literally (`--start=123` is the string 123; quotes around a complete Python string
    are removed). Other values are Python literals or arithmetic on them; `true` and `false` are accepted too.
    """
    settings: dict[str, object] = {}
    for arg in args:
        key, equals, text = arg.removeprefix("--").partition("=")
        if not arg.startswith("--") or not equals:
            name = arg.lstrip("-")
            remedy = f"write --{name}=VALUE" if name in allowed else "flags have the form --key=value"
            raise UserError(f"{_printable(arg)}: {remedy}{closest(name, list(allowed)) if name not in allowed else ''}")
        key = key if key in allowed else key.replace("-", "_")
        if key not in allowed:
            raise UserError(f"--{_printable(key)}: unknown key{closest(key, list(allowed))}")
        try:
            settings[key] = _fit(key, _flag_value(text, allowed[key]), allowed[key])
        except ValueError as error:
            raise UserError(f"--{key}={_printable(text)}: {error}") from None
    return settings


def read_nanogpt_arguments(
    args: Sequence[str], allowed: Mapping[str, Kind], defaults: Mapping[str, object] | None = None
) -> dict[str, object]:
    """Read a nanoGPT command line, such as `["config/a.py", "--batch_size=8"]`; later arguments override earlier ones, and
    files may refer to `defaults`.
    """
    settings: dict[str, object] = {}
    for arg in args:
        if arg.startswith("-"):
            settings |= parse_flat_flags([arg], allowed)
        else:
            settings |= read_py_config(Path(expand_home(arg)), allowed, {**(defaults or {}), **settings})
    return settings


def _printable(text: str) -> str:
    """`text` as one short line without control characters."""
    clean = "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)
    return clean if len(clean) <= _MAX_SHOWN_CHARS else clean[: _MAX_SHOWN_CHARS - 1] + "…"


def _flag_value(text: str, kind: Kind) -> object:
    if str in (get_args(kind) or (kind,)):
        with contextlib.suppress(SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
            if text[:1] in ("'", '"') and isinstance(quoted := ast.literal_eval(text), str):
                return quoted
        return text
    if text in ("true", "false"):
        return text == "true"
    reader = _Reader({}, {})
    return reader.value(reader.parse(text.strip(), "eval").body)


def _fit(key: str, value: object, kind: Kind) -> object:
    """Convert `value` to `kind`, or raise a `ValueError` that names the expected type."""
    kinds = get_args(kind) or (kind,)
    if type(value) in kinds:
        return value
    if float in kinds and type(value) is int:
        return float(value)
    if int in kinds and type(value) is float and value.is_integer() and abs(value) < 2**53:
        return int(value)
    shown = "a tuple" if isinstance(value, tuple) else _printable(repr(value))
    raise ValueError(f"{key} is {shown}, but must be {' or '.join(_TYPE_NAMES[one] for one in kinds)}")


class _Reader:
    """Evaluates a syntax tree; whatever it refuses raises a `ValueError`.

    `settings` holds what has been assigned so far, `line` the number (from 1) of the line being evaluated.
    """

    def __init__(self, allowed: Mapping[str, Kind], known: dict[str, object]) -> None:
        self.allowed = allowed
        self.known = known
        self.settings: dict[str, object] = {}
        self.line = 1

    def parse(self, text: str, mode: str) -> Any:
        try:
            with warnings.catch_warnings(action="ignore"):  # of invalid escapes such as "\d", which are harmless here
                return ast.parse(text, mode=mode)
        except (SyntaxError, ValueError) as error:
            self.line = getattr(error, "lineno", None) or 1
            raise ValueError(f"is not valid Python ({getattr(error, 'msg', error)})") from None
        except (RecursionError, MemoryError):
            raise ValueError("is nested too deeply") from None

    def run(self, text: str) -> None:
        for number, statement in enumerate(self.parse(text, "exec").body):
            self.line = statement.lineno
            self.statement(statement, first=number == 0)

    def statement(self, node: ast.stmt, first: bool) -> None:
        match node:
            case ast.Expr(value=ast.Constant(value=str())) if first:
                return  # the module's docstring
            case ast.Import(names=[ast.alias(name="time", asname=None)]) | ast.Pass():
                return
            case ast.Assign(targets=targets, value=expression):
                value = self.value(expression)
                for target in targets:
                    self.assign(target, value)
            case ast.AnnAssign(target=target, value=ast.expr() as expression):
                self.assign(target, self.value(expression))
            case ast.AugAssign(target=ast.Name(id=name) as target, op=op, value=expression):
                current = ast.copy_location(ast.Name(name, ast.Load()), target)
                self.assign(target, self.value(ast.copy_location(ast.BinOp(current, op, expression), node)))
            case _:
                raise ValueError(f"is not a setting; {_ALLOWED_SYNTAX}")

    def assign(self, target: ast.expr, value: object) -> None:
        self.line = target.lineno
        match target:
            case ast.Name(id=name) if name.startswith("_"):
                self.known[name] = value
            case ast.Name(id=name) if name in self.allowed:
                self.known[name] = self.settings[name] = _fit(name, value, self.allowed[name])
            case ast.Name(id=name):
                raise ValueError(f"unknown key {name}{closest(name, list(self.allowed))}")
            case ast.Tuple(elts=parts) | ast.List(elts=parts) if isinstance(value, tuple) and len(parts) == len(value):
                for part, item in zip(parts, value, strict=True):
                    self.assign(part, item)
            case _:
                raise ValueError(f"assigns to something that is not a name; {_ALLOWED_SYNTAX}")

    def value(self, node: ast.expr, depth: int = 0) -> Any:
        """Evaluate an expression; `depth` is the number of levels above it."""
        self.line = node.lineno
        if depth > _MAX_DEPTH:
            raise ValueError(f"an expression has more than {_MAX_DEPTH} levels")
        match node:
            case ast.Constant(value=None | bool() | int() | float() | str() as value):
                return _bounded(value)
            case ast.Name(id=name) if name in self.known:
                return self.known[name]
            case ast.Name(id=name):
                raise ValueError(f"{name} has no value here{closest(name, list(self.known))}")
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                return tuple(self.value(part, depth + 1) for part in parts)
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
                inner = self.value(operand, depth + 1)
                if not isinstance(inner, int | float):
                    raise ValueError("the sign of something that is not a number")
                return _UNARY[type(op)](inner)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                return _arithmetic(type(op), self.value(left, depth + 1), self.value(right, depth + 1))
            case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in _CONVERSIONS:
                inner = self.value(argument, depth + 1)
                if isinstance(inner, tuple):  # its text could be far longer than the file
                    raise ValueError(f"{name}() of something that is neither a number nor a string")
                return _computed(_CONVERSIONS[name], inner)
            case ast.Call(func=ast.Attribute(value=ast.Name(id="time"), attr="time"), args=[], keywords=[]):
                return time.time()
            case _:
                raise ValueError(f"contains something that is not a literal; {_ALLOWED_SYNTAX}")


def _arithmetic(op: type[ast.operator], left: Any, right: Any) -> Any:
    """Compute `left op right`, refusing what would be slow or large."""
    numbers = isinstance(left, int | float) and isinstance(right, int | float)
    if op is ast.Pow and isinstance(left, int) and isinstance(right, int):
        # The result has about bits(left) * right bits; bounding the exponent too keeps powers of 0 and 1 fast.
        if abs(right) > _MAX_INTEGER_BITS or left.bit_length() * abs(right) > 2 * _MAX_INTEGER_BITS:
            raise ValueError("the power is too large")
    elif op is ast.Mult and not numbers:
        text, times = (left, right) if isinstance(left, str) else (right, left)
        if not isinstance(text, str) or not isinstance(times, int) or len(text) * times > _MAX_STRING_CHARS:
            raise ValueError("only numbers can be multiplied, and short strings repeated")
    elif not numbers and not (op is ast.Add and isinstance(left, str) and isinstance(right, str)):
        raise ValueError("arithmetic on something that is not a number (use str() to append a number to a string)")
    return _computed(_BINARY[op], left, right)


def _computed(compute: Callable[..., Any], *values: Any) -> Any:
    try:
        result = compute(*values)
    except (ArithmeticError, TypeError, ValueError) as error:
        raise ValueError(f"cannot be computed ({error})") from None
    return _bounded(result)


def _bounded(value: Any) -> Any:
    if isinstance(value, str) and len(value) > _MAX_STRING_CHARS:
        raise ValueError(f"a string of more than {_MAX_STRING_CHARS:,} characters")
    if isinstance(value, int) and value.bit_length() > _MAX_INTEGER_BITS:
        raise ValueError("the number is too large")
    if isinstance(value, complex) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError("the result is not a finite number")
    return value
