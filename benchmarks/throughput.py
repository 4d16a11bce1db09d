"""Throughput: training speed of the library against a plain loop with the same mathematics, measured side by side.

    python benchmarks/throughput.py                                  # char-small, char-baby, gpt2-124m against the plain loop
    python benchmarks/throughput.py --settings char-small --nanogpt ~/nanoGPT --transformers
    python benchmarks/throughput.py --tiny                           # seconds: to try the script

Method. Each implementation runs in a separate process (`workers.py`). First, each takes 20 steps from the same weights on the
same batches, whose losses are compared; these steps include compilation and set-up. Then come rounds in which every
implementation runs a block of steps, in rotating order, so that all see the same machine; a ratio compares two blocks of one
round, and the table shows the median of the ratios with minimum and maximum. Finally, each runs a few steps to measure peak
memory (see `workers.py`).

`ours` is the library as a run assembles it; precision and compilation are what a run of the setting's length would choose,
unless --precision or --compile are given. `compiled` is ours with `--compile on`, as a longer run would choose, in which
compilation pays off. `lean` is ours with less memory: `--train.recompute blocks` and `--compile off`. `plain` is eager,
float32, with PyTorch's AdamW and its defaults and full logits: what nanoGPT does on a CPU. nanoGPT's own model and optimizer
and transformers' GPT-2 are measured unchanged; nanoGPT uses the exact GELU even if the setting uses the other one, and
transformers has biases in every setting.

MFU is relative to a matmul measured between the rounds: the fastest of all measurements, over both dtypes, so that the MFUs
of all implementations are comparable. FLOPs are those of matmuls, counting all T² attention scores (`planning/costs.py`).
"""

import math
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from bardling.cli.parse import parse
from bardling.distributed.device import choose_device, matmul_flops
from bardling.errors import UserError
from bardling.planning.costs import flops_per_token
from tables import Table, megabytes, publish, rounded, say, script, spread
from workers import BlockOfSteps, Spec, Worker, closest_curves

CURVE_STEPS = 20  # from initialisation without warm-up; the learning rates are low enough for smooth curves
TOLERANCE = {"bfloat16": 0.01, "float32": 3e-4}
"""Largest relative difference of a loss in the first steps from the plain loop's. bfloat16 has 8 significant bits; errors
mostly cancel in the mean over thousands of tokens, but the weights drift apart a little with every step."""


@dataclass(frozen=True)
class Setting:
    """A model, its batch, and the duration of the measurement."""

    model: dict[str, Any]
    batch: int
    rounds: int
    block: int  # steps per implementation and round
    run_steps: int  # of the run for which 'auto' decides
    lr: float = 1e-3
    also: tuple[str, ...] = ()  # further variants of ours: compiled, lean


def _gpt2(n_layer: int, n_head: int, n_embd: int, block_size: int, vocab_size: int, *, as_nanogpt: bool) -> dict[str, Any]:
    style = {"bias": False, "gelu": "erf"} if as_nanogpt else {"bias": True, "gelu": "tanh"}
    sizes = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "block_size": block_size, "vocab_size": vocab_size}
    return {**sizes, **style}


SETTINGS = {
    "char-small": Setting(
        _gpt2(4, 4, 128, 64, 65, as_nanogpt=True), batch=12, rounds=12, block=40, run_steps=2000, also=("compiled",)
    ),
    "char-baby": Setting(_gpt2(6, 6, 384, 256, 65, as_nanogpt=True), batch=16, rounds=8, block=3, run_steps=5000, lr=3e-4),
    "gpt2-124m": Setting(
        _gpt2(12, 12, 768, 1024, 50257, as_nanogpt=False), batch=1, rounds=5, block=2, run_steps=19000, lr=6e-4, also=("lean",)
    ),
}
TINY = {"tiny": Setting(_gpt2(2, 2, 32, 16, 65, as_nanogpt=True), batch=2, rounds=2, block=2, run_steps=10)}


@dataclass(frozen=True)
class Options:
    """Options of this benchmark."""

    settings: tuple[str, ...] = tuple(SETTINGS)
    """Of char-small, char-baby, gpt2-124m."""
    nanogpt: Path | None = None
    """A nanoGPT checkout whose model and optimizer are measured too. Its code is executed."""
    transformers: bool = False
    """Measure transformers' GPT-2 too (its Trainer, where accelerate is installed)."""
    others_precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of nanoGPT's and transformers' models: their default on a CPU, or bfloat16 autocast."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of ours."""
    compile: Literal["auto", "on", "off"] = "auto"
    """For ours; auto decides for a run of the setting's usual length."""
    device: str = "cpu"
    """Device to measure on."""
    rounds: int | None = None
    """Rounds; default: depends on the setting."""
    block: int | None = None
    """Steps per implementation and round; default: depends on the setting."""
    results: Path | None = None
    """Folder of the results file to append to; default: benchmarks/results."""
    tiny: bool = False
    """Measure one tiny model instead, to try the script."""


@dataclass
class _Measured:
    """Measurements of one implementation."""

    worker: Worker
    curve: tuple[float, ...]
    blocks: list[float] = field(default_factory=list)  # seconds per step, for each round
    memory: BlockOfSteps | None = None


