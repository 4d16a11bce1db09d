"""Pickles from outside, read without running anything: plain data only.

nanoGPT keeps a vocabulary in `meta.pkl`. A pickle is a program, and Python's own unpickler runs it; this one knows only the
instructions that build dicts, lists, tuples, strings, bytes, integers, floats, booleans and None, and refuses a file at the
first other one. Instructions are decoded by the standard library's `pickletools.genops`, which only describes them.

Limits: files of up to 16 MiB, two million instructions, values nested up to 32 deep, integers of up to 256 bits. A
container may stand in one place only, so the result is always a tree as large as the file says.
"""

import pickletools
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bardling.errors import UserError

LARGEST_PICKLE = 16 << 20  # bytes; a vocabulary of 100,000 characters takes 2 MB and 500,000 instructions
_MOST_INSTRUCTIONS = 2_000_000
_DEEPEST = 32
_WIDEST_INTEGER = 256  # bits


class _RefusedError(Exception):
    """What in the pickle is not plain data."""


_PUSH_ARGUMENT = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4",
    "FLOAT", "BINFLOAT",
    "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip
_PUSH_CONSTANT: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
_IGNORED = {"PROTO", "FRAME"}


def load_plain_pickle(path: Path) -> Any:
    """Read the plain data in the pickle at `path`, running nothing.

    Returns:
        Nested dicts, lists, tuples and scalars.

    Raises:
        UserError: the file cannot be read, is too large or damaged, or holds anything but plain data.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would wait for ever, and a device never end
            raise UserError(f"{path}: is not a file")
        if status.st_size > LARGEST_PICKLE:
            raise UserError(f"{path}: {status.st_size:,} bytes is too large for a vocabulary")
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        return _build(data)
    except _RefusedError as error:
        raise UserError(
            f"{path}: refused: {error}; only plain dicts, lists, texts and numbers are read from a pickle"
        ) from None
    except (ValueError, LookupError, TypeError, UnicodeError, OverflowError, MemoryError) as error:
        raise UserError(f"{path}: is not a complete pickle ({type(error).__name__})") from None


class _Stack:
    """The unpickler's stack, its marks, and the depth of every container on it."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.marks: list[int] = []  # heights of the stack at which a mark was set
        self.depths: dict[int, int] = {}  # id of a container -> levels, itself included
        self.containers: list[Any] = []  # keeps every container alive, so that ids stay unique

    def push(self, value: Any) -> None:
        if isinstance(value, int) and value.bit_length() > _WIDEST_INTEGER:
            raise _RefusedError(f"it holds an integer of more than {_WIDEST_INTEGER} bits")
        if isinstance(value, dict | list | tuple):
            self.containers.append(value)
            self.depths[id(value)] = 1
            self.note(value, value.values() if isinstance(value, dict) else value)
        self.values.append(value)

    def note(self, container: Any, items: Iterable[Any]) -> None:
        """Bound the nesting now that `container` holds `items`; each container has one parent, so depths never change later."""
        deepest = max((self.depths.get(id(item), 0) for item in items if isinstance(item, dict | list | tuple)), default=0)
        if deepest >= _DEEPEST:
            raise _RefusedError(f"it is nested more than {_DEEPEST} levels deep")
        self.depths[id(container)] = max(self.depths[id(container)], deepest + 1)

    def pop(self, count: int) -> list[Any]:
        if len(self.values) - count < (self.marks[-1] if self.marks else 0):
            raise ValueError("the stack is empty")
        items = self.values[len(self.values) - count :]
        del self.values[len(self.values) - count :]
        return items

    def pop_to_mark(self) -> list[Any]:
        return self.pop(len(self.values) - self.marks.pop())

    def top(self, kind: type) -> Any:
        (value,) = self.pop(1)
        self.values.append(value)
        if kind is not object and type(value) is not kind:
            raise ValueError("items for something that takes none")
        return value

    def extend_dict(self, items: list[Any]) -> None:
        target = self.top(dict)
        if len(items) % 2:
            raise ValueError("a key without a value")
        keys, values = items[::2], items[1::2]
        if not all(isinstance(key, str | int | float | bytes | None) for key in keys):
            raise _RefusedError("a dict's key is not a text or a number")
        self.note(target, values)
        target.update(zip(keys, values, strict=True))

    def extend_list(self, items: list[Any]) -> None:
        target = self.top(list)
        self.note(target, items)
        target.extend(items)


def _build(data: bytes) -> Any:
    stack = _Stack()
    memo: dict[Any, Any] = {}  # by the number that the pickle gives
    for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if number >= _MOST_INSTRUCTIONS:
            raise _RefusedError(f"it has more than {_MOST_INSTRUCTIONS:,} instructions")
        name = opcode.name
        if name in _PUSH_ARGUMENT:
            stack.push(argument)
        elif name in _PUSH_CONSTANT:
            stack.push(_PUSH_CONSTANT[name]())
        elif name in _IGNORED:
            continue
        elif name == "MARK":
            stack.marks.append(len(stack.values))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = stack.top(object)
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            value = memo[argument]
            if isinstance(value, dict | list | tuple):
                raise _RefusedError("it uses one container in two places")  # so could a small file stand for endless data
            stack.push(value)
        elif name in ("SETITEM", "SETITEMS"):
            stack.extend_dict(stack.pop(2) if name == "SETITEM" else stack.pop_to_mark())
        elif name in ("APPEND", "APPENDS"):
            stack.extend_list(stack.pop(1) if name == "APPEND" else stack.pop_to_mark())
        elif name == "DICT":
            items = stack.pop_to_mark()
            stack.push({})
            stack.extend_dict(items)
        elif name == "LIST":
            stack.push(stack.pop_to_mark())
        elif name == "TUPLE":
            stack.push(tuple(stack.pop_to_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.push(tuple(stack.pop(int(name[-1]))))
        elif name == "STOP":
            (result,) = stack.pop(1)
            if stack.values or stack.marks:
                raise ValueError("values left over")
            return result
        else:
            raise _RefusedError(f"it holds the instruction {name}, which can run code or make objects")
    raise ValueError("no end")
