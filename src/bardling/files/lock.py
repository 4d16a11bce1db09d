"""A lock between processes that ask for it, released by the system when its holder ends in any way.

A thin layer over `filelock`. Its fallback to a lock that merely exists as a file is off, because a killed process would leave
such a lock behind forever. Where a file system has no `flock` (some network ones), work continues unlocked, with a warning.
"""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

from bardling.errors import UserError
from bardling.files.atomic import os_error_as_user_error, os_reason
from bardling.files.streams import tell

PATIENCE = 5.0
"""Seconds of waiting after which the user is told."""


@contextlib.contextmanager
def locked(
    path: Path, *, timeout: float = -1, message: str = "", folder_moves: bool = False, waiting: str = ""
) -> Iterator[None]:
    """Wait until no other process holds the lock file `path`, and hold it. Only the holder may remove or move the file.

    After `timeout` seconds (negative: never), a `UserError` with this `message` is raised. After `PATIENCE`, the line `waiting`
    tells the user what for. `folder_moves` is for a holder that
    renames or deletes the lock file's folder: Windows refuses that for a folder with an open file, so there is no lock there.
    """
    if folder_moves and os.name == "nt":
        yield
        return
    if os.name != "nt" and importlib.util.find_spec("fcntl") is None:
        _warn(f"{path}: cannot lock (this system has no file locks); continuing unlocked")
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
        return
    import filelock  # imported here because most commands never lock anything

    lock = filelock.FileLock(path, timeout=timeout, fallback_to_soft=False)
    while True:
        with os_error_as_user_error(path, "lock"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("ab").close()  # whatever fails after this is the lock itself
        try:
            if waiting:
                with contextlib.suppress(filelock.Timeout):
                    lock.acquire(timeout=PATIENCE)
                if not lock.is_locked:
                    tell(waiting)
                    waiting = ""
            if not lock.is_locked:
                lock.acquire()
        except filelock.Timeout:
            raise UserError(message or f"{path}: another process holds this lock: wait for it to finish, or stop it") from None
        except FileNotFoundError:  # its holder has moved or removed the folder
            continue
        except OSError as error:
            _warn(f"{path}: cannot lock ({os_reason(error).lower()}); continuing unlocked")
        break
    try:
        yield
    finally:
        lock.release()


def _warn(text: str) -> None:
    tell(f"warning: {text}")
