"""Writing so that a reader sees a file or folder whole or not at all, and saying what went wrong in one line."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bardling.errors import UserError


@contextmanager
def told_plainly(path: Path, doing: str) -> Iterator[None]:
    """Turn what the file system refuses (full disk, no permission, no such folder) into a `UserError` that names the path."""
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"{error.filename or path}: cannot {doing}: {reason}") from error


def write_whole(path: Path, data: bytes) -> None:
    """Write a file beside `path`, sync it to the disk and rename it into place, replacing a file of that name."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with told_plainly(path, "write"):
        try:
            with beside.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut, where the system can sync a folder."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows neither can nor needs to
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
