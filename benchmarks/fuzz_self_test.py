"""Loaders that each do one forbidden thing, which the fuzzer must catch."""

import contextlib
import ctypes
import os
import pickle
from pathlib import Path

import numpy as np

from fuzz_targets import Target


def make_example(folder: Path) -> None:
    (folder / "file.json").write_text("{}")


def _unpickles(folder: Path) -> None:
    path = Path(os.environ["FUZZ_CANARY"])
    pickle.loads(b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93\x8c" + bytes([len(str(path))]) + str(path).encode() + b"\x85R.")


def _writes_elsewhere(folder: Path) -> None:
    (folder.parent / "elsewhere").write_text("x")


def _runs_a_command(folder: Path) -> None:
    with contextlib.suppress(BaseException):  # suppressing the exception must not help
        os.system("true")


def _takes_memory(folder: Path) -> None:
    np.ones(700_000_000)


def _computes_too_long(folder: Path) -> None:
    while True:
        pass


def _waits_forever(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    with (folder / "pipe").open("rb") as file:
        file.read()


def _crashes(folder: Path) -> None:
    ctypes.string_at(0)


def _fails_otherwise(folder: Path) -> None:
    raise KeyError("x")


SELF_TESTS = tuple(
    Target(f"self-test:{load.__name__.strip('_')}", 1, make_example, ("file.json",), load, writes=True)
    for load in (_unpickles, _writes_elsewhere, _runs_a_command, _takes_memory, _computes_too_long, _waits_forever, _crashes,
    _fails_otherwise)
)  # fmt: skip
