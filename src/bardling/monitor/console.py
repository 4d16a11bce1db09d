"""The terminal display of a run.

On a terminal: a progress bar and the latest metrics at the bottom, while validation results, samples and messages scroll above.
Elsewhere (a file, a pipe, a notebook): one plain line per record. If the stream fails (the reader of a pipe exits, the terminal
is closed, the device is full), the display stops and training continues.
"""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TextIO, cast

import rich.console
from rich.progress import BarColumn, Progress, TextColumn
from rich.rule import Rule
from rich.table import Column
from rich.text import Text

from bardling.files.streams import Lasting, escape_unprintable
from bardling.monitor.format import count, duration, percent, size_bytes
from bardling.monitor.progress import PATIENCE

PLAIN_INTERVAL = 10.0  # seconds between progress lines where there is no terminal

# How each metric is displayed, in the order of the line.
_FORMATS: tuple[tuple[str, Callable[[float], str]], ...] = (
    ("loss", lambda value: f"loss {value:.4f}"),
    ("bits_per_byte", lambda value: f"{value:.4f} bits/byte"),
    ("perplexity", lambda value: f"perplexity {value:.4g}"),
    ("accuracy", lambda value: f"accuracy {percent(value)}"),
    ("accuracy_norm", lambda value: f"normalised {percent(value)}"),
    ("lr", lambda value: f"lr {value:.2e}"),
    ("grad_norm", lambda value: f"grad norm {value:.3g}"),
    ("tokens_per_second", lambda value: f"{count(value)} tok/s"),
    ("mfu", lambda value: f"MFU {percent(value)}"),
    ("epoch", lambda value: f"epoch {value:.2f}"),
    ("memory_bytes", size_bytes),
    ("seconds_left", lambda value: f"{duration(value)} left"),
)


