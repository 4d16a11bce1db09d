"""`bardling plan RECIPE`: what a run will need, before it is started."""

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import tyro

from bardling.cli.dial import turned
from bardling.cli.parse import parse
from bardling.config import RunConfig
from bardling.configfile import load_recipe, recipe_names
from bardling.errors import UserError, closest
from bardling.model.arithmetic import forward_table
from bardling.model.peaks import ACCELERATORS, TERA, find_accelerator
from bardling.model.scaling import chinchilla_optimal
from bardling.planner import Plan, plan

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@dataclass(frozen=True)
class PlanArgs:
    """Options of `bardling plan`."""

    gpu: str = ""
    """Device to plan for, such as A100-80GB or H100-SXM; unset takes this machine's."""
    gpus: int = 1
    """Devices, one process each."""
    mfu: float = 0.4
    """Part of the device's peak that the run will reach (measured: the log's mfu, which leaves recomputation out)."""
    peak_tflops: float | None = None
    """Dense peak of one device in the run's precision (TFLOP/s), for devices that are not in the table."""
    memory_gb: float | None = None
    """Memory of one device (10^9 bytes)."""
    dataset_tokens: float | None = None
    """Tokens in the training split, for the number of epochs, as in 9.0e9; unset takes a prepared folder's."""
    budget_flops: float | None = None
    """Ask what is optimal for this many FLOPs."""
    budget_hours: float | None = None
    """Ask what is optimal for this much time on these devices (hours)."""
    sweep: bool = False
    """Also list the optimum for budgets from 1e17 to 1e26 FLOPs."""
    config: Annotated[RunConfig, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff] = field(default_factory=RunConfig)


@dataclass(frozen=True)
class _Device:
    name: str = ""
    type: str = "cuda"
    precision: str | None = None
    memory: int | None = None
    peak: float | None = None
    source: str = "maker's figure"


def run(argv: Sequence[str]) -> None:
    """Parse, plan, print."""
    recipe, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("", argv)
    if not recipe and not any(word in ("-h", "--help") for word in rest):
        raise UserError(f"bardling plan RECIPE [options]: name a recipe first: {', '.join(recipe_names())}, or a TOML file")
    args = parse(
        PlanArgs,
        rest,
        prog=f"bardling plan {recipe or 'RECIPE'}",
        description=(
            "What a run will need: parameters, FLOPs, memory, disk, time, and what scaling laws call optimal. RECIPE is a "
            f"shipped name ({', '.join(recipe_names())}) or a TOML file; options override its values."
        ),
        default=PlanArgs(config=load_recipe(recipe, whole=not rest) if recipe else RunConfig()),
    )
    main(dataclasses.replace(args, config=turned(args.config, recipe, rest)), recipe)


def main(args: PlanArgs, recipe: str) -> None:
    """Print the plan of `args.config`."""
    from rich.console import Console
    from rich.markup import escape

    for name in ("peak_tflops", "memory_gb", "dataset_tokens"):
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UserError(f"--{name} {value}: must be above 0")
    device = _named_device(args.gpu, args) if args.gpu else _this_device(args)
    result = plan(
        args.config,
        world_size=args.gpus,
        device_name=device.name,
        device_type=device.type,
        device_memory=device.memory,
        precision=device.precision,
        peak_flops=device.peak,
        mfu=args.mfu,
        dataset_tokens=None if args.dataset_tokens is None else max(1, round(args.dataset_tokens)),
        budget_flops=args.budget_flops,
        budget_seconds=None if args.budget_hours is None else args.budget_hours * 3600,
    )
    console = Console(highlight=False)
    model = result.model
    console.print(
        f"[bold]{escape(recipe)}[/]: {count(result.parameters)} parameters; {model.n_layer} layers, {model.n_head} heads, "
        f"width {model.n_embd}, context {model.block_size:,}, vocabulary {model.vocab_size:,}"
    )
    _parameters(console, result)
    _arithmetic(console, result)
    _run(console, result, device)
    _scaling(console, result, args)
    for note in result.notes:
        console.print(f"[yellow]note:[/] {escape(note)}")


def _named_device(name: str, args: PlanArgs) -> _Device:
    """The device that `--gpu` names; its precision follows the recipe, or what the device has."""
    found = find_accelerator(name)
    if found is None and args.peak_tflops is None:
        keys = [device.key for device in ACCELERATORS]
        variants = [key for key in keys if key.lower().startswith(name.lower())]
        if variants:
            raise UserError(f"--gpu {name}: which one? Choose {' or '.join(variants)}")
        raise UserError(
            f"--gpu {name}: no peak is known for it{closest(name, keys)}; give --peak_tflops, or one of {', '.join(keys)}"
        )
    precision = None
    if args.config.precision == "auto" and found is not None and found.bfloat16 is None:
        precision = "float16"
    return _given(_Device(name, precision=precision), args)


