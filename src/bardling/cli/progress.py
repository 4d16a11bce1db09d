"""A progress bar for work of unknown length: shown only once it has taken two seconds."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

PATIENCE = 2.0  # seconds


class Progress:
    """Call it with (done, total); on a terminal it draws a bar on standard error, elsewhere it is silent."""

    def __init__(self, label: str, *, show: bool = True) -> None:
        self._label, self._show = label, show and sys.stderr.isatty()
        self._start = time.perf_counter()
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None

    def __call__(self, done: int, total: int) -> None:
        if not self._show:
            return
        if self._bar is None and time.perf_counter() - self._start > PATIENCE:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = RichProgress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self._label, total=total)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