class Console:
    """A sink that shows records, messages and samples.

    Args:
        steps: the run's last step.
        first_step: the step at which it starts or resumes.
        stream: destination; default: standard output.
        width: terminal width in columns, if it cannot be detected.
    """

    def __init__(self, steps: int, first_step: int, *, stream: TextIO | None = None, width: int | None = None) -> None:
        self._steps = steps
        target = stream or sys.stdout
        self._stream: Lasting | None = None if target is None else Lasting(target)
        self.failure: Exception | None = None  # why the display has stopped
        self._clock = time.monotonic
        self._work: tuple[str, int] | None = None  # the work between steps: label and total
        self._begin = self._last_line = 0.0
        self._first = self._done = 0
        self._display: _Display | None = None
        screen = rich.console.Console(file=cast(TextIO, self._stream), width=width, highlight=False, markup=False, emoji=False)
        if screen.is_terminal and not (screen.is_dumb_terminal or screen.is_jupyter):
            self._display = _Display(screen, steps, first_step)
            with self._guard():
                self._display.start()

    def log(self, record: Mapping[str, object]) -> None:
        """Show the metrics of a record; values that are missing or not numbers are left out."""
        kind, step = str(record.get("kind", "")), record.get("step")
        metrics = format_metrics(record)
        best = ["best so far"] if record.get("best") is True else []
        if self._display is not None and kind == "train" and isinstance(step, int):
            left = f", {metrics.pop('seconds_left')}" if "seconds_left" in metrics else ""
            self._display.update(self._display.training, completed=step, rest=f" steps{left}")
            self._display.metrics = Text("  ".join(metrics.values()))
            return
        place = f"step {step:>{len(f'{self._steps:,}')},}/{self._steps:,}" if isinstance(step, int) else ""
        name = {"train": "", "val": "validation", "task": str(record.get("task", ""))}.get(kind, kind)
        line = "  ".join(part for part in [place, name, *metrics.values(), *best] if part)
        line = escape_unprintable(line, self._encoding)
        self._print(Text(line, style="bold green" if best else "bold") if self._display else line)

    def note(self, text: str) -> None:
        self._print(self._text(text))

    def sample(self, step: int, prompt: str, texts: Sequence[str]) -> None:
        for number, text in enumerate(texts, 1):
            title = f"sample {number} of {len(texts)} at step {step:,}" if len(texts) > 1 else f"sample at step {step:,}"
            self._print(Rule(title, align="left", style="dim") if self._display else f"--- {title} ---")
            self._print(self._text(prompt + text))
        if texts:
            self._print(Rule(style="dim") if self._display else "---")

    def set_steps(self, steps: int) -> None:
        """Change the last step: a deadline has moved it."""
        self._steps = steps
        if self._display is not None:
            self._display.update(self._display.training, total=steps)

    def progress(self, label: str, done: int, total: int) -> None:
        """Show the progress of work between steps, once it has taken `PATIENCE` seconds and until it is done."""
        now = self._clock()
        if self._work != (label, total) or done < self._done:
            self._begin, self._first, self._last_line = now, done, -math.inf
        self._work, self._done = (label, total) if done < total else None, done
        elapsed, progress = now - self._begin, done - self._first
        shown = done < total and elapsed >= PATIENCE
        left = f", {duration(elapsed / progress * (total - done) if progress > 0 else math.inf)} left"
        if self._display is not None:
            bar = self._display.work
            self._display.update(bar, visible=shown, description=label, total=total, completed=done, rest=left)
        elif shown and now - self._last_line >= PLAIN_INTERVAL:
            self._last_line = now
            self._print(f"{label}: {done:,}/{total:,}{left}")

    def flush(self) -> None:
        if self._stream is not None:
            with self._guard():
                self._stream.flush()

    def close(self) -> None:
        """Leave the last metrics on screen and restore the terminal; closing twice is not an error."""
        if self._display is not None:
            with self._guard():
                self._display.stop()
        self.flush()
        self._display, self._stream = None, None

    def _print(self, item: str | Text | Rule) -> None:
        if self._stream is None:
            return
        with self._guard():
            if self._display is not None:
                self._display.console.print(item)
            else:
                self._stream.write(f"{item}\n")
                self._stream.flush()

    @property
    def _encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "utf-8"

    def _text(self, text: str) -> str | Text:
        shown = escape_unprintable(text, self._encoding)
        return Text(shown) if self._display else shown

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """Stop displaying once the stream has failed."""
        yield
        if self._stream is not None and self._stream.failure is not None:
            self.failure, display, self._display = self._stream.failure, self._display, None
            if display is not None:
                display.stop()
            self._stream = None


class _Display(Progress):
    """The part of the terminal that stays in place: the progress bars, and the latest metrics below them."""

    def __init__(self, screen: rich.console.Console, steps: int, first_step: int) -> None:
        self.metrics = Text("waiting for the first step", style="dim")
        name, place = (
            TextColumn(text, markup=False, table_column=Column(overflow="fold"))
            for text in ("{task.description}", "{task.completed:,}/{task.total:,}{task.fields[rest]}")
        )
        columns = (name, BarColumn(bar_width=None), place)
        super().__init__(*columns, expand=True, console=screen, refresh_per_second=4)
        self.training = self.add_task("training", total=steps, completed=first_step, rest=" steps")
        self.work = self.add_task("", visible=False, rest="")  # between steps

    def get_renderables(self) -> Iterator[rich.console.RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield self.metrics


def format_metrics(record: Mapping[str, object]) -> dict[str, str]:
    """The metrics of a record as text with name or unit, by field."""
    values = [(name, write, record.get(name)) for name, write in _FORMATS]
    if record.get("kind") == "task":  # whose metrics depend on the kind of task
        known = ("step", "items", "stderr", *(name for name, _ in _FORMATS))
        others = [name for name in record if name not in known and not name.endswith("_stderr")]
        values += [(name, f"{name} {{:.4g}}".format, record[name]) for name in others]
    else:  # of the sources of a mixture
        values += [(name, f"{name.partition('/')[2]} {{:.4f}}".format, record[name]) for name in record if "loss/" in name]
    return {
        name: write(value) for name, write, value in values if isinstance(value, int | float) and not isinstance(value, bool)
    }
