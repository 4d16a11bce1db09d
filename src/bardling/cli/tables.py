"""Tables that several commands print."""

from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table

from bardling.config import ModelConfig


def facts(title: str | None = None) -> Table:
    """A table without header, for rows of a name, a right-aligned value and a dim note."""
    table = columns(title=title)
    table.show_header = False
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    return table


def columns(*names: str, title: str | None = None) -> Table:
    """A table with a header: the first column holds text, the others right-aligned numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for number, name in enumerate(names):
        table.add_column(name, justify="right" if number else "left", no_wrap=number > 0)
    return table


def print_rows(rows: Iterable[tuple[str, str]], title: str | None = None) -> None:
    table = Table(box=None, show_header=False, pad_edge=False, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def shape(model: ModelConfig) -> str:
    """`12 layers, 12 heads, width 768`."""
    return f"{model.n_layer} layers, {model.n_head} heads, width {model.n_embd}"
