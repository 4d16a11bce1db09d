"""`bardling data merge PART... --out DIR`: join the parts that `bardling prepare --shard I/N` has made."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bardling.cli.parse import parse


@dataclass(frozen=True)
class MergeOptions:
    parts: tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="PART...")]]
    """Folders of all parts, in any order. They are checked and left as they are."""
    out: Path
    """Folder to create; it must not exist. It is equal to what a single `bardling prepare` would have made."""


def run(argv: Sequence[str]) -> None:
    options = parse(MergeOptions, argv, prog="bardling data merge", description="Join the parts of a dataset.")
    from bardling.cli.info import show_dataset
    from bardling.data.tokens.merge import merge
    from bardling.monitor.progress import ProgressBar

    with ProgressBar(unit="tokens") as bar:
        dataset = merge(options.parts, options.out, bar.update)
    show_dataset(dataset)
