"""Untrusted pickles, such as nanoGPT's `meta.pkl`, read without executing them: plain data only.

A pickle is a program that Python's own unpickler runs. This reader implements only the opcodes that build dicts, lists, tuples,
strings, bytes, integers, floats, booleans and None (decoded by the standard library's `pickletools.genops`), and refuses a file
at the first other one. NumPy's numbers, strings and one-dimensional arrays become plain values and lists: the names in
their pickles are recognized, never imported. Limits: 16 MiB per file, two million opcodes, 32 levels of nesting, 256-bit
integers. A container may be used only once, so that the result is a tree and cannot be larger than the file.
"""

import pickletools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bardling.errors import UserError
from bardling.files.reading import read_small_bytes

MAX_PICKLE_BYTES = 16 << 20  # a vocabulary of 100,000 characters takes 2 MB and 500,000 opcodes
_MAX_OPCODES = 2_000_000
_MAX_DEPTH = 32
_MAX_INTEGER_BITS = 256

_NUMPY = {"scalar", "_reconstruct", "_frombuffer", "dtype", "ndarray"}
_NUMPY_MODULES = re.compile(r"numpy(\._?core\.(multiarray|numeric))?")
_DTYPE = re.compile(r"[iuf][1248]|b1|U[0-9]{1,4}|O8?")

_PUSH_ARGUMENT = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_PUSH_CONSTANT = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TAKE_TO_MARK = {"SETITEMS", "APPENDS", "DICT", "LIST", "TUPLE"}
_TAKE = {"SETITEM": 2, "APPEND": 1, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}  # number of values


@dataclass(frozen=True)
class _Name:
    """One of the names in `_NUMPY`."""

    name: str


@dataclass
class _Dtype:
    code: str
    order: str = "|"

    def values(self, data: Any) -> list[Any]:
        """The plain values in the memory of an array."""
        if isinstance(data, list) and self.code.startswith("O"):
            return data
        if not isinstance(data, bytes | bytearray) or self.code.startswith("O"):
            raise ValueError("data of another type")
        dtype = np.dtype(self.code).newbyteorder(">" if self.order == ">" else "<")
        return list(np.frombuffer(data, dtype).tolist())


class _Array:
    """An array whose content has not been read yet."""


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
            case "GLOBAL" | "STACK_GLOBAL":
                where = str(argument).rpartition(" ") if name == "GLOBAL" else (stack.pop(-2), "", stack.pop())
                if not _NUMPY_MODULES.fullmatch(where[0]) or where[2] not in _NUMPY:
                    raise _RefusedError(f"it contains the opcode {name}, which can run code or create objects")
                stack.append(_Name(where[2]))
            case "REDUCE":
                arguments = stack.pop()
                stack.append(_reduce(stack.pop(), arguments))
            case "BUILD":
                state = stack.pop()
                stack.append(_built(stack.pop(), state))
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


def _reduce(function: Any, arguments: Any) -> Any:
    """What NumPy's `function` makes of its arguments."""
    match function, arguments:
        case _Name("dtype"), (str(code), *_) if _DTYPE.fullmatch(code):
            return _Dtype(code)
        case _Name("scalar"), (_Dtype() as dtype, bytes(data)):
            (value,) = dtype.values(data)
            return value
        case _Name("_reconstruct"), (_Name("ndarray"), *_):
            return _Array()
        case _Name("_frombuffer"), (data, _Dtype() as dtype, (int(length),), _):
            return _built(_Array(), (1, (length,), dtype, False, data))
    raise _RefusedError("it calls a function")


def _built(value: Any, state: Any) -> Any:
    """A NumPy type or array with the state that its pickle gives it."""
    match value, state:
        case _Dtype(), (_, str(order), *_):
            value.order = order
            return value
        case _Array(), (_, (int(length),), _Dtype() as dtype, bool(), data):
            values = dtype.values(data)
            if len(values) != length:
                raise ValueError("an array of another length")
            return values
    raise _RefusedError("it holds an object, or an array with several dimensions")


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
    if isinstance(value, _Name | _Dtype | _Array):
        raise _RefusedError("it holds an object")
    if isinstance(value, dict | list | tuple):
        if not left:
            raise _RefusedError(f"it is nested more than {_MAX_DEPTH} levels deep")
        for item in value.values() if isinstance(value, dict) else value:
            _check_depth(item, left - 1)
