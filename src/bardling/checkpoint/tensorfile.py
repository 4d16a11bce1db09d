"""Named tensors in a safetensors file, with errors that name the file.

No code runs when such a file is read, and its header cannot claim more than the file holds: the library checks both before
it allocates.
"""

import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bardling.errors import UserError


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors of any device and layout; equal tensors give equal files.

    Raises:
        OSError: the file cannot be written.
    """
    plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    try:
        save_file(plain, path, metadata={"format": "pt"})  # this format's name is what transformers looks for
    except SafetensorError as error:
        # The library gives the system's error number only in its text.
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors into memory of their own, on the CPU.

    Raises:
        UserError: the file is missing, cut, or not in this format.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would wait for ever
            raise UserError(f"{path}: is not a file")
        with safe_open(path, framework="pt") as file:
            # Copies, since the file's own are mapped: what happens to the file later must not reach the run.
            return {name: torch.empty_like(tensor).copy_(tensor) for name in file.keys() for tensor in [file.get_tensor(name)]}  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"{path}: is missing") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({os.strerror(error.errno) if error.errno else error})") from None
    except MemoryError:
        raise UserError(f"{path}: {path.stat().st_size:,} bytes are more than fit into memory") from None
    except SafetensorError as error:
        raise UserError(f"{path}: is damaged or not a safetensors file ({error})") from None
