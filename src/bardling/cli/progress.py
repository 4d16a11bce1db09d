"""A progress bar for work of unknown length: shown only once it has taken two seconds."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from bardling.monitor.format import duration

PATIENCE = 2.0  # seconds before anything is shown
PLAIN_INTERVAL = 15.0  # seconds between lines where there is no terminal


class Progress:
    """Call it with (done, total); on a terminal it draws a bar on standard error, elsewhere it writes a line now and then."""

    def __init__(self, label: str, *, unit: str = "", show: bool = True) -> None:
        self._label, self._unit, self._show = label, unit, show
        self._start = self._said = time.perf_counter()
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None

    def __call__(self, done: int, total: int) -> None:
        now = time.perf_counter()
        if not self._show or now - self._start < PATIENCE:
            return
        speed = done / (now - self._start)
        rate = f"{speed:.1f} {self._unit}/s" if self._unit else ""
        if not sys.stderr.isatty():
            if now - self._said > PLAIN_INTERVAL and done < total:
                self._said = now
                left = f", {duration((total - done) / speed)} left" if speed else ""
                print(f"{self._label}: {done:,} of {total:,}{', ' + rate if rate else ''}{left}", file=sys.stderr, flush=True)
            return
        if self._bar is None or self._task is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
            )
            self._bar = RichProgress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self._label, total=total, rate=rate)
        self._bar.update(self._task, completed=done, total=total, rate=rate)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
