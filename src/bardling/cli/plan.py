"""`bardling plan RECIPE`: estimate what a run needs before starting it."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.text import Text

from bardling.cli.recipe import Config, parse_recipe_command, with_depth
from bardling.cli.tables import Rows, columns, facts, shape, show, show_table, styled
from bardling.config import RunConfig
from bardling.errors import UserError, closest
from bardling.monitor.format import count, duration, si, size_bytes
from bardling.planning.costs import forward_table
from bardling.planning.devices import ACCELERATORS, TERA, find_accelerator
from bardling.planning.layout import sharded_bytes
from bardling.planning.plan import Plan, plan
from bardling.planning.scaling_laws import chinchilla_optimal


@dataclass(frozen=True)
class PlanOptions:
    gpu: str = ""
    """Device to plan for, such as A100-80GB or H100-SXM; default: the device of this machine."""
    gpus: int = 1
    """Number of devices, with one process each."""
    mfu: float = 0.4
    """Expected fraction of the device's peak; a run logs what it reaches as mfu (which excludes recomputation)."""
    peak_tflops: float | None = None
    """Dense peak of one device in the run's precision (TFLOP/s); required for an unknown device."""
    memory_gb: float | None = None
    """Memory of one device (10^9 bytes)."""
    dataset_tokens: float | None = None
    """Tokens in the training split, such as 9.0e9, to compute epochs; default: those of a prepared data.source."""
    budget_flops: float | None = None
    """Report the compute-optimal model for this many FLOPs."""
    budget_hours: float | None = None
    """Report the compute-optimal model for this much time on these devices (hours)."""
    sweep: bool = False
    """Also list the optima for budgets from 1e17 to 1e26 FLOPs."""
    config: Config = field(default_factory=RunConfig)


@dataclass(frozen=True)
class _Device:
    name: str = ""
    type: str = "cuda"
    precision: str | None = None
    memory: int | None = None
    peak: float | None = None
    source: str = "vendor spec"


def run(argv: Sequence[str]) -> None:
    recipe, rest, args = parse_recipe_command(
        "plan",
        PlanOptions,
        argv,
        "Estimate what a run needs: parameters, FLOPs, memory, disk and time, and compare it with compute-optimal training.",
    )
    args = dataclasses.replace(args, config=with_depth(args.config, recipe, rest))
    for name in ("peak_tflops", "memory_gb", "dataset_tokens"):
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UserError(f"--{name} {value}: must be finite and greater than 0")
    device = _named_device(args.gpu, args) if args.gpu else _this_device(args)
    if args.memory_gb is not None:
        device = dataclasses.replace(device, memory=round(args.memory_gb * 1e9))
    if args.peak_tflops is not None:
        device = dataclasses.replace(device, peak=args.peak_tflops * TERA, source="as given")
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
    model = result.model
    size = f": {count(result.parameters)} parameters; {shape(model)}, "
    show(styled(recipe), size, f"context {model.block_size:,}, vocabulary {model.vocab_size:,}")
    for table in (_parameters(result), _flops(result), _run(result, device)):
        show()
        show_table(table)
    _scaling(result, args)
    for note in result.notes:
        show(styled("note:", "yellow"), f" {note}")


def _named_device(name: str, args: PlanOptions) -> _Device:
    """The device named by `--gpu`; without bfloat16 support, `precision = "auto"` means float16 on it."""
    found = find_accelerator(name)
    if found is None and args.peak_tflops is None:
        keys = [device.key for device in ACCELERATORS]
        variants = [key for key in keys if key.lower().startswith(name.lower())]
        if variants:
            raise UserError(f"--gpu {name}: is ambiguous; choose {' or '.join(variants)}")
        raise UserError(
            f"--gpu {name}: unknown device{closest(name, keys)}; choose from {', '.join(keys)}, or give --peak_tflops"
        )
    float16 = args.config.precision == "auto" and found is not None and found.bfloat16 is None
    return _Device(name, precision="float16" if float16 else None)


