"""`bardling prepare SOURCE --out DIR`: turn text into a dataset of tokens."""

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
    """'stdlib', a text file, a folder, a glob, or FILE.jsonl[:FIELD]."""
    out: Path
    """Folder to make; it must not exist."""
    tokenizer: str = "byte"
    """'byte', 'char', 'bpe:SIZE' (trained on the source), or the path of a tokenizer.json."""
    val_fraction: float = 0.05
    """Part of the text that is held out for validation."""


def run(argv: Sequence[str]) -> None:
    """Parse, prepare, and say what was made."""
    options = parse(PrepareOptions, argv, prog="bardling prepare", description="Turn text into a dataset of tokens.")
    config = DataConfig(source=options.source, tokenizer=options.tokenizer, val_fraction=options.val_fraction)
    from bardling.cli.info import show_dataset
    from bardling.data.prepare import prepare

    show_dataset(prepare(config.source, options.out, config.tokenizer, val_fraction=config.val_fraction))
