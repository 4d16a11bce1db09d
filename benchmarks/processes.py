"""Processes: training speed of two processes with one thread each, compared with one process with two threads.

    python benchmarks/processes.py                # one process, DDP and FSDP2
    python benchmarks/processes.py --plain        # also FSDP2 in plain PyTorch code
    python benchmarks/processes.py --tiny         # seconds: to try the script

Method. Each side is a worker (`workers.py`) that trains the model of the recipe shakespeare-char (6 layers, width 384, context
256) on a CPU, in float32 without compilation, from the same weights on the same batches: a step of two processes reads the same
sequences as that of one, half of them each. All threads together are as many as the processes of a side (`--processes`), so
every side uses the same cores. One pass per step, so gradients and weights are exchanged after as little compute as possible.

First, each side takes 20 steps, whose losses are compared. Then come rounds in which every side runs a block of steps, in
rotating order; a ratio compares two blocks of one round, and the table shows the median of the ratios with minimum and maximum.
`plain` (`process_sides.py`) is FSDP2 code with the same sharding, without the library.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bardling.cli.parse import parse
from bardling.distributed import huge_pages, openmp_spin
from bardling.distributed.device import choose_device
from bardling.errors import UserError
from tables import Table, publish, rounded, say, script, spread
from workers import Spec, Worker, closest_curves

SIDES_PROGRAM = Path(__file__).resolve().with_name("process_sides.py")
CURVE_STEPS = 20
TOLERANCE = {"one": 1e-5, "plain": 1e-4}
"""Largest relative difference of the losses of the first steps from those of one process, and from the plain code's."""
_STYLE: dict[str, Any] = {"bias": False, "gelu": "erf"}
MODEL = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 65, **_STYLE}
TINY_MODEL = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 65, **_STYLE}


@dataclass(frozen=True)
class Options:
    """Options of this benchmark."""

    plain: bool = False
    """Measure FSDP2 in plain PyTorch code too."""
    processes: int = 2
    """Processes of a side with several; the single process has as many threads."""
    reshard: bool = False
    """With FSDP2: free a block's weights after its forward pass, as a run does if they do not fit in memory."""
    batch: int = 16
    """Sequences per step, of all processes together."""
    rounds: int = 8
    """Rounds in which each side runs a block of steps."""
    block: int = 3
    """Steps per side and round."""
    results: Path | None = None
    """Folder of the results file to append to; default: benchmarks/results."""
    tiny: bool = False
    """Train a tiny model, to try the script."""


@dataclass
class _Side:
    """Measurements of one side."""

    worker: Worker
    curve: tuple[float, ...]
    blocks: list[float] = field(default_factory=list)  # seconds per step, for each round


def main(argv: Sequence[str]) -> None:
    """Measure all sides in turn and write one table."""
    options = parse(Options, argv, prog="processes.py", description="Training speed of several processes, compared with one.")
    for name, low in (("processes", 2), ("batch", 1), ("rounds", 1), ("block", 1)):
        if getattr(options, name) < low:
            raise UserError(f"--{name} {getattr(options, name)}: must be at least {low}")
    if options.batch % options.processes:
        raise UserError(f"--batch {options.batch}: must be a multiple of --processes {options.processes}")
    with ExitStack() as stack:
        sides: dict[str, _Side] = {}
        for name, spec in sides_of(options).items():
            say(f"{name}: set-up and the first {CURVE_STEPS} steps")
            worker = stack.enter_context(Worker(spec, name, _environment(spec, options), program=SIDES_PROGRAM))
            sides[name] = _Side(worker, worker.steps(CURVE_STEPS).losses)
        order = list(sides)
        for turn in range(options.rounds):
            for name in order:
                sides[name].blocks.append(sides[name].worker.steps(options.block).seconds)
            times = ", ".join(f"{name} {side.blocks[-1] * 1e3:.0f}" for name, side in sides.items())
            say(f"round {turn + 1} of {options.rounds}: ms per step: {times}")
            order = [*order[1:], order[0]]
    columns = ("side", "processes", "threads each", "ms/step", "tokens/s", "speed relative to one process", "loss differs by")
    if options.plain:
        columns = (*columns, "speed relative to plain", "loss differs by")
    title = f"{options.processes} processes and one, {'a tiny model' if options.tiny else '6 layers of width 384'}"
    table = Table(title, columns, [_row(name, sides, options) for name in sides], _notes(sides, options))
    publish("processes", [table], device=choose_device("cpu"), command=argv, folder=options.results)


def sides_of(options: Options) -> dict[str, Spec]:
    """The sides to measure, one process first."""
    one = Spec("ours", TINY_MODEL if options.tiny else MODEL, options.batch, precision="float32", compile="off", lr=3e-4)
    found = {"one": one, "ddp": replace(one, processes=options.processes)}
    found["fsdp"] = replace(found["ddp"], layout="fsdp", reshard=options.reshard)
    return found | ({"plain": replace(found["fsdp"], kind="plain")} if options.plain else {})


def _environment(spec: Spec, options: Options) -> dict[str, str]:
    """The threads of a side's processes, and what the `bardling` command sets."""
    threads = options.processes // spec.processes
    spin = str(openmp_spin.SPIN_COUNT)
    return {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": spin, huge_pages.VARIABLE: "1"}


def _ratios(side: _Side, other: _Side) -> str:
    """How many times as fast `side` is as the other one, in each round."""
    return spread([theirs / own for own, theirs in zip(side.blocks, other.blocks, strict=True)])


def _row(name: str, sides: dict[str, _Side], options: Options) -> tuple[str, ...]:
    side, spec = sides[name], sides[name].worker.spec
    seconds = sorted(side.blocks)[len(side.blocks) // 2]
    labels = {"one": "one process", "ddp": "DDP", "fsdp": "FSDP2", "plain": "FSDP2, plain code"}
    cells = (labels[name], str(spec.processes), str(options.processes // spec.processes), rounded(seconds * 1e3))
    cells = (*cells, f"{spec.tokens_per_step / seconds:,.0f}")
    for other in ("one", "plain") if options.plain else ("one",):
        same = name == other
        cells = (*cells, "1" if same else _ratios(side, sides[other]), "" if same else f"{_difference(side, sides[other]):.0e}")
    return cells


def _difference(side: _Side, other: _Side) -> float:
    """Largest difference of the losses of the first steps, relative to the smallest of the other's."""
    return closest_curves(side.curve, other.curve) / min(other.curve)


def _notes(sides: dict[str, _Side], options: Options) -> list[str]:
    curve = sides["one"].curve
    notes = [
        f"batch {options.batch}, one pass per step, {options.block} steps per block, {options.rounds} rounds; float32, eager; "
        f"FSDP2 gathers the weights of a block {'for each of its passes' if options.reshard else 'once per step'}",
        f"losses of the first {CURVE_STEPS} steps: {curve[0]:.4f} to {curve[-1]:.4f}",
        "speed: median (minimum-maximum) of the ratios of two blocks in one round",
    ]
    for name, other in (("ddp", "one"), ("fsdp", "one"), *((("fsdp", "plain"),) if options.plain else ())):
        gap, limit = _difference(sides[name], sides[other]), TOLERANCE[other]
        verdict = "within" if gap <= limit else "BEYOND"  # NaN is within no tolerance
        notes.append(f"{name}, losses relative to {other}: {gap:.1e}, {verdict} the tolerance of {limit:.0e}")
    return notes


if __name__ == "__main__":
    script(main)
