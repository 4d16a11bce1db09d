"""CPU contention: a training step while another program competes for a core, by how long OpenMP threads busy-wait.

    python benchmarks/cpu_contention.py
    python benchmarks/cpu_contention.py --turns 300000 30000 --rounds 5
    python benchmarks/cpu_contention.py --tiny                              # seconds: to try the script

Method. One process per case (`workers.py`) trains the char-small model of `throughput.py`. In each round, all of them take
turns running a block of steps alone and then a block next to a program that only counts, started in a separate session as
from another terminal: Linux shares the cores between sessions first. The table shows medians over the rounds.
`bardling/distributed/openmp_spin.py` explains the spin count ("turns"); OpenMP's default is 300,000.
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
from tables import Table, publish, rounded, say, script
from throughput import SETTINGS, TINY
from workers import Spec, Worker

BUSY_LOOP = """
import os, sys
while os.getppid() == int(sys.argv[1]):  # as long as the parent lives
    sum(range(1000))
"""


@dataclass(frozen=True)
class Options:
    """Options of this benchmark."""

    turns: tuple[int, ...] = (300_000, 100_000, 30_000, 10_000, 3_000)
    """Spins of a waiting thread before it sleeps (GOMP_SPINCOUNT)."""
    rounds: int = 5
    """Rounds."""
    block: int = 20
    """Steps per block."""
    results: Path | None = None
    """Folder of the results file to append to; default: benchmarks/results."""
    tiny: bool = False
    """Measure one tiny model instead, to try the script."""


def main(argv: Sequence[str]) -> None:
    """Measure and write one table."""
    options = parse(
        Options, argv, prog="cpu_contention.py", description="Step time next to a busy program, by how threads wait."
    )
    for name, least in (("rounds", options.rounds), ("block", options.block), ("turns", min(options.turns, default=1))):
        if least < 1:
            raise UserError(f"--{name} {least}: must be at least 1")
    setting = TINY["tiny"] if options.tiny else SETTINGS["char-small"]
    spec = Spec("ours", model=setting.model, batch=setting.batch, lr=setting.lr, compile="off")
    alone: dict[int, list[float]] = {turns: [] for turns in options.turns}
    contended: dict[int, list[float]] = {turns: [] for turns in options.turns}
    with ExitStack() as stack:
        workers = {}
        for turns in options.turns:
            worker = stack.enter_context(Worker(spec, f"{turns} turns", {"GOMP_SPINCOUNT": str(turns)}))
            worker.steps(options.block)  # includes set-up
            workers[turns] = worker
        for number in range(options.rounds):
            for turns, worker in workers.items():
                alone[turns].append(worker.steps(options.block).seconds)
                with busy_program():
                    contended[turns].append(worker.steps(options.block).seconds)
            pairs = ((turns, alone[turns][-1] * 1e3, contended[turns][-1] * 1e3) for turns in workers)
            times = ", ".join(f"{turns:,}: {idle:.1f} and {busy:.0f}" for turns, idle, busy in pairs)
            say(f"round {number + 1} of {options.rounds}: ms per step alone and contended: {times}")
    rows = []
    for turns in options.turns:
        idle, busy = statistics.median(alone[turns]), statistics.median(contended[turns])
        rows.append((f"{turns:,}", rounded(idle * 1e3), rounded(busy * 1e3), f"{busy / idle:.1f}"))
    columns = ("turns", "alone, ms/step", "contended, ms/step", "x")
    table = Table(
        "Step time under contention", columns, rows, ("contended: next to one program of equal priority that only counts",)
    )
    publish("cpu_contention", [table], device=torch.device("cpu"), command=argv, folder=options.results)


@contextmanager
def busy_program() -> Iterator[None]:
    """Run a program that keeps a core busy."""
    busy = subprocess.Popen([sys.executable, "-c", BUSY_LOOP, str(os.getpid())], start_new_session=True)
    try:
        yield
    finally:
        busy.kill()
        busy.wait()


if __name__ == "__main__":
    script(main)
