"""`bardling train RECIPE`: start a run."""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from bardling.cli.dial import turned
from bardling.cli.parse import parse
from bardling.config import RunConfig
from bardling.configfile import load_recipe, recipe_names
from bardling.errors import UserError


@dataclass(frozen=True)
class TrainOptions:
    """Options of `bardling train`."""

    out: Path | None = None
    """Folder of the run; unset takes runs/RECIPE-DATE-PROCESS."""
    config: Annotated[RunConfig, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff] = field(default_factory=RunConfig)


def run(argv: Sequence[str]) -> None:
    """Parse, train, and leave with the run's exit status."""
    from bardling.cli import nanogpt
    from bardling.interop.nanogpt_keys import TRAIN_KEYS

    if nanogpt.is_nanogpt(argv, TRAIN_KEYS):
        nanogpt.train(argv)
        return
    recipe, options = parse_recipe_and_options("train", argv, "Train a model by a recipe.")
    from bardling.train.run import train  # here, so that help answers without importing torch

    out = options.out or default_folder(recipe)
    result = train(turned(options.config, recipe, argv[1:]), out)
    if result.exit_status:
        sys.exit(result.exit_status)


def default_folder(name: str) -> Path:
    """A folder for a run that nobody named, which no other start takes, not in the same second either."""
    return Path("runs") / f"{Path(name).stem}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


def parse_recipe_and_options(verb: str, argv: Sequence[str], what: str) -> tuple[str, TrainOptions]:
    """Parse `RECIPE [options]`: the recipe's values are the defaults that the options override."""
    recipe, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("", argv)
    names = ", ".join(recipe_names())
    if not recipe and not any(word in ("-h", "--help") for word in rest):
        raise UserError(f"bardling {verb} RECIPE [--section.field VALUE ...]: name a recipe first: {names}, or a TOML file")
    config = load_recipe(recipe, whole=not rest) if recipe else RunConfig()
    options = parse(
        TrainOptions,
        rest,
        prog=f"bardling {verb} {recipe or 'RECIPE'}",
        description=f"{what} RECIPE is a shipped name ({names}) or a TOML file; options override its values.",
        default=TrainOptions(config=config),
    )
    return recipe, options
