"""One process at a time: a lock that the system drops when its holder ends, however that happens.

Limits: advisory, and only between processes that ask for it. Where the system has no `flock` (Windows), or the file system
does not support it, there is no lock; then two processes that make the same thing at once may disturb each other.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bardling.files import told_plainly


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait until no other process holds the lock file `path`, and hold it. Only its holder may remove the file."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    while True:
        with told_plainly(path, "lock"):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            with suppress(OSError):  # a file system without locks (some network ones): go on without, as on Windows
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not _same(descriptor, path):  # its last holder has removed it: another one may be locked by now
                continue
            yield
            return
        finally:
            os.close(descriptor)


def _same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
