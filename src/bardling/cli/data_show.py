"""`bardling data show DATASET`: sequences exactly as the model sees them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from bardling.cli.parse import parse


@dataclass(frozen=True)
class ShowOptions:
    source: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="DATASET")]]
    """A prepared dataset, or a run."""


def run(argv: Sequence[str]) -> None:
    parse(ShowOptions, argv, prog="bardling data show", description="Print sequences as the model sees them.")
