"""`bardling verify RECIPE`: check on this machine that resumed, split and compiled training give the same losses."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from bardling.cli.recipe import Config, parse_recipe_command, with_depth
from bardling.cli.tables import columns
from bardling.config import RunConfig
from bardling.config.checks import INF
from bardling.errors import UserError
from bardling.monitor.progress import ProgressBar

if TYPE_CHECKING:
    from bardling.tools.verify import VerifyResult


@dataclass(frozen=True)
class VerifyOptions:
    seconds: float = 60.0
    """Approximate time limit (seconds): checks that would start later are skipped."""
    config: Config = field(default_factory=RunConfig)


def run(argv: Sequence[str]) -> None:
    recipe, rest, options = parse_recipe_command(
        "verify",
        VerifyOptions,
        argv,
        "Check on this machine, with a recipe shrunk to about a minute, that training gives the same losses when resumed, with "
        "other micro-batches, with two processes and compiled, and that a KV cache does not change greedy generation. Nothing "
        "is saved.",
    )
    if not 0 < options.seconds < INF:
        raise UserError(f"--seconds {options.seconds:g}: must be above 0 and finite")
    from bardling.tools.verify import verify  # imports torch

    config = with_depth(options.config, recipe, rest)
    with ProgressBar("verifying") as progress:
        result = verify(config, seconds=options.seconds, progress=progress)
    show(result)
    if not result.passed:
        sys.exit(1)


def show(result: "VerifyResult") -> None:
    console = Console(highlight=False)
    console.print(f"{escape(result.device)}; precision {result.precision}")
    for note in result.notes:
        console.print(f"[yellow]shrunk:[/] {escape(note)}")
    console.print()
    table = columns("check", "", "difference", "tolerance", "time")
    table.columns[1].justify = table.columns[2].justify = "left"
    table.columns[2].no_wrap = False
    signs = {True: "[green]pass[/]", False: "[red]FAIL[/]", None: "[yellow]skipped[/]"}
    for check in result.checks:
        table.add_row(check.name, signs[check.passed], escape(check.result), check.tolerance, f"{check.seconds:.1f} s")
    console.print(table)
