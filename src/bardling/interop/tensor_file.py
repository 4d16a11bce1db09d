"""Named tensors in a safetensors file, with errors that name the file. Reading executes no code, and the library checks that
the header claims no more than the file holds before it allocates memory.
"""

import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bardling.errors import UserError
from bardling.files.atomic import os_error_as_user_error

METADATA = {"format": "pt"}
"""The metadata that `transformers` requires in a safetensors file."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors from any device and with any strides; equal tensors give equal files. Disk failures are `OSError`s."""
    plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)  # the library replaces the file by one that only its owner can read
    try:
        save_file(plain, path, metadata=METADATA)
        with suppress(OSError):  # some network file systems have no permissions
            path.chmod(mode)
    except SafetensorError as error:
        # The library reports the system's error number only in the message.
        if (number := re.search(r"os error (\d+)", str(error))) is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file for reading; its tensors are memory-mapped, so copy them."""
    try:
        with os_error_as_user_error(path, "read"):
            if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would block
                raise UserError(f"{path}: is not a file")
            with safe_open(path, framework="pt", device="cpu") as file:
                yield file
    except MemoryError:
        raise UserError(f"{path}: {path.stat().st_size:,} bytes do not fit in memory") from None
    except SafetensorError as error:
        raise UserError(f"{path}: is damaged or not a safetensors file ({error}): restore it, or download it again") from None


def read_tensors(*paths: Path) -> dict[str, Tensor]:
    """Read all tensors of some files into new memory on the CPU."""
    return dict(LazyTensors(*paths))


class LazyTensors(Mapping[str, Tensor]):
    """The tensors of some files, each read into new memory whenever it is asked for: one at a time needs memory."""

    def __init__(self, *paths: Path) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Path] = {}
        for path in paths:
            with open_tensors(path) as file:
                for name in file.keys():  # noqa: SIM118
                    if name in self._files:
                        raise UserError(f"{path}: {name} is also in {self._files[name].name}: restore both from a copy")
                    self._files[name], self.shapes[name] = path, tuple(file.get_slice(name).get_shape())

    def __getitem__(self, name: str) -> Tensor:
        with open_tensors(self._files[name]) as file:
            # A copy, because later changes to the file must not affect the run.
            tensor = file.get_tensor(name)
            return torch.empty_like(tensor).copy_(tensor)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class Computed(Mapping[str, Tensor]):
    """Tensors that are computed whenever they are asked for, from the given functions."""

    def __init__(self, functions: Mapping[str, Callable[[], Tensor]]) -> None:
        self._functions = functions

    def __getitem__(self, name: str) -> Tensor:
        return self._functions[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._functions)

    def __len__(self) -> int:
        return len(self._functions)
