"""`bardling data check PATH`: describe a source or dataset, and list what should not be in it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from bardling.cli.parse import parse


@dataclass(frozen=True)
class CheckOptions:
    source: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="PATH")]]
    """What `data.source` accepts: a text file, a folder, a glob, FILE.jsonl[:FIELD], a name, or a prepared dataset."""


def run(argv: Sequence[str]) -> None:
    parse(CheckOptions, argv, prog="bardling data check", description="Describe training data and list what is wrong with it.")