def _this_device(args: PlanOptions) -> _Device:
    """The device that the run would use on this machine; a CPU's peak is measured, which takes 0.1 s."""
    from bardling.distributed.device import DTYPES, choose_device, choose_precision, device_name, matmul_flops

    device = choose_device(args.config.device)
    precision = choose_precision(args.config.precision, device, fp8_excluded=[] if args.config.fp8 else None).name
    memory, peak, source = None, None, "vendor spec"
    if device.type == "cpu":
        source = "measured just now"
        with contextlib.suppress(ValueError, OSError, AttributeError):  # some systems do not tell
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if args.peak_tflops is None:
            peak = matmul_flops(device, DTYPES[precision])
    elif device.type == "cuda":
        import torch

        memory = torch.cuda.get_device_properties(device).total_memory
    return _Device(device_name(device), device.type, precision, memory, peak, source)


def _parameters(result: Plan) -> Rows:
    table = columns("component", "each", "copies", "total", "fraction", title="Parameters")
    for part in result.components:
        padding = part.name == "embedding.padding"
        if padding and not part.total:
            continue
        fraction = "not counted" if padding else f"{part.total / result.parameters:.1%}"
        table.add_row(part.name, f"{part.each:,}", str(part.copies), f"{part.total:,}", fraction)
    table.add_section()
    table.add_row("all blocks", "", "", f"{result.block_parameters:,}", f"{result.block_parameters / result.parameters:.1%}")
    table.add_row(styled("model"), "", "", styled(f"{result.parameters:,}"), "100.0%")
    return table


def _flops(result: Plan) -> Rows:
    rows = forward_table(result.model)
    forward = sum(row.total for row in rows)
    title = f"FLOPs per sequence of {result.model.block_size:,} tokens"
    table = columns("matmul", "forward", "backward", "fraction", title=title)
    for row in rows:
        table.add_row(row.name, f"{row.total:,}", f"{2 * row.total:,}", f"{row.total / forward:.1%}")
    table.add_section()
    table.add_row("total", f"{forward:,}", f"{2 * forward:,}", "100.0%")
    table.add_row(styled("forward and backward"), "", styled(f"{3 * forward:,}"), "")
    return table


def _run(result: Plan, device: _Device) -> Rows:
    table = facts("The run")
    _add_work(table, result)
    table.add_section()
    _add_memory(table, result)
    table.add_section()
    stored = f"weights, optimizer{' and EMA' if result.memory.ema else ''}, float32"
    table.add_row("checkpoint", size_bytes(result.checkpoint_bytes), stored)
    disk = styled(size_bytes(result.disk_bytes))
    table.add_row(styled("disk"), disk, f"at most {result.checkpoints_kept} checkpoints at once")
    table.add_section()
    _add_time(table, result, device)
    return table


def _add_work(table: Rows, result: Plan) -> None:
    batch = result.batch
    product = f"{batch.data_size} x {batch.accumulation} x {batch.micro_batch} sequences of {result.model.block_size:,}"
    table.add_row("tokens per step", f"{batch.tokens_per_step:,}", f"processes x accumulation x micro-batch: {product}")
    if len(batch.stages) > 1:
        for stage, steps in batch.spans(0, batch.steps):
            sequences = f"{stage.samples * batch.block_size // stage.context} sequences of {stage.context:,}"
            product = f"{batch.data_size} processes x {stage.accumulation}, {sequences}"
            first = stage.first_step + 1
            table.add_row(f"  steps {first:,}-{first + steps - 1:,}", f"{stage.samples * batch.block_size:,}", product)
    table.add_row("total tokens", count(result.total_tokens), f"{batch.steps:,} steps")
    if result.epochs is not None:
        table.add_row("epochs", f"{result.epochs:.3g}", f"of {count(result.dataset_tokens or 0)} tokens")
    palm = result.palm_flops_per_token
    table.add_row("FLOPs per token", si(result.flops_per_token, "FLOP"), f"PaLM's 6N + 12LHQT: {si(palm, 'FLOP')}")
    table.add_row("FLOPs per step", si(result.flops_per_step, "FLOP"))
    validation = result.flops_validation / result.flops
    table.add_row("total FLOPs", f"{result.flops:.3g}", f"{validation:.2%} of them for validation")
    if result.flops_recomputed:
        more = result.flops_recomputed / result.flops_training
        table.add_row("FLOPs recomputed", f"{result.flops_recomputed:.3g}", f"{more:.0%} extra, not counted in MFU")


