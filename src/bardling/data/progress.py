"""A progress bar on the terminal, shown only when the work takes more than two seconds."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

_PATIENCE = 2.0  # seconds


class Bar:
    """Called with (what is being done, bytes done, total or 0), it draws on standard error; silent where that is no terminal.

    Attributes:
        note: what else to say, behind the speed.
    """

    def __init__(self) -> None:
        self.note = ""
        self._shown = sys.stderr.isatty()
        self._begun = time.monotonic()
        self._bar: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, doing: str, done: int, total: int) -> None:
        if not self._shown or time.monotonic() - self._begun < _PATIENCE:
            return
        if self._bar is None:
            what = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
            columns = (*what, TransferSpeedColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
        if doing not in self._tasks:
            self._tasks[doing] = self._bar.add_task(doing, total=total or None, note=self.note)
        self._bar.update(self._tasks[doing], completed=done, total=total or None, note=self.note)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
