"""`bardling verify RECIPE`: show on this machine that a recipe resumes, splits and compiles to the same losses."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import tyro

from bardling.cli.dial import turned
from bardling.cli.parse import parse
from bardling.cli.progress import Progress
from bardling.config import RunConfig
from bardling.configfile import load_recipe, recipe_names
from bardling.errors import UserError

if TYPE_CHECKING:
    from bardling.verify import VerifyResult


@dataclass(frozen=True)
class VerifyOptions:
    """Options of `bardling verify`."""

    seconds: float = 60.0
    """Time that it should take about; comparisons that would begin later are skipped."""
    config: Annotated[RunConfig, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff] = field(default_factory=RunConfig)


def run(argv: Sequence[str]) -> None:
    """Parse, compare, print; exit status 1 if a comparison fails."""
    recipe, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("", argv)
    names = ", ".join(recipe_names())
    if not recipe and not any(word in ("-h", "--help") for word in rest):
        raise UserError(f"bardling verify RECIPE [options]: name a recipe first: {names}, or a TOML file")
    options = parse(
        VerifyOptions,
        rest,
        prog=f"bardling verify {recipe or 'RECIPE'}",
        description=(
            "Show on this machine, with a recipe shrunk to about a minute, that training is exact: resumed, in other "
            f"micro-batches, by two processes, compiled, generating from a cache. RECIPE is a shipped name ({names}) or a TOML "
            "file; options override its values. Nothing is left behind."
        ),
        default=VerifyOptions(config=load_recipe(recipe, whole=not rest) if recipe else RunConfig()),
    )
    if options.seconds <= 0:
        raise UserError(f"--seconds {options.seconds}: must be above 0")
    from bardling.verify import verify  # here, so that help answers without importing torch

    config = turned(options.config, recipe, rest)
    with Progress("comparing") as progress:
        result = verify(config, seconds=options.seconds, progress=progress)
    show(result)
    if not result.passed:
        sys.exit(1)


def show(result: "VerifyResult") -> None:
    """Print a result as a table."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    console.print(f"{escape(result.device)}; precision {result.precision}")
    for note in result.notes:
        console.print(f"[yellow]shrunk:[/] {escape(note)}")
    console.print()
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("comparison", "", "difference", "tolerance", "time"):
        table.add_column(name, justify="right" if name in ("tolerance", "time") else "left")
    signs = {True: "[green]pass[/]", False: "[red]FAIL[/]", None: "[yellow]skipped[/]"}
    for check in result.checks:
        table.add_row(check.name, signs[check.passed], escape(check.figure), check.tolerance, f"{check.seconds:.1f} s")
    console.print(table)
