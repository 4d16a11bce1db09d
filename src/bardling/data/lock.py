"""One process at a time: a lock that the system drops when its holder ends, however that happens.

Limits: advisory, and only between processes that ask for it. Where the system has no `flock` (Windows), or the file system
does not support it, there is no lock; then two processes that make the same thing at once may disturb each other.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bardling.data.files import told_plainly


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait until no other process holds the lock file `path`, and hold it. The file itself stays: removing it would race."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with told_plainly(path, "lock"):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if isinstance(error, InterruptedError):
                raise
            # a file system without locks (some network ones): go on without, as on Windows
        yield
    finally:
        os.close(descriptor)
