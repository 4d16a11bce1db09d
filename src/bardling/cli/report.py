"""`bardling report RUN...`: draw training curves."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from bardling.cli.parse import parse


@dataclass(frozen=True)
class ReportOptions:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, drawn in one figure."""
    out: Path | None = None
    """Image to write (.png, .svg, .pdf); default: curve.png in the first run's folder. Replaces an image that this command
    drew earlier, and refuses to overwrite any other file."""
    compressors: bool = False
    """Also draw lines for what gzip -9 and xz -9 reach on the first run's validation text."""


def run(argv: Sequence[str]) -> None:
    options = parse(ReportOptions, argv, prog="bardling report", description="Draw the training curves of one or more runs.")
    from bardling.errors import UserError
    from bardling.report.curve import check_image_path, draw_curves

    if not options.runs:
        raise UserError("report: no run given; name at least one run folder")
    out = options.out or options.runs[0] / "curve.png"
    check_image_path(out)  # before anything slow
    marks = {}
    if options.compressors:
        from bardling.checkpoint.run_folder import open_run
        from bardling.data.tokens.dataset import open_recorded
        from bardling.report.compression import compressor_bits_per_byte

        run = open_run(options.runs[0])
        data = run.trained_config().data
        marks = compressor_bits_per_byte(open_recorded(data, run.dataset_record(), run.path, "omit --compressors"))
    draw_curves(options.runs, out, marks=marks)
    print(out)