def _given(device: _Device, args: PlanArgs) -> _Device:
    """`device`, with what the user states about it in place of what is known."""
    return _Device(
        name=device.name,
        type=device.type,
        precision=device.precision,
        memory=device.memory if args.memory_gb is None else round(args.memory_gb * 1e9),
        peak=device.peak if args.peak_tflops is None else args.peak_tflops * TERA,
        source=device.source if args.peak_tflops is None else "as given",
    )


def _this_device(args: PlanArgs) -> _Device:
    """The device that the run would use on this machine; a CPU's peak is measured, in a tenth of a second."""
    from bardling.distributed.device import DTYPES, choose_device, choose_precision, device_name, matmul_flops

    device = choose_device(args.config.device)
    precision = choose_precision(args.config.precision, device, fp8_but=[] if args.config.fp8 else None).name
    name = device_name(device)
    if device.type == "cpu":
        try:
            memory: int | None = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (ValueError, OSError, AttributeError):
            memory = None  # a system without these names; then the memory is simply not known
        peak = None if args.peak_tflops is not None else matmul_flops(device, DTYPES[precision])
        return _given(_Device(name, "cpu", precision, memory, peak, "measured just now"), args)
    memory = None
    if device.type == "cuda":
        import torch

        memory = torch.cuda.get_device_properties(device).total_memory
    return _given(_Device(name, device.type, precision, memory), args)


def _table(title: str, *columns: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=i > 0)
    return table


def _parameters(console: "Console", result: Plan) -> None:
    table = _table("Parameters", "part", "each", "copies", "total", "share")
    for part in result.components:
        padding = part.name == "embedding.padding"
        if padding and not part.total:
            continue
        share = "not counted" if padding else f"{part.total / result.parameters:.1%}"
        table.add_row(part.name, f"{part.each:,}", str(part.copies), f"{part.total:,}", share)
    table.add_section()
    table.add_row("all blocks", "", "", f"{result.block_parameters:,}", f"{result.block_parameters / result.parameters:.1%}")
    table.add_row("[bold]model", "", "", f"[bold]{result.parameters:,}", "100.0%")
    console.print()
    console.print(table)


def _arithmetic(console: "Console", result: Plan) -> None:
    rows = forward_table(result.model)
    forward = sum(row.forward for row in rows)
    table = _table(f"FLOPs of a sequence of {result.model.block_size:,} tokens", "product", "forward", "backward", "share")
    for row in rows:
        table.add_row(row.name, f"{row.forward:,}", f"{row.backward:,}", f"{row.forward / forward:.1%}")
    table.add_section()
    table.add_row("sum", f"{forward:,}", f"{2 * forward:,}", "100.0%")
    table.add_row("[bold]forward and backward", "", f"[bold]{3 * forward:,}", "")
    console.print()
    console.print(table)


