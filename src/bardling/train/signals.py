"""Stopping on request: the first SIGINT, SIGTERM or SIGUSR1 asks the run to save and leave, a second one leaves at once.

Long work asks `requested` often (between forward passes, validation batches and sampled tokens) and raises `Stopped`,
which the run turns into a checkpoint and the exit status that schedulers expect: 128 + the signal's number. That is 130 for
SIGINT, 143 for SIGTERM and, on Linux, 138 for SIGUSR1, by which Slurm warns of a job's end (`#SBATCH --signal`): a script that
sees 138 puts the job back into the queue (`examples/slurm/`).
"""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

HANDLED = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Stopped(Exception):  # noqa: N818  not an error: the run was asked to stop
    """The run was asked to stop, and everything in progress has been left in order."""


class StopSignals:
    """A context in which the signals set `requested` instead of ending the process."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    @property
    def exit_status(self) -> int:
        """128 + the signal's number, by convention."""
        return 128 + (self.signal or 0)

    def requested(self) -> bool:
        """Whether a signal has asked this process to stop."""
        return self.signal is not None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            os._exit(128 + number)  # asked twice: leave without saving; the last checkpoint is whole
        self.signal = number

    def __enter__(self) -> "StopSignals":
        # Python delivers signals to the main thread only, and refuses handlers elsewhere (a notebook's worker thread, say).
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in HANDLED}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