def _add_memory(table: Rows, result: Plan) -> None:
    batch, memory = result.batch, result.memory
    activations, total = memory.activations, sharded_bytes(memory, result.layout)
    muon = "Muon: one float32 moment per matrix, two for the rest" if result.config.optim.name == "muon" else ""
    sequences = f"{batch.micro_batch} sequence{'s' if batch.micro_batch > 1 else ''}"
    rows = (
        ("weights", memory.weights, f"float32; {'a part' if result.layout.divided else 'replicated'} in every process"),
        ("gradients", memory.gradients, "float32"),
        ("optimizer", memory.optimizer, muon or "AdamW: two float32 moments"),
        ("EMA", memory.ema, "of the weights, float32"),
        ("activations", activations.blocks + activations.embedding_and_head, f"of {sequences}, {result.precision}"),
        ("weight copies", activations.weight_copies, f"matrices in {result.precision}"),
        ("recompute buffer", activations.recompute_buffer, "in backward; not at the same time as copies and head"),
        ("head", activations.head, "logits, one chunk at a time"),
    )
    if result.layout.world_size > 1:
        table.add_row("layout", str(result.layout), result.layout_why)
    layout, held = result.layout, ("weights", "gradients", "optimizer", "EMA")
    for name, size, note in rows:
        parts = layout.tensor * layout.context * (layout.shard * layout.pipeline if name in held else 1)
        if size:
            table.add_row(name, size_bytes(size // parts), note)
    fraction: str | Text = "device memory unknown"
    if result.device_memory is not None:
        fraction = f"{total / result.device_memory:.0%} of {size_bytes(result.device_memory)}"
        fraction = styled(f"{fraction}: does not fit", "red") if total > result.device_memory else fraction
    table.add_row(styled("total memory"), styled(size_bytes(total)), fraction)


def _add_time(table: Rows, result: Plan, device: _Device) -> None:
    """The device's peak, and the time that the run takes at the expected MFU."""
    name = result.device_name
    if result.seconds is None or result.tokens_per_second is None or result.peak_flops is None:
        table.add_row(styled("time"), styled("unknown"), f"peak of {name or 'the device'} unknown: give --peak_tflops")
        return
    world_size = result.layout.world_size
    table.add_row("device", f"{world_size} x", name or "as given")
    table.add_row("peak per device", si(result.peak_flops, "FLOP/s"), f"{result.precision}, dense; {device.source}")
    at = f"at {result.mfu:.0%} MFU"
    if result.flops_recomputed:
        at = f"at {result.mfu:.0%} of the peak: {result.mfu * result.model_fraction:.0%} MFU plus recomputation"
    table.add_row("speed", f"{count(result.tokens_per_second)} tokens/s", at)
    hours = f"{count(result.seconds * world_size / 3600)} device-hours"
    table.add_row(styled("time"), styled(duration(result.seconds)), hours)


def _scaling(result: Plan, args: PlanOptions) -> None:
    comparison = result.comparison
    budget = f"this recipe's 6ND = {comparison.flops:.3g} FLOPs"
    if args.budget_flops is not None or args.budget_hours is not None:
        budget = f"the budget of {comparison.flops:.3g} FLOPs"
    table = columns("", "N", "D (tokens)", "D / N", "loss*", title=f"Compute-optimal for {budget}")
    rows = [(best.fit, best.parameters, best.tokens, best.loss) for best in comparison.optima]
    for name, n, d, loss in [*rows, ("this recipe", comparison.parameters, comparison.tokens, comparison.loss)]:
        table.add_row(name, count(n), count(d), count(d / n), f"{loss:.2f}")
    show()
    show_table(table)
    show(styled("* nats per token on web text as predicted by approach 3; not comparable across tokenizers", "dim"))
    show(f"This recipe {comparison.verdict}.")
    if comparison.steps_in_budget is not None:
        show(f"The budget is enough for {comparison.steps_in_budget:,} steps of this recipe.")
    if args.sweep:
        approaches = ("N, approach 2", "D, approach 2", "N, approach 3", "D, approach 3")
        table = columns("FLOPs", *approaches, "loss*", title="Compute-optimal by budget")
        for exponent in range(17, 27):
            two, three = chinchilla_optimal(10.0**exponent)
            sizes = (count(two.parameters), count(two.tokens), count(three.parameters), count(three.tokens))
            table.add_row(f"1e{exponent}", *sizes, f"{three.loss:.2f}")
        show()
        show_table(table)
