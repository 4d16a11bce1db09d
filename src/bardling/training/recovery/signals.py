"""Stopping on request: the first SIGINT, SIGTERM, SIGHUP or SIGUSR1 asks the run to save and stop, a later one exits at once.

Long work asks for `signal` often (between forward passes, or the steps of several processes, between validation batches and
generated tokens) and raises `Stopped`, which the run turns into a checkpoint and the exit status that schedulers expect: 128 +
the signal's number. That is 130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP (a closed terminal) and, on Linux, 138 for SIGUSR1,
by which Slurm announces the end of a job (`#SBATCH --signal`): a script that sees 138 requeues the job (`examples/slurm/`).
SIGHUP stays ignored where `nohup` has ignored it.

Compilation, which may take minutes, does not ask: a signal interrupts the passes of a compiled model (`interruptible`). Several
processes complete them, because each waits for the gradients of all.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from bardling.errors import ONE_REQUEST, Terminated

HANDLED = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name))


class Stopped(Exception):  # noqa: N818  not an error
    """The run was asked to stop, and its state is consistent."""


class StopOnSignal:
    """A context in which signals request a stop instead of ending the process, once `begin` has been called."""

    def __init__(self) -> None:
        self.signal: int | None = None  # the first one received
        self._acknowledge: Callable[[str], None] | None = None
        self._interruptible = False
        self._received: float | None = None
        self._previous: dict[int, Any] = {}

    def begin(self, acknowledge: Callable[[str], None]) -> None:
        """Training begins, so from now on there is something to save; `acknowledge` prints a line."""
        self._acknowledge = acknowledge

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A context for work that changes nothing: a signal raises `Terminated` in it."""
        self._interruptible = True
        try:
            if self.signal is not None:
                raise Terminated(self.signal)
            yield
        finally:
            self._interruptible = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._received is not None:
            if now - self._received > ONE_REQUEST:
                os._exit(128 + number)  # exit without saving; the latest checkpoint is complete
            return
        self._received = now
        if self._acknowledge is None:
            raise Terminated(number)
        self.signal = number
        text = f"{signal.Signals(number).name} received: saving and stopping; a second one exits without saving"
        # In a thread, because what this signal interrupts may hold the display's locks.
        threading.Thread(target=self._acknowledge, args=(text,), name="acknowledge", daemon=True).start()
        if self._interruptible:
            raise Terminated(number)

    def __enter__(self) -> "StopOnSignal":
        # Python delivers signals to the main thread only, and refuses handlers elsewhere (in a notebook's worker thread, say).
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in HANDLED if not _is_protected(number)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def _is_protected(number: int) -> bool:
    """Whether the user has protected this process from a closed terminal, with `nohup` for example."""
    return signal.Signals(number).name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN
