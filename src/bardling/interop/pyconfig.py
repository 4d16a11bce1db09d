"""Settings from nanoGPT-style `.py` files and `--key=value` flags, read by parsing: nothing is ever executed.

A configuration file is turned into a syntax tree, and the tree is walked by an evaluator that knows assignments, literals,
arithmetic on them and on earlier names, `int`, `float`, `str` and `time.time()`. Everything else (calls, attributes,
subscripts, imports but that of `time`, loops) is refused with the file, the line's number and the line. Names that begin with
an underscore are helpers for later lines and not settings.

Limits: whole numbers of up to 256 bits, texts of up to 10,000 characters, expressions of up to 100 levels, files of up to
256 KiB, so that no file can make the reader slow or large.
"""

import ast
import math
import operator
import time
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from bardling.configfile import read_text_file
from bardling.errors import UserError, closest

Kind = type | types.UnionType
"""The type of a setting: `int`, `str`, ..., or a union such as `int | None`."""

_LARGEST_FILE = 256 * 1024  # characters
_LONGEST_TEXT = 10_000  # characters
_DEEPEST = 100  # levels of nesting
_WIDEST_INTEGER = 256  # bits
_SHOWN = 120  # characters of a line in an error

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
}
_CONVERSIONS: dict[str, Callable[..., Any]] = {"int": int, "float": float, "str": str}

_ALLOWED_TEXT = (
    "only assignments of literals, arithmetic on them and on earlier names, str(), int(), float() and time.time() are read"
)


class _RefusedError(Exception):
    """An expression that is not a setting; `line` is 1-based."""

    def __init__(self, reason: str, line: int) -> None:
        super().__init__(reason)
        self.line = line


def read_py_config(path: Path, allowed: Mapping[str, Kind], known: Mapping[str, object] | None = None) -> dict[str, object]:
    """Read the settings that the file at `path` assigns, in the file's order.

    Args:
        path: a nanoGPT-style configuration, UTF-8.
        allowed: every key that may be set, with its type. A whole number may stand for a float, and a float
            for a whole number where it is one.
        known: values that lines of the file may use besides its own (the defaults, and what earlier files set).

    Returns:
        The keys that the file sets, each of the type that `allowed` names.

    Raises:
        UserError: the file cannot be read, sets an unknown key, or has a line that is not a setting; with file and line.
    """
    text = read_text_file(path)
    if len(text) > _LARGEST_FILE:
        raise UserError(f"{path}: {len(text):,} characters is too large for a configuration file")
    text = text.removeprefix("\ufeff")
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    try:
        tree = _parse(text, "exec")
        reader = _Reader(allowed, dict(known or {}))
        for number, statement in enumerate(tree.body):
            reader.statement(statement, first=number == 0)
    except _RefusedError as error:
        shown = lines[error.line - 1].strip() if 0 < error.line <= len(lines) else ""
        raise UserError(f"{path}:{error.line}: {_printable(shown)}: {error}") from None
    return reader.settings


def parse_flat_flags(args: Sequence[str], allowed: Mapping[str, Kind]) -> dict[str, object]:
    """Read nanoGPT's `--key=value` flags; a later flag wins over an earlier one.

    A key of type `str` takes its value as it stands (`--start=123` is the text 123; quotes around a whole Python string are
    taken off). Other values are Python literals or arithmetic on literals; `true` and `false` are understood too.

    Raises:
        UserError: an argument of another form, an unknown key, or a value that does not fit the key.
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
        except (_RefusedError, ValueError) as error:
            raise UserError(f"--{key}={_printable(text)}: {error}") from None
    return settings


def read_nanogpt_arguments(
    args: Sequence[str], allowed: Mapping[str, Kind], defaults: Mapping[str, object] | None = None
) -> dict[str, object]:
    """Read a nanoGPT command line: configuration files and `--key=value` flags, applied from left to right.

    Args:
        args: the arguments after the program's name, e.g. `["config/a.py", "--batch_size=8"]`.
        allowed: every key that may be set, with its type.
        defaults: values that files may refer to before anything set them.

    Returns:
        The keys that were set; a later argument wins over an earlier one.
    """
    settings: dict[str, object] = {}
    for arg in args:
        if arg.startswith("-"):
            settings |= parse_flat_flags([arg], allowed)
        else:
            settings |= read_py_config(Path(arg), allowed, {**(defaults or {}), **settings})
    return settings


def _parse(text: str, mode: str) -> Any:
    """The syntax tree of `text`; whatever the parser cannot take becomes a `_RefusedError`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns of odd escapes such as "\d"; they are the user's own business
            return ast.parse(text, mode=mode)
    except SyntaxError as error:
        raise _RefusedError(f"is not valid Python ({error.msg})", error.lineno or 1) from None
    except ValueError as error:
        raise _RefusedError(f"is not valid Python ({error})", 1) from None
    except (RecursionError, MemoryError):
        raise _RefusedError("is nested too deeply", 1) from None


def _printable(text: str) -> str:
    """`text` as one short line without control characters."""
    clean = "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)
    return clean if len(clean) <= _SHOWN else clean[: _SHOWN - 1] + "…"


def _flag_value(text: str, kind: Kind) -> object:
    if str in (get_args(kind) or (kind,)):
        try:
            tree = ast.parse(text, mode="eval") if text[:1] in ("'", '"') else None
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            tree = None
        quoted = tree.body.value if tree and isinstance(tree.body, ast.Constant) else None
        return quoted if isinstance(quoted, str) else text
    if text in ("true", "false"):
        return text == "true"
    return _Reader({}, {}).value(_parse(text.strip(), "eval").body)


