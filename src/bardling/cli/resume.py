"""`bardling resume RUN`: go on with a run."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from bardling.cli.parse import parse
from bardling.config import RunConfig
from bardling.errors import UserError


@dataclass(frozen=True)
class ResumeOptions:
    """Options of `bardling resume`."""

    config: Annotated[RunConfig, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff] = field(default_factory=RunConfig)


def run(argv: Sequence[str]) -> None:
    """Parse, resume, and leave with the run's exit status."""
    folder, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("", argv)
    wants_help = any(word in ("-h", "--help") for word in rest)
    if not folder and not wants_help:
        raise UserError("bardling resume RUN [--section.field VALUE ...]: name the run's folder first")
    config = RunConfig()
    if folder:
        from bardling.checkpoint.runfolder import open_run

        config = open_run(Path(folder)).config()
    options = parse(
        ResumeOptions,
        rest,
        prog=f"bardling resume {folder or 'RUN'}",
        description="Go on with a run from its newest sound checkpoint, exactly. Options change its configuration; "
        "--train.steps may be raised.",
        default=ResumeOptions(config),
    )
    from bardling.train.run import resume  # here, so that help answers without importing torch

    result = resume(folder, options.config)
    if result.exit_status:
        sys.exit(result.exit_status)
