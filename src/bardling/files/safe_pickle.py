"""Untrusted pickles, such as nanoGPT's `meta.pkl`, read without executing them: plain data only.

A pickle is a program that Python's own unpickler runs. This reader implements only the opcodes that build dicts, lists, tuples,
strings, bytes, integers, floats, booleans and None (decoded by the standard library's `pickletools.genops`), and refuses a file
at the first other one. Limits: 16 MiB per file, two million opcodes, 32 levels of nesting, 256-bit integers. A container may be
used only once, so that the result is a tree and cannot be larger than the file.
"""

import pickletools
from pathlib import Path
from typing import Any

from bardling.errors import UserError
from bardling.files.reading import read_small_bytes

MAX_PICKLE_BYTES = 16 << 20  # a vocabulary of 100,000 characters takes 2 MB and 500,000 opcodes
_MAX_OPCODES = 2_000_000
_MAX_DEPTH = 32
_MAX_INTEGER_BITS = 256

_PUSH_ARGUMENT = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
_PUSH_CONSTANT = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TAKE_TO_MARK = {"SETITEMS", "APPENDS", "DICT", "LIST", "TUPLE"}
_TAKE = {"SETITEM": 2, "APPEND": 1, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}  # number of values


class _RefusedError(Exception):
    """The pickle holds something other than plain data; the message says what."""


def load_plain_pickle(path: Path) -> Any:
    """Read the plain data (nested dicts, lists, tuples and scalars) in the pickle at `path` without executing anything."""
    data = read_small_bytes(path, limit=MAX_PICKLE_BYTES)
    try:
        value = _build(data)
        _check_depth(value)
        return value
    except _RefusedError as error:
        raise UserError(f"{path}: refused: {error}; a pickle may hold only dicts, lists, strings and numbers") from None
    except (ValueError, LookupError, TypeError, UnicodeError, OverflowError, MemoryError) as error:
        raise UserError(f"{path}: is not a complete pickle ({type(error).__name__})") from None


def _build(data: bytes) -> Any:
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stacks set aside at each mark
    memo: dict[Any, Any] = {}  # by the pickle's own number
    for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if number >= _MAX_OPCODES:
            raise _RefusedError(f"it has more than {_MAX_OPCODES:,} opcodes")
        name = opcode.name
        items: list[Any] = []
        if name in _TAKE_TO_MARK:
            items, stack = stack, below.pop()
        elif name in _TAKE:
            items = [stack.pop() for _ in range(_TAKE[name])][::-1]
        match name:
            case "PROTO" | "FRAME":
                continue
            case "MARK":
                below.append(stack)
                stack = []
            case "EMPTY_DICT" | "DICT":
                stack.append(_pairs(items))
            case "EMPTY_LIST" | "LIST":
                stack.append(items)
            case "EMPTY_TUPLE" | "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(items))
            case "SETITEM" | "SETITEMS":
                _top(stack, dict).update(_pairs(items))
            case "APPEND" | "APPENDS":
                _top(stack, list).extend(items)
            case "PUT" | "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                memo[len(memo) if argument is None else argument] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                if isinstance(memo[argument], dict | list | tuple):  # a small file could otherwise expand without limit
                    raise _RefusedError("it uses one container in two places")
                stack.append(memo[argument])
            case "STOP":
                (result,) = stack
                if below:
                    raise ValueError("values left over")
                return result
            case _ if name in _PUSH_ARGUMENT or name in _PUSH_CONSTANT:
                if isinstance(argument, int) and argument.bit_length() > _MAX_INTEGER_BITS:
                    raise _RefusedError(f"it holds an integer of more than {_MAX_INTEGER_BITS} bits")
                stack.append(_PUSH_CONSTANT.get(name, argument))
            case _:
                raise _RefusedError(f"it contains the opcode {name}, which can run code or create objects")
    raise ValueError("no end")


def _pairs(items: list[Any]) -> dict[Any, Any]:
    keys = items[::2]
    if not all(isinstance(key, str | int | float | bytes | None) for key in keys):
        raise _RefusedError("a dict key is not a string or a number")
    return dict(zip(keys, items[1::2], strict=True))


def _top(stack: list[Any], kind: type) -> Any:
    if type(stack[-1]) is not kind:
        raise ValueError("items for an object that takes none")
    return stack[-1]


def _check_depth(value: Any, left: int = _MAX_DEPTH) -> None:
    if isinstance(value, dict | list | tuple):
        if not left:
            raise _RefusedError(f"it is nested more than {_MAX_DEPTH} levels deep")
        for item in value.values() if isinstance(value, dict) else value:
            _check_depth(item, left - 1)
