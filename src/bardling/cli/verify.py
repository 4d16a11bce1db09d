"""`bardling verify RECIPE`: check on this machine that resumed, split and compiled training give the same losses."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bardling.cli.recipe import Config, parse_recipe_command, with_depth
from bardling.cli.tables import columns, show, show_table, styled
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
    show_result(result)
    if not result.passed:
        sys.exit(1)


def show_result(result: "VerifyResult") -> None:
    show(f"{result.device}; precision {result.precision}")
    for note in result.notes:
        show(styled("shrunk:", "yellow"), f" {note}")
    show()
    table = columns("check", "", "difference", "tolerance", "time")
    table.columns[1].justify = table.columns[2].justify = "left"
    table.columns[0].no_wrap, table.columns[2].no_wrap = True, False
    signs = {True: styled("pass", "green"), False: styled("FAIL", "red"), None: styled("skipped", "yellow")}
    for check in result.checks:
        table.add_row(check.name, signs[check.passed], check.result, check.tolerance, f"{check.seconds:.1f} s")
    show_table(table)
