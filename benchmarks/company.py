"""Company: a training step on a CPU while another program wants one of its cores, by how long OpenMP's threads wait busily.

    python benchmarks/company.py
    python benchmarks/company.py --turns 300000 30000 --rounds 5
    python benchmarks/company.py --tiny                              # seconds: to try the script

Method. One process a case (`children.py`) trains the small model of `throughput.py`'s char-small. In each round all take turns
at a block of steps alone, then at one beside a program that only counts, started as from another terminal: Linux shares the
cores between sessions first. The table has the medians over the rounds.
`bardling/distributed/waiting.py` says what the turns are; 300,000 are OpenMP's own.
"""

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from bardling.cli.parse import parse
from bardling.errors import UserError
from children import Child, Spec
from tables import Table, publish, rounded, say, script
from throughput import SETTINGS, TINY

COUNTING = """
import os, sys
while os.getppid() == int(sys.argv[1]):  # for as long as who started it lives
    sum(range(1000))
"""


@dataclass(frozen=True)
class Options:
    """What to compare."""

    turns: tuple[int, ...] = (300_000, 100_000, 30_000, 10_000, 3_000)
    """Turns of a waiting thread before it sleeps."""
    rounds: int = 5
    """Rounds."""
    block: int = 20
    """Steps of a block."""
    results: Path | None = None
    """Folder to append the table in; unset takes benchmarks/results."""
    tiny: bool = False
    """Measure one tiny model instead, to try the script."""


def main(argv: Sequence[str]) -> None:
    """Measure, and write one table."""
    options = parse(Options, argv, prog="company.py", description="A step beside a busy program, by how threads wait.")
    for name, least in (("rounds", options.rounds), ("block", options.block), ("turns", min(options.turns, default=1))):
        if least < 1:
            raise UserError(f"--{name} {least}: must be at least 1")
    setting = TINY["tiny"] if options.tiny else SETTINGS["char-small"]
    spec = Spec("ours", model=setting.model, batch=setting.batch, lr=setting.lr, compile="off")
    alone: dict[int, list[float]] = {turns: [] for turns in options.turns}
    beside: dict[int, list[float]] = {turns: [] for turns in options.turns}
    with ExitStack() as stack:
        children = {}
        for turns in options.turns:
            child = stack.enter_context(Child(spec, f"{turns} turns", {"GOMP_SPINCOUNT": str(turns)}))
            child.steps(options.block)  # these pay for set-up
            children[turns] = child
        for number in range(options.rounds):
            for turns, child in children.items():
                alone[turns].append(child.steps(options.block).seconds)
                with company():
                    beside[turns].append(child.steps(options.block).seconds)
            pairs = ((turns, alone[turns][-1] * 1e3, beside[turns][-1] * 1e3) for turns in children)
            times = ", ".join(f"{turns:,}: {free:.1f} and {crowded:.0f}" for turns, free, crowded in pairs)
            say(f"round {number + 1} of {options.rounds}: ms a step alone and in company: {times}")
    rows = []
    for turns in options.turns:
        free, crowded = statistics.median(alone[turns]), statistics.median(beside[turns])
        rows.append((f"{turns:,}", rounded(free * 1e3), rounded(crowded * 1e3), f"{crowded / free:.1f}"))
    columns = ("turns", "alone, ms/step", "in company, ms/step", "x")
    table = Table("A step in company", columns, rows, ("company: one program that counts without end, of equal priority",))
    publish("company", [table], device=torch.device("cpu"), command=argv, folder=options.results)


@contextmanager
def company() -> Iterator[None]:
    """A program that keeps a core busy."""
    counting = subprocess.Popen([sys.executable, "-c", COUNTING, str(os.getpid())], start_new_session=True)
    try:
        yield
    finally:
        counting.kill()
        counting.wait()


if __name__ == "__main__":
    script(main)
