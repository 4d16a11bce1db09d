"""`bardling bench RECIPE`: how fast a recipe trains on this machine."""

import dataclasses
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from bardling.cli.dial import turned
from bardling.cli.parse import parse
from bardling.cli.progress import Progress
from bardling.config import RunConfig
from bardling.configfile import load_recipe, recipe_names
from bardling.errors import UserError
from bardling.monitor.format import count, percent, size_bytes

if TYPE_CHECKING:
    from rich.console import Console

    from bardling.bench import BenchResult

TOP_OPERATORS = 10


@dataclass(frozen=True)
class BenchOptions:
    """Options of `bardling bench`."""

    steps: int = 20
    """Optimizer steps to time."""
    warmup: int = 5
    """Steps before these, which pay for compilation and memory."""
    data: Literal["random", "real"] = "random"
    """Random tokens, or the recipe's own data (prepared first if need be)."""
    profile: Path | None = None
    """Folder for a trace of three more steps, which Perfetto, chrome://tracing and TensorBoard open."""
    config: Annotated[RunConfig, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff] = field(default_factory=RunConfig)


def run(argv: Sequence[str]) -> None:
    """Parse, measure, print."""
    from bardling.cli.nanogpt import bench_options, is_nanogpt
    from bardling.interop.nanogpt_keys import BENCH_KEYS

    if is_nanogpt(argv, BENCH_KEYS):
        main(bench_options(argv))
        return
    recipe, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("", argv)
    if not recipe and not any(word in ("-h", "--help") for word in rest):
        raise UserError(f"bardling bench RECIPE [options]: name a recipe first: {', '.join(recipe_names())}, or a TOML file")
    options = parse(
        BenchOptions,
        rest,
        prog=f"bardling bench {recipe or 'RECIPE'}",
        description=(
            "Measure step time, tokens a second, MFU and memory of a recipe on this machine; nothing is saved. RECIPE is a "
            f"shipped name ({', '.join(recipe_names())}) or a TOML file; options override its values."
        ),
        default=BenchOptions(config=load_recipe(recipe, whole=not rest) if recipe else RunConfig()),
    )
    main(dataclasses.replace(options, config=turned(options.config, recipe, rest)))


def main(options: BenchOptions) -> None:
    """Measure `options.config` and print the figures."""
    if options.profile is not None:
        # PyTorch's profiler reads this when torch is imported; below 6 it reports its own start and stop.
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    from bardling.bench import bench  # here, so that help answers without importing torch

    with Progress("measuring") as progress:
        result = bench(
            options.config,
            steps=options.steps,
            warmup=options.warmup,
            data=options.data,
            profile=options.profile,
            progress=progress,
        )
    show(result, options.data)


def show(result: "BenchResult", data: str) -> None:
    """Print a result as tables that fit into 80 columns."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    model, plan = result.model, result.plan
    console.print(
        f"[bold]{count(result.parameters)} parameters[/]; {model.n_layer} layers, {model.n_head} heads, width {model.n_embd}, "
        f"context {model.block_size:,}, vocabulary {model.vocab_size:,}"
    )
    console.print(f"{escape(result.device)}; {data} tokens")
    console.print(f"precision {result.precision.name} ({escape(result.precision.why)})")
    console.print(f"compile {'on' if result.compiled else 'off'} ({escape(result.compile_why)})")
    for note in result.notes:
        console.print(f"[yellow]note:[/] {escape(note)}")
    console.print()

    table = Table(box=box.SIMPLE, show_header=False, show_edge=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    seconds = sorted(result.step_seconds)
    passes = f"{plan.accumulation} x {plan.micro_batch} sequences of {model.block_size:,}"
    table.add_row("tokens a step", f"{plan.tokens_per_step:,}", f"passes x micro-batch: {passes}")
    table.add_row("[bold]step time", f"[bold]{ms(statistics.median(seconds))}", _spread(seconds))
    table.add_row("first step", ms(result.first_step_seconds), "with set-up" + (" and compilation" if result.compiled else ""))
    table.add_row("[bold]tokens a second", f"[bold]{count(result.tokens_per_second)}")
    table.add_row("FLOPs a token", f"{count(result.flops_per_token)}", "forward and backward, matrix products")
    table.add_row("speed", tflops(result.flops_per_second))
    if result.peak_flops is None or result.mfu is None:
        table.add_row("MFU by data sheet", "unknown", "no figure for this device")
    else:
        table.add_row("[bold]MFU by data sheet", f"[bold]{percent(result.mfu)}", f"of {tflops(result.peak_flops)}")
    products = f"of {tflops(result.matmul_flops)}, which matrix products reach"
    table.add_row("MFU as measured", percent(result.mfu_of_matmul), products)
    memory = "peak on the device" if result.precision.device_type == "cuda" else "of the whole process"
    table.add_row("memory", size_bytes(result.memory_bytes), memory)
    table.add_section()
    parts = {
        "data": (result.data_seconds, "waiting for batches"),
        "forward": (result.forward_seconds, ""),
        "backward": (result.backward_seconds, "and clipping"),
        "optimizer": (result.optimizer_seconds, ""),
    }
    whole = sum(part for part, _ in parts.values()) or 1.0
    for name, (part, what) in parts.items():
        table.add_row(name, ms(part), f"{percent(part / whole):>6}" + (f"  {what}" if what else ""))
    console.print(table)
    if result.trace is not None:
        _operators(console, result)
        console.print(f"trace: {escape(str(result.trace))}", soft_wrap=True)


def _operators(console: "Console", result: "BenchResult") -> None:
    """Print the operators that take the most time."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    console.print()
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("operator, on its own", no_wrap=True, max_width=44)
    for column in ("calls a step", "ms a step", "share"):
        table.add_column(column, justify="right", no_wrap=True)
    whole = sum(row.seconds for row in result.operators) or 1.0
    for row in result.operators[:TOP_OPERATORS]:
        table.add_row(escape(row.name), f"{row.calls:,.0f}", f"{row.seconds * 1e3:,.2f}", percent(row.seconds / whole))
    console.print(table)


def _spread(seconds: Sequence[float]) -> str:
    """The range of the steps' times, without the extremes where there are enough steps for that."""
    if len(seconds) < 10:
        return f"median; {len(seconds)} steps from {ms(seconds[0])} to {ms(seconds[-1])}"
    tenths = statistics.quantiles(seconds, n=10)
    return f"median; 8 of 10 between {ms(tenths[0])} and {ms(tenths[-1])}"


def ms(seconds: float) -> str:
    """`0.0123` -> `12.3 ms`, `1.234` -> `1.23 s`."""
    if seconds >= 0.9995:
        return f"{seconds:,.{1 if seconds >= 10 else 2}f} s"
    value = seconds * 1e3
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} ms"


def tflops(speed: float) -> str:
    """`1.8e11` -> `180 GFLOP/s`, `9.89e14` -> `989 TFLOP/s`."""
    scaled, unit = (speed / 1e12, "TFLOP/s") if speed >= 1e12 else (speed / 1e9, "GFLOP/s")
    return f"{scaled:.{0 if scaled >= 100 else 1 if scaled >= 10 else 2}f} {unit}"