def _fit(key: str, value: object, kind: Kind) -> object:
    """Return `value` as a `kind`, or raise a `ValueError` that says what was expected."""
    kinds = get_args(kind) or (kind,)
    if type(value) in kinds or (value is None and types.NoneType in kinds):
        return value
    if float in kinds and type(value) is int:
        return float(value)
    if int in kinds and type(value) is float and value.is_integer() and abs(value) < 2**53:
        return int(value)
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "a text in quotes", types.NoneType: "None"}
    expected = " or ".join(names.get(one, one.__name__) for one in kinds)
    raise ValueError(f"{key} is {_printable(repr(value))}, but must be {expected}")


class _Reader:
    """Walks a syntax tree; `settings` holds what was assigned so far."""

    def __init__(self, allowed: Mapping[str, Kind], known: dict[str, object]) -> None:
        self.allowed = allowed
        self.known = known
        self.settings: dict[str, object] = {}

    def statement(self, node: ast.stmt, first: bool) -> None:
        match node:
            case ast.Expr(value=ast.Constant(value=str())) if first:
                return  # the module's docstring
            case ast.Import(names=[ast.alias(name="time", asname=None)]) | ast.Pass():
                return
            case ast.Assign(targets=targets, value=expression):
                value = self.value(expression)
                for target in targets:
                    self.assign(target, value, node.lineno)
            case ast.AnnAssign(target=target, value=ast.expr() as expression):
                self.assign(target, self.value(expression), node.lineno)
            case ast.AugAssign(target=ast.Name(id=name) as target, op=op, value=expression):
                current = ast.copy_location(ast.Name(name, ast.Load()), target)
                combined = ast.copy_location(ast.BinOp(current, op, expression), node)
                self.assign(target, self.value(combined), node.lineno)
            case _:
                raise _RefusedError(f"is not a setting; {_ALLOWED_TEXT}", node.lineno)

    def assign(self, target: ast.expr, value: object, line: int) -> None:
        match target:
            case ast.Name(id=name):
                if name.startswith("_"):
                    self.known[name] = value
                    return
                if name not in self.allowed:
                    raise _RefusedError(f"unknown key {name}{closest(name, list(self.allowed))}", line)
                try:
                    self.known[name] = self.settings[name] = _fit(name, value, self.allowed[name])
                except ValueError as error:
                    raise _RefusedError(str(error), line) from None
            case ast.Tuple(elts=parts) | ast.List(elts=parts) if isinstance(value, tuple) and len(parts) == len(value):
                for part, item in zip(parts, value, strict=True):
                    self.assign(part, item, line)
            case _:
                raise _RefusedError(f"assigns to something that is not a name; {_ALLOWED_TEXT}", line)

    def value(self, node: ast.expr, depth: int = 0) -> Any:
        """The value of an expression; `depth` counts the levels above it."""
        line = node.lineno
        if depth > _DEEPEST:
            raise _RefusedError(f"an expression has more than {_DEEPEST} levels", line)
        match node:
            case ast.Constant(value=None | bool() | int() | float() | str() as value):
                return self.bounded(value, line)
            case ast.Name(id=name):
                if name in self.known:
                    return self.known[name]
                raise _RefusedError(f"{name} has no value here{closest(name, list(self.known))}", line)
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                return tuple(self.value(part, depth + 1) for part in parts)
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
                inner = self.value(operand, depth + 1)
                if not isinstance(inner, bool | int | float):
                    raise _RefusedError("the sign of something that is not a number", line)
                return _UNARY[type(op)](inner)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                return self.arithmetic(op, self.value(left, depth + 1), self.value(right, depth + 1), line)
            case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in _CONVERSIONS:
                inner = self.value(argument, depth + 1)
                return self.computed(lambda: _CONVERSIONS[name](inner), line)
            case ast.Call(func=ast.Attribute(value=ast.Name(id="time"), attr="time"), args=[], keywords=[]):
                return time.time()
            case _:
                raise _RefusedError(f"holds something that is not a literal; {_ALLOWED_TEXT}", line)

    def arithmetic(self, op: ast.operator, left: Any, right: Any, line: int) -> Any:
        """`left op right`, refused before it could take long or grow large."""
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if isinstance(op, ast.Pow) and isinstance(left, int) and isinstance(right, int):
            # The result has about bits(left) * right bits; the exponent itself is bounded so that 0 and 1 are quick as well.
            if abs(right) > _WIDEST_INTEGER or left.bit_length() * abs(right) > 2 * _WIDEST_INTEGER:
                raise _RefusedError("the power is too large", line)
        elif isinstance(op, ast.Mult) and not numbers:
            text, times = (left, right) if isinstance(left, str) else (right, left)
            if not isinstance(text, str) or not isinstance(times, int) or len(text) * times > _LONGEST_TEXT:
                raise _RefusedError("only numbers are multiplied, and short texts repeated", line)
        elif not numbers and not (isinstance(op, ast.Add) and isinstance(left, str) and isinstance(right, str)):
            raise _RefusedError("arithmetic on something that is not a number (a text is joined to a number with str())", line)
        return self.computed(lambda: _BINARY[type(op)](left, right), line)

    def computed(self, compute: Callable[[], Any], line: int) -> Any:
        try:
            return self.bounded(compute(), line)
        except (ArithmeticError, TypeError, ValueError) as error:
            raise _RefusedError(f"cannot be computed ({error})", line) from None

    def bounded(self, value: Any, line: int) -> Any:
        if isinstance(value, str) and len(value) > _LONGEST_TEXT:
            raise _RefusedError(f"a text of more than {_LONGEST_TEXT:,} characters", line)
        if isinstance(value, int) and value.bit_length() > _WIDEST_INTEGER:
            raise _RefusedError("the number is too large", line)
        if isinstance(value, complex) or (isinstance(value, float) and not math.isfinite(value)):
            raise _RefusedError("the result is not a finite number", line)
        return value
