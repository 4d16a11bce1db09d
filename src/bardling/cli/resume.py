"""`bardling resume RUN`: continue a run, or continue training a nanoGPT or nano-gpt checkpoint in a new run."""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bardling.cli.parse import parse
from bardling.cli.recipe import Config, split_first, wants_help
from bardling.cli.train import default_folder
from bardling.config import RunConfig
from bardling.errors import UserError
from bardling.files.paths import expand_home


@dataclass(frozen=True)
class ResumeOptions:
    out: Path | None = None
    """Run folder to create when continuing a nanoGPT or nano-gpt checkpoint; default: runs/NAME-DATE-PROCESS."""
    config: Config = field(default_factory=RunConfig)


def run(argv: Sequence[str]) -> None:
    folder, rest = split_first(argv)
    if not folder and not wants_help(rest):
        raise UserError("resume: no run given; name a run folder")
    folder = expand_home(folder)
    config, foreign = RunConfig(), bool(folder) and is_foreign(Path(folder))
    if foreign:
        config = foreign_config(Path(folder))
    elif folder:
        config = recorded_config(Path(folder))
    options = parse(
        ResumeOptions,
        rest,
        prog=f"bardling resume {folder or 'RUN'}",
        description="Continue a run exactly, from its latest valid checkpoint. Options change its configuration: for example, "
        "--train.steps can be raised.",
        default=ResumeOptions(config=config),
    )
    from bardling.training.run import resume, train  # imports torch

    if foreign:
        out = options.out or default_folder(folder)
        train(options.config, out, continue_from=folder)
    elif options.out is not None:
        raise UserError(f"--out {options.out}: a run is resumed in its own folder: remove this option")
    else:
        resume(folder, options.config)


def recorded_config(path: Path) -> RunConfig:
    """The configuration of a run, which one of several processes may not see: they then refuse together."""
    from bardling.checkpoint.run_folder import open_run

    try:
        return open_run(path).config()
    except UserError:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            from bardling.training.run import resume

            resume(path)
        raise


def is_foreign(path: Path) -> bool:
    """Whether `path` is a checkpoint of another trainer: a file, or a nanoGPT output folder."""
    return path.is_file() or (path.is_dir() and not (path / "config.toml").is_file() and (path / "ckpt.pt").is_file())


def foreign_config(path: Path) -> RunConfig:
    """The configuration of the run that wrote another trainer's checkpoint, as far as the checkpoint records it."""
    from bardling.checkpoint.load import load
    from bardling.interop.nano_gpt import run_config_from_nano_gpt
    from bardling.interop.nanogpt import run_config_from_nanogpt
    from bardling.interop.nanogpt_keys import TRAIN_DEFAULTS

    found = load(path).imported
    if found is None:
        raise UserError(f"{path}: is not a nanoGPT or nano-gpt checkpoint; name a run folder or a checkpoint file")
    if found.origin == "nano-gpt":
        config, data = run_config_from_nano_gpt(found), found.settings.get("dataset_config", {})
        # The path of its shards. If they are missing, the run fails with an error instead of training on other text.
        tokens = Path(str(data.get("dataset_dir", "dataset_cache"))) / str(data.get("dataset_name", "tinyshakespeare"))
        return dataclasses.replace(config, data=dataclasses.replace(config.data, source=str(tokens)))
    # Settings specific to the original machine or command are dropped, and so are values of the wrong type.
    elsewhere = ("device", "dtype", "compile", "init_from", "eval_only")
    settings = {
        key: value
        for key, value in found.settings.items()
        if key in TRAIN_DEFAULTS and key not in elsewhere and isinstance(value, type(TRAIN_DEFAULTS[key]))
    }
    folder = path.absolute().parent
    config = run_config_from_nanogpt(settings, data_parents=[folder, folder.parent]).config
    return dataclasses.replace(config, model=dataclasses.replace(found.config, vocab_multiple=config.model.vocab_multiple))
