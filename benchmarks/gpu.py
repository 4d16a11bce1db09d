"""GPU training speed of GPT-2 124M, 350M, 774M and 1558M, against a compiled plain loop, and without each optimisation in turn.

    python benchmarks/gpu.py                                         # everything: about 15 minutes
    python benchmarks/gpu.py --sizes 1558m --ablate                  # one size, ours and plain only
    python benchmarks/gpu.py --record-absent                         # no GPU available: record that nothing was measured
    python benchmarks/gpu.py --tiny --device cpu                     # to try the script

Method. Each case trains in a separate process (`workers.py`), one after the other, since the large models need the whole GPU.
`ours` is the library as a run assembles it. `plain` does what nanoGPT does on a GPU, reimplemented (`plain.py`, or a checkout
with --nanogpt): bfloat16 autocast, torch.compile, fused AdamW, scaled-dot-product attention, full logits, the vocabulary
rounded up to 64. Model, micro-batch and accumulation are the same for all cases of a size. After the steps that include
compilation, blocks of steps are timed, without synchronisation within a block; the table shows the median. All
implementations start from the same weights and see the same batches; the difference of their first losses is noted.

`without compile`, `without chunked-loss` (full logits), `without fused-optimizer` (PyTorch's loop over tensors), `without
bf16` (TF32 matmuls), `without flash` (attention by its plain formula) and `without prefetch` are ours with that one
optimisation turned off, for the sizes in --ablate; `with fp8` and `with cuda-graphs` are ours with features that a run uses
only on request (`with fa3` and `with fa4` are FlashAttention 3 and 4, if installed and requested).

MFU is given twice: relative to the vendor's dense bfloat16 peak, and relative to the fastest large matmul measured just
before. A case that does not fit into memory is reported as such. The table of a size is appended as soon as it is complete.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bardling.cli.parse import parse
from bardling.distributed.device import choose_device, device_name, matmul_flops
from bardling.errors import UserError
from bardling.planning.costs import flops_per_token
from bardling.planning.devices import peak_flops
from tables import Table, publish, rounded, say, script, spread
from workers import MORE, WITHOUT, Spec, Worker, closest_curves

CURVE_STEPS = 10
LARGEST_GAP = 0.05  # nats, between loss curves of the same training in bfloat16


@dataclass(frozen=True)
class Size:
    """A model and its batch."""

    n_layer: int
    n_head: int
    n_embd: int
    batch: int  # sequences per forward pass
    accumulation: int  # gradient accumulation steps
    block_size: int = 1024
    vocab_size: int = 50257

    @property
    def model(self) -> dict[str, Any]:
        """Fields of `ModelConfig`: GPT-2 without biases, as nanoGPT trains it."""
        keys = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
        return {**{key: getattr(self, key) for key in keys}, "bias": False, "gelu": "erf"}


# 65,536 tokens per step, in micro-batches that fit into 80 GB for both implementations.
SIZES = {
    "124m": Size(12, 12, 768, batch=32, accumulation=2),
    "350m": Size(24, 16, 1024, batch=16, accumulation=4),
    "774m": Size(36, 20, 1280, batch=8, accumulation=8),
    "1558m": Size(48, 25, 1600, batch=8, accumulation=8),
}
TINY = {"tiny": Size(1, 2, 32, batch=2, accumulation=2, block_size=16, vocab_size=64)}


@dataclass(frozen=True)
class Options:
    """Options of this benchmark."""

    sizes: tuple[str, ...] = tuple(SIZES)
    """Of 124m, 350m, 774m, 1558m."""
    ablate: tuple[str, ...] = ("124m",)
    """Sizes to measure also without each optimisation; may be empty."""
    without: tuple[str, ...] = WITHOUT
    """Optimisations to turn off, one at a time."""
    more: tuple[str, ...] = ("fp8", "cuda-graphs")
    """Optimisations to turn on, one at a time: fp8, cuda-graphs, fa3, fa4."""
    batch: int | None = None
    """Sequences per forward pass; default: depends on the size."""
    accumulation: int | None = None
    """Gradient accumulation steps; default: depends on the size."""
    blocks: int = 4
    """Timed blocks of steps."""
    block: int = 8
    """Steps per block."""
    nanogpt: Path | None = None
    """A nanoGPT checkout whose compiled model is measured too. Its code is executed."""
    device: str = "cuda"
    """Device to measure on."""
    results: Path | None = None
    """Folder of the results file to append to; default: benchmarks/results."""
    record_absent: bool = False
    """Without a GPU, record in the results that nothing was measured instead of failing."""
    tiny: bool = False
    """Measure one tiny model instead, to try the script."""


def main(argv: Sequence[str]) -> None:
    """Measure each size and append a table for it."""
    options = parse(Options, argv, prog="gpu.py", description="Tokens per second, MFU and memory of the GPT-2 sizes on a GPU.")
    sizes = TINY if options.tiny else SIZES
    wanted = tuple(TINY) if options.tiny else options.sizes
    for option, names, known in (
        ("sizes", wanted, sizes),
        ("ablate", options.ablate, {**SIZES, **TINY}),
        ("without", options.without, WITHOUT),
        ("more", options.more, MORE),
    ):
        for name in names:
            if name not in known:
                raise UserError(f"--{option} {name}: choose from {', '.join(known)}")
    for option in ("batch", "accumulation", "blocks", "block"):
        value = getattr(options, option)
        if value is not None and value < 1:
            raise UserError(f"--{option} {value}: must be at least 1")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        if options.record_absent:
            _record_absent(wanted, argv, options)
            return
        raise UserError(
            "no CUDA device found: run this on a machine with a GPU, use --record-absent to record that nothing was measured, "
            "or try the script with --tiny --device cpu"
        )
    device = choose_device(options.device)
    for name in wanted:
        table = measure(name, sizes[name], options, device)
        publish("gpu", [table], device=device, command=argv, folder=options.results)


COLUMNS = ("size", "side", "computes", "ms/step", "tokens/s", "MFU", "MFU of measured", "above, GB", "peak, GB", "x plain")


def _record_absent(names: Sequence[str], argv: Sequence[str], options: Options) -> None:
    sides = ("ours", "plain, compiled")
    rows = [(name, side, *["not measured"] * (len(COLUMNS) - 2)) for name in names for side in sides]
    notes = ("not measured: no GPU was available; the script was tried on a CPU with `--tiny --device cpu`",)
    table = Table("GPU: not measured", COLUMNS, rows, notes)
    publish("gpu", [table], device=torch.device("cpu"), command=argv, folder=options.results)


def cases_of(name: str, size: Size, options: Options) -> dict[str, Spec]:
    """The cases to measure for a size, ours first."""
    common: dict[str, Any] = {
        "model": size.model,
        "batch": options.batch or size.batch,
        "accumulation": options.accumulation or size.accumulation,
        "device": options.device,
        "lr": 3e-4,
    }
    ours: dict[str, Any] = {**common, "precision": "bfloat16", "compile": "on"}
    cases = {"ours": Spec("ours", **ours), "plain, compiled": Spec("plain", **common, fast=True)}
    if options.nanogpt is not None:
        cases["nanoGPT, compiled"] = Spec("nanogpt", **common, fast=True, path=str(options.nanogpt))
    if options.tiny or name in options.ablate:
        cases |= {f"without {part}": Spec("ours", **ours, without=(part,)) for part in options.without}
        if options.device.startswith("cuda"):
            cases |= {f"with {part}": Spec("ours", **ours, more=(part,)) for part in options.more}
    return cases


@dataclass(frozen=True)
class _Measured:
    spec: Spec
    facts: dict[str, Any]
    curve: tuple[float, ...]
    seconds: tuple[float, ...]  # per step, for each block
    above: int | None  # bytes
    peak: int | None


def measure(name: str, size: Size, options: Options, device: torch.device) -> Table:
    """The table of one size."""
    fastest, done = 0.0, {}
    lost: dict[str, str] = {}
    for case, spec in cases_of(name, size, options).items():
        product = 256 if options.tiny else 8192
        fastest = max(fastest, matmul_flops(device, torch.bfloat16, size=product, seconds=0.05 if options.tiny else 0.5))
        if device.type == "cuda":
            torch.cuda.empty_cache()  # make room for the worker
        try:
            done[case] = _run(spec, f"{name}, {case}", options)
        except UserError as error:
            lost[case] = str(error)
            say(f"{name}, {case}: {error}")
    sheet = peak_flops(device_name(device), "bfloat16")
    rows = [_row(name, case, measured, done, fastest, sheet) for case, measured in done.items()]
    rows += [(name, case, *["failed"] * (len(COLUMNS) - 2)) for case in lost]
    spec = cases_of(name, size, options)["ours"]
    notes = [
        f"{spec.batch} x {size.block_size} tokens per micro-batch, accumulation {spec.accumulation}; "
        f"{flops_per_token(spec.config) / 1e9:.3g} GFLOP per token, counting all T² attention scores",
        f"measured bfloat16 matmul: {fastest / 1e12:,.3g} TFLOP/s; vendor spec: "
        + ("unknown for this device" if sheet is None else f"{sheet / 1e12:,.0f} TFLOP/s"),
        "above: peak memory beyond weights and optimizer, with gradients; x plain: speed relative to the compiled plain loop",
    ]
    if "ours" in done and "plain, compiled" in done:
        ours, plain = done["ours"].curve, done["plain, compiled"].curve
        gap = closest_curves(ours, plain)
        if not gap <= LARGEST_GAP:
            curves = "; ".join(" ".join(f"{loss:.3f}" for loss in curve) for curve in (ours, plain))
            raise UserError(f"{name}: the losses of both sides differ by {gap:.2g} nats, so no time is recorded: {curves}")
        notes.append(
            f"losses of the first {len(ours)} steps ({plain[0]:.4f} to {plain[-1]:.4f} in the plain loop) differ by at most "
            f"{gap:.1e} nats; this includes the padding ids, which only the plain loop predicts"
        )
    notes += [f"{case}: {why}" for case, why in lost.items()]
    return Table(f"GPU: {name}", COLUMNS, rows, notes)


def _run(spec: Spec, label: str, options: Options) -> _Measured:
    say(f"{label}: set-up and compilation")
    with Worker(spec, label) as worker:
        curve = worker.steps(CURVE_STEPS).losses
        seconds = tuple(worker.steps(options.block).seconds for _ in range(options.blocks))
        memory = worker.steps(2, memory=True)
        speed = spec.tokens_per_step / statistics.median(seconds)
        say(f"{label}: {spread([1e3 * value for value in seconds], '{:.1f}')} ms per step, {speed:,.0f} tokens/s")
        return _Measured(spec, worker.facts, curve, seconds, memory.memory_above, memory.memory_peak)


def _row(
    name: str, case: str, measured: _Measured, done: dict[str, _Measured], fastest: float, sheet: float | None
) -> tuple[str, ...]:
    seconds = statistics.median(measured.seconds)
    speed = measured.spec.tokens_per_step / seconds
    flops = speed * flops_per_token(measured.spec.config)
    plain = done.get("plain, compiled")
    return (
        name,
        case,
        f"{measured.facts['precision']}, {'compiled' if measured.facts['compiled'] else 'eager'}",
        rounded(seconds * 1e3),
        f"{speed:,.0f}",
        "n/a" if sheet is None else f"{flops / sheet:.1%}",
        f"{flops / fastest:.1%}",
        "n/a" if measured.above is None else f"{measured.above / 1e9:.3g}",
        "n/a" if measured.peak is None else f"{measured.peak / 1e9:.3g}",
        "n/a" if plain is None else f"{statistics.median(plain.seconds) / seconds:.2f}",
    )


if __name__ == "__main__":
    script(main)
