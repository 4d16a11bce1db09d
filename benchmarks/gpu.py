"""GPU: GPT-2 of 124M, 350M, 774M and 1558M parameters, beside the compiled plain loop, and without each optimisation in turn.

    python benchmarks/gpu.py                                         # everything: about 15 minutes
    python benchmarks/gpu.py --sizes 1558m --ablate                  # one size, ours and plain only
    python benchmarks/gpu.py --record-absent                         # no GPU here: the results say that it was not measured
    python benchmarks/gpu.py --tiny --device cpu                     # to try the script

Method. Each case trains in a process of its own (`children.py`), one after the other, since the large ones need the whole
GPU. `ours` is the library as a run puts it together. `plain` is what nanoGPT is on a GPU, written anew (`plain.py`, or a
checkout with --nanogpt): bfloat16 autocast, torch.compile, fused AdamW, scaled-dot-product attention, full logits, the
vocabulary rounded up to 64. Model, micro-batch and accumulation are the same for all cases of a size. After the steps
that pay for compilation, blocks of steps are timed, without a wait within a block; the table has the median. All sides
begin with the same weights and see the same batches; how far their losses of the first steps part is noted.

`without compile`, `without chunked-loss` (full logits), `without fused-optimizer` (PyTorch's loop over tensors), `without
bf16` (TF32 products), `without flash` (attention by its plain formula) and `without prefetch` are ours with that one
optimisation switched off, for the sizes in --ablate; `with fp8` and `with cuda-graphs` are ours with what a run has only on
request (`with fa3` and `with fa4`, FlashAttention 3 and 4, where they are installed and asked for).

MFU is given twice: of the data sheet's dense bfloat16 peak, and of the fastest large matrix product measured just before.
A case that does not fit says so. One table a size is appended as soon as it is done.
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
from bardling.model.arithmetic import flops_per_token
from bardling.model.peaks import peak_flops
from children import MORE, WITHOUT, Child, Spec, closest_curves
from tables import Table, publish, rounded, say, script, spread

CURVE_STEPS = 10


@dataclass(frozen=True)
class Size:
    """A model and its batch."""

    n_layer: int
    n_head: int
    n_embd: int
    batch: int  # sequences in a forward pass
    accumulation: int  # forward passes in a step
    block_size: int = 1024
    vocab_size: int = 50257

    @property
    def model(self) -> dict[str, Any]:
        """As the library's configuration wants it: GPT-2, without biases, as nanoGPT trains it."""
        keys = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
        return {**{key: getattr(self, key) for key in keys}, "bias": False, "gelu": "erf"}


# 65,536 tokens a step each, in passes that 80 GB hold on both sides.
SIZES = {
    "124m": Size(12, 12, 768, batch=32, accumulation=2),
    "350m": Size(24, 16, 1024, batch=16, accumulation=4),
    "774m": Size(36, 20, 1280, batch=8, accumulation=8),
    "1558m": Size(48, 25, 1600, batch=8, accumulation=8),
}
TINY = {"tiny": Size(1, 2, 32, batch=2, accumulation=2, block_size=16, vocab_size=64)}


@dataclass(frozen=True)
class Options:
    """What to measure."""

    sizes: tuple[str, ...] = tuple(SIZES)
    """Of 124m, 350m, 774m, 1558m."""
    ablate: tuple[str, ...] = ("124m",)
    """Sizes that are also measured without each optimisation; give none for none."""
    without: tuple[str, ...] = WITHOUT
    """The optimisations to switch off in turn."""
    more: tuple[str, ...] = ("fp8", "cuda-graphs")
    """Those to switch on in turn: fp8, cuda-graphs, fa3, fa4."""
    batch: int | None = None
    """Sequences in a forward pass; unset takes the size's."""
    accumulation: int | None = None
    """Forward passes in a step; unset takes the size's."""
    blocks: int = 4
    """Blocks of steps that are timed."""
    block: int = 8
    """Steps in a block."""
    nanogpt: Path | None = None
    """A checkout of nanoGPT whose model, compiled, is measured too. Its code is executed."""
    device: str = "cuda"
    """Where to measure."""
    results: Path | None = None
    """Folder to append the tables in; unset takes benchmarks/results."""
    record_absent: bool = False
    """Where there is no GPU, write that into the results instead of failing."""
    tiny: bool = False
    """Measure one tiny model instead, to try the script."""


