"""What a person sees while a run goes on.

On a terminal: a bar of the steps with the latest figures, which stays at the bottom while validations, samples and messages
scroll by above it. Anywhere else (a file, a pipe, a notebook's log): one plain line for each record. A reader that goes away
(`| head`) ends the display, never the training.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TextIO

import rich.console
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from bardling.monitor.format import count, duration, percent, size_bytes

PATIENCE = 2.0  # seconds of work without a sign of life that a person takes for normal
PLAIN_INTERVAL = 10.0  # seconds between lines of progress where nothing can be overwritten

# How each figure of a record is written; the order here is the order on the line.
_FIGURES: tuple[tuple[str, Callable[[float], str]], ...] = (
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
    """Shows records, messages and samples on a stream.

    Args:
        steps: the run's last step.
        first_step: the step it starts or resumes at.
        quiet: show nothing.
        stream: where to; standard output when absent.
        width: columns of the terminal, where they cannot be asked for.
    """

    def __init__(
        self, steps: int, first_step: int, quiet: bool = False, *, stream: TextIO | None = None, width: int | None = None
    ) -> None:
        self._steps = steps
        self._stream: TextIO | None = None if quiet else stream or sys.stdout
        self._work = _Work()
        self._live: Live | None = None
        screen = rich.console.Console(file=self._stream, width=width, highlight=False, markup=False, emoji=False)
        if self._stream is not None and screen.is_terminal and not (screen.is_dumb_terminal or screen.is_jupyter):
            self._display = _Display(steps, first_step)
            self._live = Live(self._display.renderable(), console=screen, refresh_per_second=4)
            with self._guard():
                self._live.start()

    def log(self, record: Mapping[str, object]) -> None:
        """Show a record's figures; those that are missing or no numbers are left out."""
        kind, step = str(record.get("kind", "")), record.get("step")
        figures = figures_of(record)
        best = ["best so far"] if record.get("best") is True else []
        if self._live is not None and kind == "train":
            self._display.update(step if isinstance(step, int) else 0, figures)
            with self._guard():
                self._live.update(self._display.renderable())
            return
        place = f"step {step:>{len(f'{self._steps:,}')},}/{self._steps:,}" if isinstance(step, int) else ""
        name = {"train": "", "val": "validation", "task": str(record.get("task", ""))}.get(kind, kind)
        line = "  ".join(part for part in [place, name, *figures.values(), *best] if part)
        self._print(Text(line, style="bold green" if best else "bold") if self._live else line)

    def note(self, text: str) -> None:
        """Show a message."""
        self._print(self._text(text))

    def sample(self, step: int, texts: Sequence[str]) -> None:
        """Show texts that the model wrote."""
        for number, text in enumerate(texts, 1):
            title = f"sample {number} of {len(texts)} at step {step:,}" if len(texts) > 1 else f"sample at step {step:,}"
            if self._live:
                self._print(Rule(title, align="left", style="dim"))
            else:
                self._print(f"--- {title} ---")
            self._print(self._text(text))
        if texts:
            self._print(Rule(style="dim") if self._live else "---")

    def planned(self, steps: int) -> None:
        """Take another last step: a deadline has moved it."""
        self._steps = steps
        if self._live is not None:
            self._display.planned(steps)

    def progress(self, label: str, done: int, total: int) -> None:
        """Show how far some work between steps has come, once it takes longer than a person waits without wondering."""
        seconds = self._work.advance(label, done, total)
        if self._live is not None:
            self._display.work(label if seconds is not None and done < total else "", done, total, self._work.left(done, total))
            with self._guard():
                self._live.update(self._display.renderable())
        elif seconds is not None and self._work.due(done, total):
            self._print(f"{label}: {done:,}/{total:,}, {duration(self._work.left(done, total))} left")

    def flush(self) -> None:
        """Show everything taken so far."""
        if self._stream is not None:
            with self._guard():
                self._stream.flush()

    def close(self) -> None:
        """Leave the last figures standing and give the terminal back; closing twice is no error."""
        if self._live is not None:
            with self._guard():
                self._live.stop()
        self.flush()
        self._live, self._stream = None, None

    def _print(self, what: str | Text | Rule) -> None:
        if self._stream is None:
            return
        with self._guard():
            if self._live is not None:
                self._live.console.print(what)
            else:
                self._stream.write(f"{what}\n")
                self._stream.flush()

    def _text(self, text: str) -> str | Text:
        shown = harmless(text, getattr(self._stream, "encoding", None) or "utf-8")
        return Text(shown) if self._live else shown

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """Go silent when nobody reads any more."""
        try:
            yield
        except BrokenPipeError:
            self._live, stream, self._stream = None, self._stream, None
            if stream is sys.stdout:  # or Python complains about it once more at its own end
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Display:
    """The part of the terminal that stays: the bar, and the latest figures under it."""

    def __init__(self, steps: int, first_step: int) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[place]}"),
            expand=True,
        )
        self._steps = steps
        self._task = self._bar.add_task("training", total=steps, completed=first_step, place=self._place(first_step, ""))
        self._work: TaskID | None = None
        self._figures = Text("waiting for the first step", style="dim")

    def _place(self, step: int, left: str) -> str:
        return f"{step:,}/{self._steps:,} steps" + (f", {left}" if left else "")

    def planned(self, steps: int) -> None:
        """Take another last step."""
        self._steps = steps
        self._bar.update(self._task, total=steps)

    def update(self, step: int, figures: Mapping[str, str]) -> None:
        """Take the figures of a step."""
        rest = dict(figures)
        self._bar.update(self._task, completed=step, place=self._place(step, rest.pop("seconds_left", "")))
        self._figures = Text("  ".join(rest.values()))

    def work(self, label: str, done: int, total: int, left: float) -> None:
        """Show a second bar for work between steps, or none without a label."""
        if self._work is not None and not label:
            self._bar.remove_task(self._work)
            self._work = None
        elif label:
            if self._work is None:
                self._work = self._bar.add_task(label, total=total, place="")
            self._bar.update(
                self._work, description=label, total=total, completed=done, place=f"{done:,}/{total:,}, {duration(left)} left"
            )

    def renderable(self) -> Table:
        """What is drawn now."""
        table = Table.grid(expand=True)
        table.add_row(self._bar.get_renderable())
        table.add_row(self._figures)
        return table


