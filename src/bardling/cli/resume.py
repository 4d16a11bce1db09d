"""`bardling resume RUN`: go on with a run, or in a new one with the training of a nanoGPT or nano-gpt checkpoint."""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from bardling.cli.parse import parse
from bardling.cli.train import default_folder
from bardling.config import RunConfig
from bardling.errors import UserError


@dataclass(frozen=True)
class ResumeOptions:
    """Options of `bardling resume`."""

    out: Path | None = None
    """Folder of the run that goes on from another trainer's checkpoint; unset takes runs/NAME-DATE-PROCESS."""
    config: Annotated[RunConfig, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff] = field(default_factory=RunConfig)


def run(argv: Sequence[str]) -> None:
    """Parse, resume, and leave with the run's exit status."""
    folder, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("", argv)
    wants_help = any(word in ("-h", "--help") for word in rest)
    if not folder and not wants_help:
        raise UserError("bardling resume RUN [--section.field VALUE ...]: name the run's folder first")
    config, foreign = RunConfig(), bool(folder) and is_foreign(Path(folder))
    if foreign:
        config = foreign_config(Path(folder))
    elif folder:
        from bardling.checkpoint.runfolder import open_run

        config = open_run(Path(folder)).config()
    options = parse(
        ResumeOptions,
        rest,
        prog=f"bardling resume {folder or 'RUN'}",
        description="Go on with a run from its newest sound checkpoint, exactly. Options change its configuration; "
        "--train.steps may be raised.",
        default=ResumeOptions(config=config),
    )
    from bardling.train.run import resume, train  # here, so that help answers without importing torch

    if foreign:
        out = options.out or default_folder(folder)
        result = train(options.config, out, continue_from=folder)
    elif options.out is not None:
        raise UserError(f"--out {options.out}: a run is resumed where it is; leave it out")
    else:
        result = resume(folder, options.config)
    if result.exit_status:
        sys.exit(result.exit_status)


def is_foreign(path: Path) -> bool:
    """Whether `path` is another trainer's checkpoint: a file, or nanoGPT's output folder."""
    return path.is_file() or (path.is_dir() and not (path / "config.toml").is_file() and (path / "ckpt.pt").is_file())


def foreign_config(path: Path) -> RunConfig:
    """The run that another trainer's checkpoint belongs to, as far as its settings tell."""
    from bardling.checkpoint.load import load
    from bardling.interop.nano_gpt import run_config_from_nano_gpt
    from bardling.interop.nanogpt import run_config_from_nanogpt
    from bardling.interop.nanogpt_keys import TRAIN_DEFAULTS

    found = load(path).foreign
    if found is None:
        raise UserError(f"{path}: is no checkpoint of nanoGPT or nano-gpt")
    if found.origin == "nano-gpt":
        config, data = run_config_from_nano_gpt(found), found.settings.get("dataset_config", {})
        # Its shards, by folder and name; where they are missing, the error says so, and no other text is trained on.
        tokens = Path(str(data.get("dataset_dir", "dataset_cache"))) / str(data.get("dataset_name", "tinyshakespeare"))
        return dataclasses.replace(config, data=dataclasses.replace(config.data, source=str(tokens)))
    # What belongs to the machine or the command that wrote the file is left open, and so is what is not of its key's type.
    elsewhere = ("device", "dtype", "compile", "init_from", "eval_only")
    settings = {
        key: value
        for key, value in found.settings.items()
        if key in TRAIN_DEFAULTS and key not in elsewhere and isinstance(value, type(TRAIN_DEFAULTS[key]))
    }
    folder = path.absolute().parent
    config = run_config_from_nanogpt(settings, near=[folder, folder.parent]).config
    return dataclasses.replace(config, model=dataclasses.replace(found.config, vocab_multiple=config.model.vocab_multiple))
