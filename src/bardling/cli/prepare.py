"""`bardling prepare SOURCE --out DIR`: turn text into a dataset of tokens."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from bardling.cli.parse import parse
from bardling.config import DataConfig


@dataclass(frozen=True)
class PrepareOptions:
    """Options of `bardling prepare`."""

    source: tyro.conf.Positional[str]
    """'stdlib', 'shakespeare', 'shakespeare-char', 'openwebtext', 'fineweb-edu', hf:NAME[:CONFIG][:SPLIT][:FIELD], a text
    file, a folder, a glob, or FILE.jsonl[:FIELD]."""
    out: Path
    """Folder to make; it must not exist."""
    tokenizer: str | None = None
    """'byte', 'char', 'bpe:SIZE' (trained on the source), 'gpt2', or the path of a tokenizer.json; unset takes what is usual
    for a dataset by name, else 'byte'."""
    val_fraction: float | None = None
    """Part of the text that is held out for validation; unset takes what is usual for a dataset by name, else 0.05."""
    workers: int | None = None
    """Processes that tokenise; unset takes one per core where that pays. The dataset is the same for every number."""


def run(argv: Sequence[str]) -> None:
    """Parse, prepare, and say what was made."""
    options = parse(PrepareOptions, argv, prog="bardling prepare", description="Turn text into a dataset of tokens.")
    from bardling.cli.info import show_dataset
    from bardling.data.datasets import DEFAULTS
    from bardling.data.journal import work_folder
    from bardling.data.prepare import prepare

    tokenizer, val_fraction = DEFAULTS.get(options.source, (DataConfig.tokenizer, DataConfig.val_fraction))
    config = DataConfig(
        source=options.source,
        tokenizer=tokenizer if options.tokenizer is None else options.tokenizer,
        val_fraction=val_fraction if options.val_fraction is None else options.val_fraction,
    )
    try:
        dataset = prepare(
            config.source, options.out, config.tokenizer, val_fraction=config.val_fraction, workers=options.workers
        )
    except KeyboardInterrupt:
        if work_folder(options.out).exists():
            print(f"what was done is kept in {work_folder(options.out)}: the same command goes on with it", file=sys.stderr)
        raise
    show_dataset(dataset)