class _Work:
    """Times the work between steps, and decides when it is worth a word."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._key: tuple[str, int] | None = None
        self._begin = self._said = 0.0
        self._from = self._last = 0

    def advance(self, label: str, done: int, total: int) -> float | None:
        """Seconds since the work began, or None while that is too short to speak of."""
        if self._key != (label, total) or done < self._last:
            self._key, self._begin, self._from = (label, total), self._clock(), done
            self._said = self._begin
        self._last = done
        if done >= total:
            self._key = None
        seconds = self._clock() - self._begin
        return seconds if seconds >= PATIENCE else None

    def left(self, done: int, total: int) -> float:
        """Seconds that the rest takes at the speed so far."""
        progress = done - self._from
        return (self._clock() - self._begin) / progress * (total - done) if progress > 0 else float("inf")

    def due(self, done: int, total: int) -> bool:
        """Whether a plain line is due: soon after the start, then seldom, never at the end."""
        now = self._clock()
        if done >= total or (self._said > self._begin and now - self._said < PLAIN_INTERVAL):
            return False
        self._said = now
        return True


def figures_of(record: Mapping[str, object]) -> dict[str, str]:
    """A record's known figures by field, each with its name or unit."""
    found = {}
    for name, write in _FIGURES:
        value = record.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = write(value)
    return found


def harmless(text: str, encoding: str = "utf-8") -> str:
    """`text` with spelled out what would command the terminal (what a model wrote must not) or cannot be encoded for it."""
    shown = "".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown.encode(encoding, "backslashreplace").decode(encoding)
