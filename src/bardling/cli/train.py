"""`bardling train RECIPE`: start a run."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bardling.cli.recipe import Config, given_settings, parse_recipe_command
from bardling.config import RunConfig
from bardling.config.recipes import validated


@dataclass(frozen=True)
class TrainOptions:
    out: Path | None = None
    """Run folder to create; default: runs/RECIPE-DATE-PROCESS."""
    config: Config = field(default_factory=RunConfig)


def run(argv: Sequence[str]) -> None:
    from bardling.cli import nanogpt
    from bardling.interop.nanogpt_keys import TRAIN_KEYS

    if nanogpt.is_nanogpt(argv, TRAIN_KEYS):
        nanogpt.train(argv)
        return
    recipe, rest, options = parse_recipe_command("train", TrainOptions, argv, "Train a model.")
    from bardling.training.run import train  # imports torch

    out = options.out or default_folder(recipe)
    config = validated(options.config)
    train(config, out, given=given_settings(config, recipe, rest))


def default_folder(name: str) -> Path:
    """A folder name that no other start uses, not even one in the same second."""
    return Path("runs") / f"{Path(name).stem}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
