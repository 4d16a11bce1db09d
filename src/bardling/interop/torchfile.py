"""Files that `torch.save` wrote, read without running anything in them.

Such a file is a zip archive whose `data.pkl` says how its tensors lie in the other members. Before PyTorch sees the file, the
archive is checked (nothing compressed, no name twice, no more bytes than the file has) and the pickle's instructions are
listed: only the names that plain tensors need may be imported by it. PyTorch then loads it with `weights_only=True`, mapped
into memory, on the CPU whatever device wrote it.

Limits: the zip format, which PyTorch writes since 1.6; pickles of up to 16 MiB, eighty times that of a GPT-2 XL with its
Adam state.
"""

import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import torch

from bardling.errors import UserError

_LARGEST_PICKLE = 16 << 20  # bytes
_STORAGES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool", "Untyped")
_ALLOWED = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {kind}Storage" for kind in _STORAGES),
    *(f"torch.storage {kind}Storage" for kind in _STORAGES),
}
# Instructions that import or call by other ways than GLOBAL and REDUCE; `torch.save` writes none of them.
_FORBIDDEN = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID"}


def load_torch_file(path: Path) -> Any:
    """Read what `torch.save` wrote to `path`: dicts, lists, numbers, texts and tensors, nothing else.

    Returns:
        The object; its tensors are on the CPU and mapped from the file, so copy what must outlive it.

    Raises:
        UserError: in one line with the file's name, if it cannot be read, is damaged, or holds anything executable.
    """
    _check(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise UserError(f"{path}: refused: it holds more than tensors and plain data ({first[:200]})") from None
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError, OSError, AssertionError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: is damaged: {first[:200]}") from None


def _check(path: Path) -> None:
    """Refuse an archive that `torch.save` would not have written."""
    try:
        size = path.stat().st_size
        if not zipfile.is_zipfile(path):
            with path.open("rb") as file:
                begin = file.read(2)
            if not begin.startswith((b"PK", b"\x80")):  # neither a part of an archive nor a bare pickle
                raise UserError(
                    f"{path}: is no checkpoint: name a run's folder, a checkpoint's folder, or a file such as nanoGPT's ckpt.pt"
                )
            raise UserError(
                f"{path}: is not a checkpoint in PyTorch's zip format, or was cut; "
                "if PyTorch before 1.6 wrote it, load and save it there with a newer one"
            )
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            names = [member.filename for member in members]
            if len(set(names)) != len(names):
                raise UserError(f"{path}: refused: the archive has two members of one name")
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise UserError(f"{path}: refused: the archive is compressed, which PyTorch's never is")
            if sum(member.file_size for member in members) > size:
                raise UserError(f"{path}: refused: the archive claims more bytes than the file has")
            pickles = [member for member in members if member.filename.rpartition("/")[2] == "data.pkl"]
            if len(pickles) != 1:
                raise UserError(f"{path}: refused: the archive has {len(pickles)} members named data.pkl, not one")
            if pickles[0].file_size > _LARGEST_PICKLE:
                raise UserError(f"{path}: refused: its pickle has {pickles[0].file_size:,} bytes")
            _check_pickle(path, archive.read(pickles[0]))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({(error.strerror or str(error)).lower()})") from None
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: is damaged: {str(error)[:200]}") from None


def _check_pickle(path: Path, data: bytes) -> None:
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in _FORBIDDEN or (opcode.name == "GLOBAL" and argument not in _ALLOWED):
            what = str(argument).replace(" ", ".") if argument else opcode.name
            shown = "".join(char for char in what if char.isprintable())[:100]
            raise UserError(f"{path}: refused: its pickle would run or make something that is not a tensor ({shown})")
