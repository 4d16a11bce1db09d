"""A progress bar for long work, shown only once the work has taken two seconds."""

import contextlib
import sys
import time

from rich import progress as rich
from rich.console import Console

from bardling.monitor.format import duration, size_bytes

PATIENCE = 2.0  # seconds before anything is shown
PLAIN_INTERVAL = 15.0  # seconds between lines where there is no terminal


def on_terminal() -> bool:
    """Whether standard error is a terminal; the one of a notebook may not even have the method."""
    return bool(getattr(sys.stderr, "isatty", bool)())


class ProgressBar:
    """On a terminal, draws bars on standard error; elsewhere, prints a line there every `PLAIN_INTERVAL` seconds.

    Args:
        label: what is being done, for calls of the form `bar(done, total)`; `update` names it each time.
        unit: unit of `done`, for the speed; 'bytes' shows a percentage and the transfer speed.
        show: False shows nothing.

    Attributes:
        note: text to show after the transfer speed.
    """

    def __init__(self, label: str = "", *, unit: str = "", show: bool = True) -> None:
        self.note = ""
        self._label, self._unit, self._show = label, unit, show
        self._start = self._last_line = time.monotonic()
        self._bar: rich.Progress | None = None
        self._tasks: dict[str, rich.TaskID] = {}

    def __call__(self, done: int, total: int) -> None:
        self.update(self._label, done, total)

    def update(self, label: str, done: int, total: int) -> None:
        """Show progress on the work named `label`; a `total` of 0 means that it is unknown."""
        now = time.monotonic()
        if not self._show or now - self._start < PATIENCE:
            return
        speed = done / (now - self._start)
        rate = f"{speed:.1f} {self._unit}/s" if self._unit else ""
        if on_terminal():
            self._draw(label, done, total, self.note if self._unit == "bytes" else rate)
        elif now - self._last_line > PLAIN_INTERVAL and done < total:
            self._last_line = now
            amount, left = f"{done:,} of {total:,}", f"{duration((total - done) / speed)} left" if speed else ""
            if self._unit == "bytes":
                amount, rate = f"{size_bytes(done)} of {size_bytes(total)}", self.note or f"{size_bytes(speed)}/s"
            line = ", ".join(part for part in (amount, rate, left) if part)
            with contextlib.suppress(OSError, ValueError):
                print(f"{label}: {line}", file=sys.stderr, flush=True)

    def _draw(self, label: str, done: int, total: int, text: str) -> None:
        if self._bar is None:
            amount: list[rich.ProgressColumn] = [rich.MofNCompleteColumn()]
            if self._unit == "bytes":
                amount = [rich.TaskProgressColumn(), rich.TransferSpeedColumn()]
            name, detail = (rich.TextColumn(field, markup=False) for field in ("{task.description}", "{task.fields[text]}"))
            columns = [name, rich.BarColumn(), *amount, detail]
            self._bar = rich.Progress(*columns, rich.TimeRemainingColumn(), console=Console(stderr=True), transient=True)
            self._bar.start()
        if label not in self._tasks:
            self._tasks[label] = self._bar.add_task(label, total=total or None, text=text)
        self._bar.update(self._tasks[label], completed=done, total=total or None, text=text)

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()
