"""Stopping on request: the first SIGINT, SIGTERM or SIGUSR1 asks the run to save and stop, a second one exits at once.

Long work asks for `signal` often (between forward passes, validation batches and generated tokens) and raises `Stopped`,
which the run turns into a checkpoint and the exit status that schedulers expect: 128 + the signal's number. That is 130 for
SIGINT, 143 for SIGTERM and, on Linux, 138 for SIGUSR1, by which Slurm announces the end of a job (`#SBATCH --signal`): a script
that sees 138 requeues the job (`examples/slurm/`).
"""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

HANDLED = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Stopped(Exception):  # noqa: N818  not an error
    """The run was asked to stop, and its state is consistent."""


class StopOnSignal:
    """A context in which signals request a stop instead of ending the process."""

    def __init__(self) -> None:
        self.signal: int | None = None  # the first one received
        self._previous: dict[int, Any] = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            os._exit(128 + number)  # the second request: exit without saving; the latest checkpoint is complete
        self.signal = number

    def __enter__(self) -> "StopOnSignal":
        # Python delivers signals to the main thread only, and refuses handlers elsewhere (in a notebook's worker thread, say).
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in HANDLED}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
