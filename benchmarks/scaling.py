"""Scaling: step time and memory as width, depth, context, batch and vocabulary are doubled one at a time.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --sizes width context --doublings 4
    python benchmarks/scaling.py --tiny                              # seconds: to try the script

Method. Starting from a base model, one dimension at a time is doubled repeatedly. Each case trains in a separate process
(`workers.py`) as a run would: a few warm-up steps, then blocks of steps, of which the fastest counts (other load can only
make a block slower), then a few steps to measure the memory beyond weights and optimizer. The table compares the growth
factors of time and memory with that of FLOPs. Time that grows faster than FLOPs, or memory that grows faster than the
dimension, suggests waste; time that grows more slowly shows that the smaller case was dominated by overhead.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bardling.cli.parse import parse
from bardling.distributed.device import choose_device
from bardling.errors import UserError
from bardling.planning.costs import flops_per_token
from tables import Table, megabytes, publish, rounded, say, script
from workers import Spec, Worker

BASE: dict[str, Any] = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 128, "vocab_size": 2048, "batch": 8}
TINY: dict[str, Any] = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": 64, "batch": 2}
SIZES = {"width": "n_embd", "depth": "n_layer", "context": "block_size", "batch": "batch", "vocabulary": "vocab_size"}


@dataclass(frozen=True)
class Options:
    """Options of this benchmark."""

    sizes: tuple[str, ...] = tuple(SIZES)
    """Of width, depth, context, batch, vocabulary."""
    doublings: int = 3
    """Number of doublings of each."""
    blocks: int = 5
    """Timed blocks of steps; the fastest counts."""
    block: int = 5
    """Steps per block."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of matmuls."""
    compile: Literal["on", "off"] = "off"
    """torch.compile, for all cases alike."""
    device: str = "cpu"
    """Device to measure on."""
    results: Path | None = None
    """Folder of the results file to append to; default: benchmarks/results."""
    tiny: bool = False
    """Start from a tiny model and double once, to try the script."""


@dataclass(frozen=True)
class _Case:
    """One measured row."""

    size: str
    value: int
    parameters: int
    flops: float  # a step
    seconds: float  # a step
    above: int | None  # bytes


def main(argv: Sequence[str]) -> None:
    """Measure every case and write one table."""
    options = parse(Options, argv, prog="scaling.py", description="Step time and memory as each size doubles.")
    for size in options.sizes:
        if size not in SIZES:
            raise UserError(f"--sizes {size}: choose from {', '.join(SIZES)}")
    for name in ("doublings", "blocks", "block"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: must be at least 1")
    device = choose_device(options.device)
    base, doublings = (TINY, 1) if options.tiny else (BASE, options.doublings)
    first = _measure(base, "base", 0, options)
    rows: list[tuple[str, ...]] = []
    for size in options.sizes:
        before = first
        rows.append(_row(size, base[SIZES[size]], before, None))
        for turn in range(1, doublings + 1):
            value = base[SIZES[size]] * 2**turn
            case = _measure({**base, SIZES[size]: value}, size, value, options)
            rows.append(_row(size, value, case, before))
            before = case
    notes = (
        f"base: {', '.join(f'{key} {value}' for key, value in base.items())}; precision {options.precision}, "
        f"compile {options.compile}; heads stay {base['n_head']}",
        "x: factor relative to the row above; above: peak memory above weights and optimizer, gradients included",
    )
    columns = ("doubled", "to", "parameters", "ms/step", "x time", "x FLOPs", "GFLOP/s", "above, MB", "x memory")
    table = Table("Scaling, one size at a time", columns, rows, notes)
    publish("scaling", [table], device=device, command=argv, folder=options.results)


def _measure(sizes: dict[str, Any], size: str, value: int, options: Options) -> _Case:
    shape = {key: number for key, number in sizes.items() if key != "batch"}
    spec = Spec(
        "ours",
        {**shape, "bias": True, "gelu": "tanh"},
        batch=sizes["batch"],
        device=options.device,
        precision=options.precision,
        compile=options.compile,
    )
    label = size if size == "base" else f"{size} {value}"
    with Worker(spec, label) as worker:
        worker.steps(3)
        seconds = min(worker.steps(options.block).seconds for _ in range(options.blocks))
        above = worker.steps(2, memory=True).memory_above
        say(f"{label}: {seconds * 1e3:.1f} ms per step")
        flops = float(flops_per_token(spec.config)) * spec.tokens_per_step
        return _Case(size, value, worker.facts["parameters"], flops, seconds, above)


def _row(size: str, value: int, case: _Case, before: _Case | None) -> tuple[str, ...]:
    speed = case.flops / case.seconds
    factors = ["", "", ""]
    if before is not None:
        factors[:2] = [f"{case.seconds / before.seconds:.2f}", f"{case.flops / before.flops:.2f}"]
        if case.above is not None and before.above:
            factors[2] = f"{case.above / before.above:.2f}"
    return (
        size,
        f"{value:,}",
        f"{case.parameters / 1e6:.2f} M",
        rounded(case.seconds * 1e3),
        factors[0],
        factors[1],
        f"{speed / 1e9:,.1f}",
        "n/a" if case.above is None else megabytes(case.above),
        factors[2],
    )


if __name__ == "__main__":
    script(main)
