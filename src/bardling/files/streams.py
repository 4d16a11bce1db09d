"""Standard streams as programs find them: closed, with a reader that has gone, on a full device, or with an encoding that lacks
characters. A stream that fails is redirected to the null device, so that nothing that is written to it later, by a library or
when Python exits, fails again.
"""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO, cast


class Lasting:
    """A text stream that drops everything after its first failure, which is kept in `failure`.

    Args:
        name: if given, the failure is also raised, once, as an error of a file of this name.
    """

    def __init__(self, stream: TextIO, name: str = "") -> None:
        self._stream, self._name = stream, name
        self.failure: Exception | None = None

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _attempt(self, work: Callable[[], object]) -> None:
        if self.failure is not None:
            return
        try:
            work()
        except UnicodeError:
            raise
        except (OSError, ValueError) as error:  # ValueError: it has been closed
            self.failure = error
            _discard(self._stream)
            if self._name:
                if isinstance(error, OSError):
                    error.filename = self._name
                raise


def _discard(stream: TextIO) -> None:
    """Redirect the descriptor of standard output or error to the null device."""
    with suppress(OSError, ValueError, AttributeError):
        if (number := stream.fileno()) in (1, 2):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, number)
            os.close(null)


def open_standard_streams() -> None:
    """Make the standard streams of this program usable.

    Closed ones become the null device: otherwise, the next file that is opened would take their place and receive what
    libraries print. Characters that the encoding lacks are escaped. Standard error, which has no results, never fails.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout = cast(TextIO, Lasting(sys.stdout, "standard output"))
    sys.stderr = cast(TextIO, Lasting(sys.stderr))


def escape_unprintable(text: str, encoding: str = "utf-8") -> str:
    """Escape control characters (generated text must not control the terminal) and characters that `encoding` lacks."""
    shown = "".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def tell(text: str) -> None:
    """Print a line for the user on standard error, which may be closed; in one piece, because other processes may write too."""
    with suppress(OSError, ValueError, AttributeError):  # AttributeError: there is none
        sys.stderr.write(f"bardling: {escape_unprintable(text)}\n")
        sys.stderr.flush()
