"""Lines and tables that commands print.

Text is never markup, and control characters in it are escaped, so that names from outside appear as they are. Nothing is cut:
in a file or a pipe every row is one line; a terminal wraps text, and a table that needs more columns gets them.
"""

import sys
from collections.abc import Iterable
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from bardling.config import ModelConfig
from bardling.files.streams import escape_unprintable

_MOST_UNBROKEN = 24  # columns that a word keeps in one piece on a narrow terminal; longer ones, such as paths, are folded


def printable(text: str) -> str:
    """`text` on one line, as standard output can show it."""
    return escape_unprintable(text, getattr(sys.stdout, "encoding", None) or "utf-8").replace("\n", "\\n")


def styled(text: str, style: str = "bold") -> Text:
    return Text(printable(text), style)


class Rows(Table):
    """A table of plain text."""

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        super().add_row(*(printable(cell) if isinstance(cell, str) else cell for cell in cells), **options)

    def smallest_width(self) -> int:
        """Columns without which something would be cut."""
        total = 0
        for column in self.columns:
            column.overflow = "fold"
            texts = [cell.plain if isinstance(cell, Text) else str(cell) for cell in (column.header, *column.cells)]
            pieces = texts if column.no_wrap else [word[:_MOST_UNBROKEN] for text in texts for word in text.split()]
            total += max(map(cell_len, pieces), default=0)
        return total + 3 * len(self.columns)


def show(*parts: str | Text) -> None:
    """Print a line on standard output."""
    line = Text.assemble(*(printable(part) if isinstance(part, str) else part for part in parts))
    _console().print(line, soft_wrap=True)


def show_table(table: Rows) -> None:
    """Print a table on standard output."""
    console, needed = _console(), table.smallest_width()
    if not console.is_terminal:
        needed = console.measure(table, options=console.options.update(max_width=100_000)).maximum
    console.width = max(needed, console.width)
    console.print(table)


def _console() -> Console:
    return Console(markup=False, highlight=False, emoji=False)


def facts(title: str | None = None) -> Rows:
    """A table without header, for rows of a name, a right-aligned value and a dim note."""
    table = columns(title=title)
    table.show_header = False
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    return table


def columns(*names: str, title: str | None = None) -> Rows:
    """A table with a header: the first column holds text, the others right-aligned numbers."""
    table = Rows(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for number, name in enumerate(names):
        table.add_column(name, justify="right" if number else "left", no_wrap=number > 0)
    return table


def print_rows(rows: Iterable[tuple[str, str]], title: str | None = None) -> None:
    table = Rows(box=None, show_header=False, pad_edge=False, title=None if title is None else printable(title))
    table.title_justify = "left"
    table.add_column(no_wrap=True)
    table.add_column()
    for row in rows:
        table.add_row(*row)
    show_table(table)


def shape(model: ModelConfig) -> str:
    """`12 layers, 12 heads, width 768`."""
    return f"{model.n_layer} layers, {model.n_head} heads, width {model.n_embd}"
