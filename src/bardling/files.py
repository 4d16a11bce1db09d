"""Writing so that a reader sees a file or folder whole or not at all, and saying what went wrong in one line."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from bardling.errors import UserError

_UNFINISHED = re.compile(r"\..+\.\d{1,10}\.partial")


@contextmanager
def told_plainly(path: Path, doing: str) -> Iterator[None]:
    """Turn what the file system refuses (full disk, no permission, no such folder) into a `UserError` that names the path."""
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"{error.filename or path}: cannot {doing}: {reason}") from error


def unfinished(path: Path) -> Path:
    """Where this process writes what is to become `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A file to be filled beside `path`; when the block ends well it is renamed into place, otherwise removed.

    Args:
        durable: sync it to the disk, so that it survives a power cut too, not only the end of this process.

    Raises:
        OSError: the system refuses; what was at `path` is untouched.
    """
    beside = unfinished(path)
    try:
        with beside.open("wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    if durable:
        sync_folder(path.parent)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file durably, replacing one of that name: readers find the old or the new one, never a part.

    Raises:
        UserError: the system refuses.
    """
    with told_plainly(path, "write"), replacing(path) as file:
        file.write(data)


def remove_unfinished(folder: Path) -> None:
    """Remove what `replacing` leaves in a folder when its process is killed. Nobody else may be writing there."""
    for path in folder.glob(".*.partial"):
        if _UNFINISHED.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def remove_abandoned(path: Path) -> None:
    """Remove what killed processes have left of writing `path`: files and folders named as by `unfinished`.

    What another living process of this machine writes is left alone. What carries this process's own number was left by an
    earlier one (in containers numbers repeat), so call it before writing. Leftovers that the system keeps are no obstacle.

    Limits: processes of other machines and containers cannot be seen; theirs is taken for abandoned.
    """
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(\d{{1,10}})\.partial")
    with suppress(OSError):
        for entry in list(path.parent.iterdir()):
            match = pattern.fullmatch(entry.name)
            if match is None or another_lives(int(match[1])):
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                with suppress(OSError):
                    entry.unlink(missing_ok=True)


def another_lives(pid: int) -> bool:
    """Whether a process other than this one has this number; so say systems too that cannot be asked without harm."""
    if pid == os.getpid():
        return False
    if os.name == "nt":  # there, signal 0 would interrupt it
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut, where the system can sync a folder."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows neither can nor needs to
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot, and need not
            raise
    finally:
        os.close(descriptor)
