"""Throughput: how fast the library trains, beside a plain loop on the same mathematics, in the same minutes.

    python benchmarks/throughput.py                                  # char-small, char-baby, gpt2-124m against the plain loop
    python benchmarks/throughput.py --settings char-small --nanogpt ~/nanoGPT --transformers
    python benchmarks/throughput.py --tiny                           # seconds: to try the script

Method. Each side runs in a process of its own (`children.py`). First each does 20 steps from the same weights on the same
batches, whose losses are compared; these pay for compilation and set-up too. Then come rounds in which every side does
a block of steps, the order turning with the round, so that all see the same machine; a ratio is that of two blocks of
one round, and the table has the median of the ratios with the smallest and the largest. Last, each does a few steps for
its peak memory (`children.py` says how).

`ours` is the library as a run puts it together; number format and compilation are what a run of the setting's length
would choose, unless --precision or --compile say otherwise. `compiled` is ours with `--compile on`, which a longer run than the
setting's would choose: it earns back what compiling costs. `lean` is ours for little memory: `--train.recompute blocks` and
`--compile off`. `plain` is eager, float32, PyTorch's AdamW with its defaults, full logits: what nanoGPT does on a CPU.
nanoGPT's own model and optimizer, and transformers' GPT-2, are measured as they come; the first has the exact GELU also where
the setting has the other, the second has biases in every setting.

MFU is against a matrix product measured between the rounds: the fastest of all measurements, over both number formats,
so that the figures of all sides mean the same. FLOPs are those of matrix products, attention's full square
(`model/arithmetic.py`).
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
from bardling.model.arithmetic import flops_per_token
from children import BlockOfSteps, Child, Spec, closest_curves
from tables import Table, megabytes, publish, rounded, say, script, spread

CURVE_STEPS = 20  # from the first weights, without a warm-up: learning rates are such that curves do not jump
TOLERANCE = {"bfloat16": 0.01, "float32": 3e-4}
"""Most that a loss of the first steps may differ from the plain loop's, as a part of it. bfloat16 keeps 8 bits, and a loss is a
mean over thousands of tokens whose errors mostly cancel, but weights part a little with every step."""


@dataclass(frozen=True)
class Setting:
    """A model with its batch, and how long it is measured."""

    model: dict[str, Any]
    batch: int
    rounds: int
    block: int  # steps of a side in a round
    run_steps: int  # of the run for which 'auto' decides
    lr: float = 1e-3
    also: tuple[str, ...] = ()  # other ways of ours to measure: compiled, lean


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
    """What to measure, against what."""

    settings: tuple[str, ...] = tuple(SETTINGS)
    """Of char-small, char-baby, gpt2-124m."""
    nanogpt: Path | None = None
    """A checkout of nanoGPT, to measure its model and optimizer too. Its code is executed."""
    transformers: bool = False
    """Measure transformers' GPT-2 too (its Trainer, where accelerate is installed)."""
    others_precision: Literal["float32", "bfloat16"] = "float32"
    """Of nanoGPT's and transformers' models: what they do on a CPU unless told otherwise, or bfloat16 autocast."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of ours."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Of ours; auto decides for a run of the setting's usual length."""
    device: str = "cpu"
    """Where to measure."""
    rounds: int | None = None
    """Rounds; unset takes the setting's."""
    block: int | None = None
    """Steps of each side in a round; unset takes the setting's."""
    results: Path | None = None
    """Folder to append the table in; unset takes benchmarks/results."""
    tiny: bool = False
    """Measure one tiny model instead, to try the script."""


@dataclass
class _Measured:
    """One side's figures."""

    child: Child
    curve: tuple[float, ...]
    blocks: list[float] = field(default_factory=list)  # seconds a step, of each round
    memory: BlockOfSteps | None = None


def main(argv: Sequence[str]) -> None:
    """Measure the settings one after the other, and write one table."""
    options = parse(Options, argv, prog="throughput.py", description="Tokens a second, MFU and memory against a plain loop.")
    settings = TINY if options.tiny else SETTINGS
    wanted = tuple(TINY) if options.tiny else options.settings
    for name in wanted:
        if name not in settings:
            raise UserError(f"--settings {name}: there are {', '.join(settings)}")
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
        "ratio: time of a step of that side divided by ours, median (smallest-largest) over the rounds; "
        "above: peak memory above weights and optimizer, gradients included"
    )
    columns = ("setting", "side", "computes", "ms/step", "tokens/s", "MFU", "above, MB", "process, MB", "ratio")
    table = Table("Throughput", columns, rows, notes)
    publish("throughput", [table], device=device, command=argv, folder=options.results)


def sides_of(setting: Setting, options: Options) -> dict[str, Spec]:
    """The sides to measure, ours first."""
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
            child = stack.enter_context(Child(spec, f"{name}, {side}"))
            sides[side] = _Measured(child, child.steps(CURVE_STEPS).losses)
        order = list(sides)
        for turn in range(setting.rounds):
            measure_peak()
            for side in order:
                sides[side].blocks.append(sides[side].child.steps(setting.block).seconds)
            times = ", ".join(f"{side} {sides[side].blocks[-1] * 1e3:.1f}" for side in sides)
            say(f"{name}: round {turn + 1} of {setting.rounds}: ms a step: {times}")
            order = [*order[1:], order[0]]
        measure_peak()
        for measured in sides.values():
            measured.memory = measured.child.steps(2, memory=True)
    return _rows(name, sides, max(peaks)), _notes(name, sides, max(peaks))


def _rows(name: str, sides: dict[str, _Measured], peak: float) -> list[tuple[str, ...]]:
    rows = []
    for side, measured in sides.items():
        spec, facts, memory = measured.child.spec, measured.child.facts, measured.memory
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
    precision = str(ours.child.facts["precision"])
    part = TOLERANCE.get(precision, TOLERANCE["bfloat16"])
    gap, bound = closest_curves(ours.curve, plain.curve), part * min(plain.curve)
    verdict = "within" if gap <= bound else "BEYOND"
    notes = [
        f"{name}: matrix product peak {peak / 1e9:,.0f} GFLOP/s",
        f"{name}: losses of the first {len(ours.curve)} steps ({plain.curve[0]:.4f} to {plain.curve[-1]:.4f}) differ from the "
        f"plain loop's by at most {gap:.1e} nats, {verdict} the tolerance for {precision} of {part:g} of a loss",
    ]
    for side in (side for side in sides if side in ("ours", "compiled", "lean")):
        above = [sides[key].memory for key in (side, "plain")]
        found = [memory.memory_above for memory in above if memory is not None and memory.memory_above]
        if len(found) == 2:
            ratios = [slow / fast for slow, fast in zip(plain.blocks, sides[side].blocks, strict=True)]
            notes.append(
                f"{name}: {side}: peak memory above weights and optimizer is {found[0] / found[1]:.2f} of the plain loop's, "
                f"whose step takes {spread(ratios)} times as long"
            )
    if not math.isfinite(gap):
        notes.append(f"{name}: a loss was no number")
    return notes


if __name__ == "__main__":
    script(main)
