"""`bardling bench RECIPE`: measure training speed on this machine."""

import dataclasses
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bardling.cli.parse import note
from bardling.cli.recipe import Config, parse_recipe_command, with_depth
from bardling.cli.tables import Rows, columns, facts, shape, show, show_table, styled
from bardling.config import RunConfig
from bardling.monitor.format import count, ms, percent, si, size_bytes
from bardling.monitor.progress import ProgressBar

if TYPE_CHECKING:
    from bardling.tools.bench import BenchResult

TOP_OPERATORS = 10


@dataclass(frozen=True)
class BenchOptions:
    steps: int = 20
    """Optimizer steps to time."""
    warmup: int = 5
    """Untimed steps before these, which include compilation and memory allocation."""
    data: Literal["random", "real"] = "random"
    """Random tokens, or the recipe's data (prepared first if necessary)."""
    profile: Path | None = None
    """Folder for a profiler trace of three more steps, for Perfetto, chrome://tracing or TensorBoard."""
    config: Config = field(default_factory=RunConfig)


def run(argv: Sequence[str]) -> None:
    from bardling.cli.nanogpt import is_nanogpt
    from bardling.interop.nanogpt_keys import BENCH_KEYS

    if is_nanogpt(argv, BENCH_KEYS):
        main(nanogpt_options(argv))
        return
    recipe, rest, options = parse_recipe_command(
        "bench",
        BenchOptions,
        argv,
        "Measure step time, tokens per second, MFU and memory of a recipe on this machine. Nothing is saved.",
    )
    main(dataclasses.replace(options, config=with_depth(options.config, recipe, rest)))


def nanogpt_options(argv: Sequence[str]) -> BenchOptions:
    """Translate a nanoGPT benchmark command: GPT-2 124M, 10 warm-up steps, then 20 timed steps."""
    from bardling.data.tokens.token_files import NANOGPT_VOCAB
    from bardling.interop.nanogpt import run_config_from_nanogpt
    from bardling.interop.nanogpt_keys import BENCH_DEFAULTS, BENCH_KEYS
    from bardling.interop.python_config import read_nanogpt_arguments

    settings = read_nanogpt_arguments(argv, BENCH_KEYS, BENCH_DEFAULTS)
    values = {**BENCH_DEFAULTS, **settings}
    shared = settings.keys() & {"batch_size", "block_size", "bias", "device", "dtype", "compile"}
    fixed = {"gradient_accumulation_steps": 1, "dataset": "openwebtext", "learning_rate": 1e-4}
    config = run_config_from_nanogpt({key: settings[key] for key in shared} | fixed).config
    real = values["real_data"] and Path(config.data.source).is_dir()
    if values["real_data"] and not real:
        note("real_data = True, but data/openwebtext/train.bin does not exist: using random tokens instead")
    config = dataclasses.replace(
        config,
        seed=values["seed"],
        model=dataclasses.replace(config.model, vocab_size=NANOGPT_VOCAB),
        optim=dataclasses.replace(config.optim, weight_decay=1e-2),
    )
    folder = Path("bench_log") if values["profile"] else None
    return BenchOptions(steps=20, warmup=10, data="real" if real else "random", profile=folder, config=config)


def main(options: BenchOptions) -> None:
    if options.profile is not None:
        # The profiler reads this when torch is imported; at levels below 6 it logs its own start and stop.
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    from bardling.tools.bench import bench  # imports torch

    with ProgressBar("measuring") as progress:
        result = bench(**vars(options), progress=progress)
    show_result(result, options.data)


def show_result(result: "BenchResult", data: str) -> None:
    """Print a result as tables of at most 80 columns."""
    model = result.model
    size = f"; {shape(model)}, context {model.block_size:,}, vocabulary {model.vocab_size:,}"
    show(styled(f"{count(result.parameters)} parameters"), size)
    show(f"{result.device}; {data} tokens")
    show(f"precision {result.precision.name} ({result.precision.why})")
    show(f"compile {'on' if result.compiled else 'off'} ({result.compile_why})")
    for text in result.notes:
        show(styled("note:", "yellow"), f" {text}")
    show()
    show_table(_measurements(result))
    if result.trace is not None:
        show()
        show_table(_operators(result))
        show(f"trace: {result.trace}")


def _measurements(result: "BenchResult") -> Rows:
    model, plan = result.model, result.plan
    table = facts()
    micro_batches = f"{plan.accumulation} x {plan.micro_batch} sequences of {model.block_size:,}"
    table.add_row("tokens per step", f"{plan.tokens_per_step:,}", f"accumulation x micro-batch: {micro_batches}")
    table.add_row(styled("step time"), styled(ms(result.median_seconds)), _spread(result.step_seconds))
    table.add_row("first step", ms(result.first_step_seconds), "with set-up" + (" and compilation" if result.compiled else ""))
    table.add_row(styled("tokens per second"), styled(count(result.tokens_per_second)))
    table.add_row("FLOPs per token", count(result.flops_per_token), "forward and backward, matrix multiplications")
    table.add_row("speed", si(result.flops_per_second, "FLOP/s"))
    if result.peak_flops is None or result.mfu is None:
        why = (
            "no vendor spec for this device"
            if result.peak_flops is None
            else "faster than the vendor spec, which is wrong here"
        )
        table.add_row("MFU (vendor peak)", "unknown", why)
    else:
        table.add_row(styled("MFU (vendor peak)"), styled(percent(result.mfu)), f"of {si(result.peak_flops, 'FLOP/s')}")
    measured = f"of {si(result.matmul_flops, 'FLOP/s')}, measured for matmul"
    if result.mfu_of_matmul is None:
        table.add_row("MFU (measured peak)", "unknown", "faster than the matmul measured before: the machine was busy")
    else:
        table.add_row("MFU (measured peak)", percent(result.mfu_of_matmul), measured)
    memory = "peak on the device" if result.precision.device_type == "cuda" else "peak of the whole process"
    table.add_row("memory", "unknown" if result.memory_bytes is None else size_bytes(result.memory_bytes), memory)
    table.add_section()
    notes = {"data": "  waiting for batches", "backward": "  and clipping"}
    total = sum(result.parts.values()) or 1.0
    for name, seconds in result.parts.items():
        table.add_row(name, ms(seconds), f"{percent(seconds / total):>6}{notes.get(name, '')}")
    return table


def _operators(result: "BenchResult") -> Rows:
    table = columns("operator (self time)", "calls per step", "ms per step", "fraction")
    total = sum(row.seconds for row in result.operators) or 1.0
    for row in result.operators[:TOP_OPERATORS]:
        table.add_row(row.name, f"{row.calls:,.0f}", f"{row.seconds * 1e3:,.2f}", percent(row.seconds / total))
    return table


def _spread(seconds: Sequence[float]) -> str:
    """The range of step times; with 10 or more steps, the 10th to 90th percentile."""
    if len(seconds) < 10:
        return f"median; {len(seconds)} steps from {ms(min(seconds))} to {ms(max(seconds))}"
    tenths = statistics.quantiles(seconds, n=10)
    return f"median; 8 of 10 between {ms(tenths[0])} and {ms(tenths[-1])}"
