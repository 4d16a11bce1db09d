"""Atomic writes: a reader sees a complete file or folder, or none.

A file or folder is written under a hidden name beside its target, `.NAME.PID.partial`, and renamed when it is complete.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from bardling.errors import UserError

_LONGEST_NAME = 255  # bytes, on all common file systems
_PARTIAL = re.compile(r"\..+\.\d{1,10}\.partial")


def os_reason(error: OSError) -> str:
    """Why the system refused."""
    return error.strerror or str(error)


@contextmanager
def os_error_as_user_error(path: Path, doing: str, *, remedy: str = "") -> Iterator[None]:
    """Convert an `OSError` (full disk, missing folder) into a `UserError`: "PATH: cannot DOING: reason", then `remedy`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{_named(error, path)}: cannot {doing}: {os_reason(error).lower()}{remedy}") from error


def _named(error: OSError, path: Path) -> object:
    """The path at fault; a temporary name stands for `path`."""
    return path if str(error.filename or "").endswith(".partial") else error.filename or path


def check_place(path: Path) -> None:
    """Raise a `UserError` with the reason if nothing can be created at `path`, before anything is."""
    for place in (*reversed(path.parents), path):
        if len(os.fsencode(place.name)) > _LONGEST_NAME:
            raise UserError(f"{path}: the name is too long (more than {_LONGEST_NAME} bytes): choose a shorter one")
        if place.is_symlink() and not place.exists():
            raise UserError(f"{place}: is a link to {place.readlink()}, which does not exist: create that, or remove the link")
        if place != path and place.exists() and not place.is_dir():
            raise UserError(f"{path}: {place} is a file, not a folder: choose another path")


def partial_path(path: Path) -> Path:
    """The temporary name under which this process writes `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


@contextmanager
def atomic_file(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` for writing; rename it into place if the block succeeds, else remove it.

    `durable` also syncs to disk, so that the file survives a power loss and not only the end of this process.
    """
    partial = partial_path(path)
    try:
        with partial.open("wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    if durable:
        sync_folder(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Create a temporary folder beside `path`, which must not exist; rename it if the block succeeds, else remove it."""
    remove_stale_partials(path)
    partial = partial_path(path)
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` durably to `path`, replacing an existing file; raises a `UserError` if that fails."""
    with os_error_as_user_error(path, "write"), atomic_file(path) as file:
        file.write(data)


def remove_partial_files(folder: Path) -> None:
    """Remove the temporary files that killed writers left in `folder`. No other process may be writing there."""
    for path in folder.glob(".*.partial"):
        if _PARTIAL.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def remove_stale_partials(path: Path) -> None:
    """Remove the temporary files and folders that killed writers of `path` left behind; failures are ignored.

    Those of other live processes on this machine are kept. One with this process's id comes from an earlier process (ids
    repeat in containers), so call this before writing.

    Limits: processes on other machines and in other containers are invisible; their temporary files count as abandoned.
    """
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(\d{{1,10}})\.partial")
    with suppress(OSError):
        for entry in list(path.parent.iterdir()):
            match = pattern.fullmatch(entry.name)
            if match is None or other_process_alive(int(match[1])):
                continue
            shutil.rmtree(entry, ignore_errors=True)  # does nothing to a file or a link
            with suppress(OSError):
                entry.unlink()


def other_process_alive(pid: int) -> bool:
    """Whether a process other than this one has the id `pid`; True where that cannot be found out safely."""
    if pid == os.getpid():
        return False
    if os.name == "nt":  # os.kill(pid, 0) would send Ctrl-C there
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def sync_folder(folder: Path) -> None:
    """Make renames and new names in `folder` survive a power loss, where the system can sync a folder."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows can't and needn't
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems don't support it
            raise
    finally:
        os.close(descriptor)
