"""One process at a time: a lock that the system drops when its holder ends, however that happens.

Limits: advisory, and only between processes that ask for it. Where the system has no `flock` (Windows), or the file system
does not support it, there is no lock; then two processes that make the same thing at once may disturb each other.
"""

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bardling.errors import UserError
from bardling.files import told_plainly


@contextmanager
def locked(path: Path, *, patience: float = math.inf, taken: str = "") -> Iterator[None]:
    """Wait until no other process holds the lock file `path`, and hold it. Only its holder may remove the file.

    Args:
        patience: seconds to wait at most.
        taken: what the error says then.

    Raises:
        UserError: the file cannot be made, or another process holds it for longer than `patience`.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    until = time.monotonic() + patience
    while True:
        with told_plainly(path, "lock"):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if patience == math.inf else fcntl.LOCK_NB))
            except BlockingIOError:
                if time.monotonic() > until:
                    raise UserError(taken or f"{path}: is held by another process") from None
                time.sleep(0.05)
                continue
            except OSError:
                pass  # a file system without locks (some network ones): go on without, as on Windows
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