def main(argv: Sequence[str]) -> None:
    """Measure the settings one after the other and write one table."""
    options = parse(Options, argv, prog="throughput.py", description="Tokens per second, MFU and memory against a plain loop.")
    settings = TINY if options.tiny else SETTINGS
    wanted = tuple(TINY) if options.tiny else options.settings
    for name in wanted:
        if name not in settings:
            raise UserError(f"--settings {name}: choose from {', '.join(settings)}")
    for name in ("rounds", "block"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    device = choose_device(options.device)
    rows: list[tuple[str, ...]] = []
    notes: list[str] = []
    for name in wanted:
        setting = replace(
            settings[name],
            rounds=options.rounds or settings[name].rounds,
            block=options.block or settings[name].block,
        )
        more, remarks = measure(name, setting, options, device)
        rows += more
        notes += remarks
    notes.append(
        "ratio: step time relative to ours, median (minimum-maximum) over the rounds; "
        "above: peak memory above weights and optimizer, gradients included"
    )
    columns = ("setting", "side", "computes", "ms/step", "tokens/s", "MFU", "above, MB", "process, MB", "ratio")
    table = Table("Throughput", columns, rows, notes)
    publish("throughput", [table], device=device, command=argv, folder=options.results)


def sides_of(setting: Setting, options: Options) -> dict[str, Spec]:
    """The implementations to measure, ours first."""
    common: dict[str, Any] = {"model": setting.model, "batch": setting.batch, "device": options.device, "lr": setting.lr}
    ours = Spec("ours", **common, precision=options.precision, compile=options.compile, run_steps=setting.run_steps)
    found = {"ours": ours, "plain": Spec("plain", **common, precision="float32")}
    ways = {"compiled": replace(ours, compile="on"), "lean": replace(ours, recompute="blocks", compile="off")}
    found |= {way: ways[way] for way in setting.also if ways[way] != ours}
    if options.nanogpt is not None:
        found["nanoGPT"] = Spec("nanogpt", **common, precision=options.others_precision, path=str(options.nanogpt))
    if options.transformers:
        found["transformers"] = Spec("transformers", **common, precision=options.others_precision)
    return found


def measure(name: str, setting: Setting, options: Options, device: torch.device) -> tuple[list[tuple[str, ...]], list[str]]:
    """Rows and notes of one setting."""
    peaks: list[float] = []

    def measure_peak() -> None:
        for dtype in (torch.float32, torch.bfloat16):
            size = 256 if options.tiny else 8192 if device.type == "cuda" else 2048
            peaks.append(matmul_flops(device, dtype, size=size, seconds=0.05 if options.tiny else 0.3))

    with ExitStack() as stack:
        sides: dict[str, _Measured] = {}
        for side, spec in sides_of(setting, options).items():
            say(f"{name}: {side}: set-up and the first {CURVE_STEPS} steps")
            worker = stack.enter_context(Worker(spec, f"{name}, {side}"))
            sides[side] = _Measured(worker, worker.steps(CURVE_STEPS).losses)
        order = list(sides)
        for turn in range(setting.rounds):
            measure_peak()
            for side in order:
                sides[side].blocks.append(sides[side].worker.steps(setting.block).seconds)
            times = ", ".join(f"{side} {sides[side].blocks[-1] * 1e3:.1f}" for side in sides)
            say(f"{name}: round {turn + 1} of {setting.rounds}: ms per step: {times}")
            order = [*order[1:], order[0]]
        measure_peak()
        for measured in sides.values():
            measured.memory = measured.worker.steps(2, memory=True)
    return _rows(name, sides, max(peaks)), _notes(name, sides, max(peaks))


def _rows(name: str, sides: dict[str, _Measured], peak: float) -> list[tuple[str, ...]]:
    rows = []
    for side, measured in sides.items():
        spec, facts, memory = measured.worker.spec, measured.worker.facts, measured.memory
        seconds = statistics.median(measured.blocks)
        speed = spec.tokens_per_step / seconds
        ratios = [theirs / ours for theirs, ours in zip(measured.blocks, sides["ours"].blocks, strict=True)]
        above = memory.memory_above if memory is not None else None
        peak_memory = memory.memory_peak if memory is not None else None
        computes = f"{facts['precision']}, {'compiled' if facts['compiled'] else 'eager'}"
        rows.append(
            (
                name,
                side + (f" ({facts['how']})" if "how" in facts else ""),
                computes,
                rounded(seconds * 1e3),
                f"{speed:,.0f}",
                f"{speed * flops_per_token(spec.config) / peak:.1%}",
                "n/a" if above is None else megabytes(above),
                "n/a" if peak_memory is None else megabytes(peak_memory),
                "1" if side == "ours" else spread(ratios),
            )
        )
    return rows


def _notes(name: str, sides: dict[str, _Measured], peak: float) -> list[str]:
    ours, plain = sides["ours"], sides["plain"]
    precision = str(ours.worker.facts["precision"])
    part = TOLERANCE.get(precision, TOLERANCE["bfloat16"])
    gap, bound = closest_curves(ours.curve, plain.curve), part * min(plain.curve)
    verdict = "within" if gap <= bound else "BEYOND"
    notes = [
        f"{name}: measured matmul peak {peak / 1e9:,.0f} GFLOP/s",
        f"{name}: losses of the first {len(ours.curve)} steps ({plain.curve[0]:.4f} to {plain.curve[-1]:.4f}) differ from the "
        f"plain loop's by at most {gap:.1e} nats, {verdict} the tolerance for {precision} of {part:g} of a loss",
    ]
    for side in (side for side in sides if side in ("ours", "compiled", "lean")):
        above = [sides[key].memory for key in (side, "plain")]
        found = [memory.memory_above for memory in above if memory is not None and memory.memory_above]
        if len(found) == 2:
            ratios = [slow / fast for slow, fast in zip(plain.blocks, sides[side].blocks, strict=True)]
            notes.append(
                f"{name}: {side}: peak memory above weights and optimizer is {found[0] / found[1]:.2f} times the plain loop's, "
                f"whose step takes {spread(ratios)} times as long"
            )
    if not math.isfinite(gap):
        notes.append(f"{name}: a loss is NaN or infinite")
    return notes


if __name__ == "__main__":
    script(main)