def _run(console: "Console", result: Plan, device: _Device) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    name = escape(result.device_name)
    batch, memory = result.batch, result.memory
    activations = memory.activations
    table = Table(title="The run", title_justify="left", title_style="bold", box=box.SIMPLE, show_header=False, show_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    passes = f"{batch.world_size} x {batch.accumulation} x {batch.micro_batch} sequences of {result.model.block_size:,}"
    table.add_row("tokens a step", f"{batch.tokens_per_step:,}", f"processes x passes x micro-batch: {passes}")
    if len(batch.stages) > 1:
        for stage, steps in batch.spans(0, batch.steps):
            rows = f"{stage.samples * batch.block_size // stage.context} sequences of {stage.context:,}"
            passes = f"{batch.world_size} x {stage.accumulation} passes, {rows}"
            begin = stage.first_step + 1
            table.add_row(f"  steps {begin:,}-{begin + steps - 1:,}", f"{stage.samples * batch.block_size:,}", passes)
    table.add_row("tokens in all", count(result.total_tokens), f"{batch.steps:,} steps")
    if result.epochs is not None:
        table.add_row("epochs", f"{result.epochs:.3g}", f"of {count(result.dataset_tokens or 0)} tokens")
    palm = result.palm_flops_per_token
    table.add_row("FLOPs a token", si(result.flops_per_token, "FLOP"), f"PaLM's 6N + 12LHQT: {si(palm, 'FLOP')}")
    table.add_row("FLOPs a step", si(result.flops_per_step, "FLOP"))
    part = result.flops_validation / result.flops
    table.add_row("FLOPs of the run", f"{result.flops:.3g}", f"{part:.2%} of them for validation")
    if result.flops_recomputed:
        more = result.flops_recomputed / result.flops_training
        table.add_row("FLOPs recomputed", f"{result.flops_recomputed:.3g}", f"{more:.0%} more, which MFU does not count")
    table.add_section()
    table.add_row("weights", size(memory.weights), "float32; each process holds all of this")
    table.add_row("gradients", size(memory.gradients), "float32")
    muon = "Muon: a float32 moment of each matrix, two of all else" if result.optimizer == "muon" else ""
    table.add_row("optimizer", size(memory.optimizer), muon or "AdamW: two float32 moments")
    if memory.ema:
        table.add_row("running mean", size(memory.ema), "of the weights, float32")
    table.add_row(
        "activations", size(activations.blocks + activations.ends), f"of {batch.micro_batch} sequences, {result.precision}"
    )
    if activations.weight_copies:
        table.add_row("weight copies", size(activations.weight_copies), f"matrices in {result.precision}")
    if activations.again:
        table.add_row(
            "one block again", size(activations.again), "in the backward pass; not at the same time as copies and head"
        )
    table.add_row("head", size(activations.head), "one chunk of logits at a time")
    known = "memory of the device unknown"
    if result.device_memory is not None:
        known = f"{memory.total / result.device_memory:.0%} of {size(result.device_memory)}"
        known = f"[red]{known}: does not fit[/]" if memory.total > result.device_memory else known
    table.add_row("[bold]memory in all", f"[bold]{size(memory.total)}", known)
    table.add_section()
    table.add_row(
        "checkpoint",
        size(result.checkpoint_bytes),
        f"weights and optimizer{', the running mean too' if memory.ema else ''}, float32",
    )
    table.add_row("[bold]disk", f"[bold]{size(result.disk_bytes)}", f"at most {result.checkpoints_kept} checkpoints at once")
    table.add_section()
    if result.seconds is None or result.tokens_per_second is None or result.peak_flops is None:
        table.add_row("[bold]time", "[bold]unknown", f"no peak is known for {name or 'the device'}")
    else:
        table.add_row("device", f"{result.batch.world_size} x", name or "as given")
        table.add_row("peak of one", si(result.peak_flops, "FLOP/s"), f"{result.precision}, dense; {device.source}")
        at = f"at {result.mfu:.0%} MFU"
        if result.flops_recomputed:
            at = f"at {result.mfu:.0%} of the peak: {result.mfu * result.model_part:.0%} MFU, and the recomputation"
        table.add_row("speed", f"{count(result.tokens_per_second)} tokens/s", at)
        table.add_row(
            "[bold]time", f"[bold]{duration(result.seconds)}", f"{count(result.seconds * batch.world_size / 3600)} device-hours"
        )
    console.print()
    console.print(table)


def _scaling(console: "Console", result: Plan, args: PlanArgs) -> None:
    comparison = result.comparison
    asked = args.budget_flops is not None or args.budget_hours is not None
    what = f"the budget of {comparison.flops:.3g} FLOPs" if asked else f"this recipe's 6ND = {comparison.flops:.3g} FLOPs"
    table = _table(f"Compute-optimal for {what}", "", "N", "D (tokens)", "D / N", "loss*")
    rows = [(best.fit, best.parameters, best.tokens, best.loss) for best in comparison.optima]
    rows.append(("this recipe", float(comparison.parameters), float(comparison.tokens), comparison.loss))
    for name, n, d, loss in rows:
        table.add_row(name, count(n), count(d), count(d / n), f"{loss:.2f}")
    console.print()
    console.print(table)
    console.print("[dim]* nats per token that approach 3's fit predicts for web text; not comparable across tokenizers[/]")
    console.print(f"This recipe {comparison.verdict}.")
    if comparison.steps_in_budget is not None:
        console.print(f"The budget pays for {comparison.steps_in_budget:,} steps of this recipe.")
    if args.sweep:
        table = _table(
            "Compute-optimal by budget", "FLOPs", "N, approach 2", "D, approach 2", "N, approach 3", "D, approach 3", "loss*"
        )
        for exponent in range(17, 27):
            two, three = chinchilla_optimal(10.0**exponent)
            sizes = (count(two.parameters), count(two.tokens), count(three.parameters), count(three.tokens))
            table.add_row(f"1e{exponent}", *sizes, f"{three.loss:.2f}")
        console.print()
        console.print(table)


def count(value: float) -> str:
    """A number of things with three digits and a suffix: 124M."""
    return _scaled(value, ("", "k", "M", "B", "T")).replace(" ", "")


def si(value: float, unit: str) -> str:
    """A quantity with three digits and an SI prefix: 854 MFLOP."""
    return _scaled(value, tuple(prefix + unit for prefix in ("", "k", "M", "G", "T", "P", "E")))


def size(value: float) -> str:
    """Bytes with three digits and a decimal prefix: 1.49 GB."""
    return _scaled(value, ("B", "kB", "MB", "GB", "TB", "PB"))


def _scaled(value: float, units: Sequence[str]) -> str:
    """`value` with three digits and the unit, each of which is 1000 times the one before, that leaves 1 to 999 of it."""
    rank = 0
    while rank + 1 < len(units) and float(f"{value:.3g}") >= 1000:
        value, rank = value / 1000, rank + 1
    text = f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"
    return f"{text} {units[rank]}"


def duration(seconds: float) -> str:
    """Time in the unit that people would use: 45 s, 12 min, 3.5 h, 4.2 days."""
    for limit, unit, length in ((120, "s", 1), (7200, "min", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds / 86_400:,.1f} days"