def main(argv: Sequence[str]) -> None:
    """Measure size after size, and append a table for each."""
    options = parse(Options, argv, prog="gpu.py", description="Tokens a second, MFU and memory of GPT-2's sizes on a GPU.")
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
                raise UserError(f"--{option} {name}: there are {', '.join(known)}")
    for option in ("batch", "accumulation", "blocks", "block"):
        value = getattr(options, option)
        if value is not None and value < 1:
            raise UserError(f"--{option} {value}: must be at least 1")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        if options.record_absent:
            _record_absent(wanted, argv, options)
            return
        raise UserError(
            "no CUDA device here: run it where there is one; or --record-absent writes down that it was not measured, "
            "and --tiny --device cpu tries the script"
        )
    device = choose_device(options.device)
    for name in wanted:
        table = measure(name, sizes[name], options, device)
        publish("gpu", [table], device=device, command=argv, folder=options.results)


COLUMNS = ("size", "side", "computes", "ms/step", "tokens/s", "MFU", "MFU of measured", "above, GB", "peak, GB", "x plain")


def _record_absent(names: Sequence[str], argv: Sequence[str], options: Options) -> None:
    sides = ("ours", "plain, compiled")
    rows = [(name, side, *["not measured"] * (len(COLUMNS) - 2)) for name in names for side in sides]
    notes = ("not measured: no GPU was at hand; the script was tried on a CPU with `--tiny --device cpu`",)
    table = Table("GPU: not measured", COLUMNS, rows, notes)
    publish("gpu", [table], device=torch.device("cpu"), command=argv, folder=options.results)


def cases_of(name: str, size: Size, options: Options) -> dict[str, Spec]:
    """What is measured for a size, ours first."""
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
    seconds: tuple[float, ...]  # a step, of each block
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
            torch.cuda.empty_cache()  # the child wants the memory
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
        f"{spec.batch} x {size.block_size} tokens a pass, {spec.accumulation} passes a step; "
        f"{flops_per_token(spec.config) / 1e9:.3g} GFLOP a token, attention's full square counted",
        f"bfloat16 matrix product measured: {fastest / 1e12:,.3g} TFLOP/s; data sheet: "
        + ("unknown for this device" if sheet is None else f"{sheet / 1e12:,.0f} TFLOP/s"),
        "above: peak memory above weights and optimizer, gradients included; x plain: speed beside the compiled plain loop",
    ]
    if "ours" in done and "plain, compiled" in done:
        ours, plain = done["ours"].curve, done["plain, compiled"].curve
        notes.append(
            f"losses of the first {len(ours)} steps ({plain[0]:.4f} to {plain[-1]:.4f} in the plain loop) differ by at most "
            f"{closest_curves(ours, plain):.1e} nats; padded ids, which only the plain loop predicts, are a part of that"
        )
    notes += [f"{case}: {why}" for case, why in lost.items()]
    return Table(f"GPU: {name}", COLUMNS, rows, notes)


def _run(spec: Spec, label: str, options: Options) -> _Measured:
    say(f"{label}: set-up and compilation")
    with Child(spec, label) as child:
        curve = child.steps(CURVE_STEPS).losses
        seconds = tuple(child.steps(options.block).seconds for _ in range(options.blocks))
        memory = child.steps(2, memory=True)
        speed = spec.tokens_per_step / statistics.median(seconds)
        say(f"{label}: {spread([1e3 * value for value in seconds], '{:.1f}')} ms a step, {speed:,.0f} tokens/s")
        return _Measured(spec, child.facts, curve, seconds, memory.memory_above, memory.memory_peak)


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
