"""Reads files written by `torch.save` without executing anything in them.

Such a file is a zip archive whose `data.pkl` describes the tensors stored in the other members. The archive is checked (no
compression, no duplicate names, no more bytes than the file has), and the pickle may import only the names that plain tensors
need. PyTorch then loads the file with `weights_only=True`, memory-mapped, on the CPU. Limits: the zip format, the default since
PyTorch 1.6; pickles of up to 16 MiB, eighty times that of a GPT-2 XL with its Adam state.
"""

import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import torch

from bardling.errors import UserError
from bardling.files.atomic import os_error_as_user_error

_MAX_PICKLE_BYTES = 16 << 20
_STORAGES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool", "Untyped")
_ALLOWED = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {kind}Storage" for kind in _STORAGES),
    *(f"torch.storage {kind}Storage" for kind in _STORAGES),
}
# Opcodes other than GLOBAL and REDUCE that import or call something; `torch.save` writes none of them.
_FORBIDDEN = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID"}


def load_torch_file(path: Path) -> Any:
    """Read what `torch.save` wrote to `path`: dicts, lists, numbers, strings and tensors only.

    The tensors are on the CPU, memory-mapped from the file: copy what must outlive it.
    """
    _check(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        first = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise UserError(f"{path}: refused: it contains more than tensors and plain data ({first[:200]})") from None
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError, OSError, AssertionError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: is damaged ({first[:200]}): restore it, or download it again") from None


def _check(path: Path) -> None:
    """Refuse an archive that `torch.save` would not have written."""
    try:
        with os_error_as_user_error(path, "read"):
            size = path.stat().st_size
            if not zipfile.is_zipfile(path):
                _refuse_other_format(path)
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
                pickles = [member for member in members if member.filename.rpartition("/")[2] == "data.pkl"]
                problems = {
                    "the archive has two members with the same name": len({m.filename for m in members}) != len(members),
                    "the archive is compressed, which PyTorch never does": any(m.compress_type for m in members),
                    "the archive claims more bytes than the file has": sum(m.file_size for m in members) > size,
                    f"the archive has {len(pickles)} members named data.pkl, not one": len(pickles) != 1,
                    f"its pickle has {sum(m.file_size for m in pickles):,} bytes": any(
                        member.file_size > _MAX_PICKLE_BYTES for member in pickles
                    ),
                }
                for problem in (text for text, found in problems.items() if found):
                    raise UserError(f"{path}: refused: {problem}")
                _check_pickle(path, archive.read(pickles[0]))
    except UserError:
        raise
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:
        raise UserError(f"{path}: is damaged ({str(error)[:200]}): restore it, or download it again") from None


def _refuse_other_format(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(4)
    if head.startswith((b"PK", b"\x80")):
        raise UserError(
            f"{path}: is truncated, or not in PyTorch's zip format; "
            "if it was saved before PyTorch 1.6, save it again with a newer version"
        )
    if path.suffix == ".safetensors":
        raise UserError(f"{path}: holds only the weights of a model: give the folder with its config.json, {path.parent}")
    raise UserError(f"{path}: is not a checkpoint: give a run folder, a checkpoint folder, or a file such as nanoGPT's ckpt.pt")


def _check_pickle(path: Path, data: bytes) -> None:
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in _FORBIDDEN or (opcode.name == "GLOBAL" and argument not in _ALLOWED):
            what = str(argument).replace(" ", ".") if argument else opcode.name
            shown = "".join(char for char in what if char.isprintable())[:100]
            raise UserError(f"{path}: refused: its pickle would execute code or create something other than a tensor ({shown})")
