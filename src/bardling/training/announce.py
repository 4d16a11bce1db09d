"""Lines that a run prints before its first step: the model, the data, the device, and what was resolved."""

from pathlib import Path

import torch

from bardling.data.batches.order import SequenceOrder
from bardling.distributed.device import device_name
from bardling.planning.batching import TrainPlan
from bardling.training.resolve import ResolvedRun


def opening(run: ResolvedRun, order: SequenceOrder, parameters: int, device: torch.device) -> list[str]:
    """Model, steps, data, device, and what `auto` chose."""
    config, plan = run.config, run.plan
    epochs = plan.samples_before(plan.steps) / order.sequences_per_epoch
    passes = "pass" if plan.accumulation == 1 else "passes"
    where = f"{device_name(device)}" + (f" x {run.layout.world_size}" if run.layout.world_size > 1 else "")
    lines = [str(reason) for reason in run.reasons if reason.from_depth]
    lines.append(
        f"{parameters / 1e6:.2f}M parameters, {plan.steps:,} steps of {plan.samples_per_step} x {config.model.block_size} "
        f"tokens ({plan.accumulation} forward {passes} of {plan.micro_batch}), {epochs:.2f} epochs of {order.n_tokens:,} tokens"
    )
    if len(plan.stages) > 1:
        lines.append(f"batch and context grow: {plan.describe_stages()}")
    precision, compiled = run.why("precision"), run.why("compile")
    return [*lines, f"{where}; precision {config.precision} ({precision}); compile {config.compile} ({compiled})"]


def resumption(run: Path, step: int, plan: TrainPlan, *, deadline: bool) -> str:
    """Where a run resumes or, if it is finished, how to continue it. With a deadline, only the run itself can tell."""
    if step < plan.steps or deadline:
        return f"resuming {run} at step {step:,}" + ("" if deadline else f" of {plan.steps:,}")
    return f"{run} is finished: all {step:,} steps are complete; raise --train.steps to continue it"
