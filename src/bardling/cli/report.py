"""`bardling report RUN...`: draw the training curve of runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from bardling.cli.parse import parse


@dataclass(frozen=True)
class ReportOptions:
    """Options of `bardling report`."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, drawn in one figure."""
    out: Path | None = None
    """Picture to write (.png, .svg, .pdf); unset takes curve.png in the first run's folder. A picture that this command
    has drawn before is replaced; any other file is left as it is, and the command says so."""
    compressors: bool = False
    """Also show what gzip -9 and xz -9 reach on the first run's held-out text."""


def run(argv: Sequence[str]) -> None:
    """Parse, draw, and say where the picture is."""
    options = parse(ReportOptions, argv, prog="bardling report", description="Draw the training curve of runs.")
    from bardling.errors import UserError
    from bardling.report.curve import check_picture, draw_curves

    if not options.runs:
        raise UserError("bardling report RUN [RUN ...]: name the folder of at least one run")
    out = options.out or options.runs[0] / "curve.png"
    check_picture(out)  # before anything that takes time
    marks = {}
    if options.compressors:
        from bardling.checkpoint.runfolder import open_run
        from bardling.cli.eval import compressors
        from bardling.interop.dataset import open_data

        marks = compressors(open_data(open_run(options.runs[0]).config().data))
    draw_curves(options.runs, out, marks=marks)
    print(out)
