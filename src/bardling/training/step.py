"""One optimizer step: forward and backward over the step's batches, clipping, update.

The loss of a step is the objective's loss sum divided by its denominator over all processes, which is known before the first
forward pass. Gradients are therefore exact for every split into processes and forward passes, also with masked targets.
Nothing here waits for the device: losses and norms stay tensors until something prints them.

With `limits`, the update is skipped if the loss or the gradient norm exceeds them or is NaN; weights and optimizer stay as they
were. The decision uses sums over all processes, so all agree. On CUDA it stays on the device: the optimizer receives it as the
flag by which mixed precision skips updates (PyTorch's fused AdamW and our Muon support it). Optimizers without that flag, and
other devices, let the host decide, which waits for the step.

A run on CUDA waits only here: the guard reads the metrics of the step before the one just launched, so the host is at most two
steps ahead; the log reads those of every `log_every`-th step; a run with a deadline measures its speed now and then;
validation, samples and saving begin when the steps have finished.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bardling.data.batches.loader import Batch
from bardling.distributed.context import Context
from bardling.distributed.device import Precision
from bardling.distributed.pipeline import Pipeline
from bardling.distributed.sharding import MODEL_AXES
from bardling.distributed.wrap import gradient_sync
from bardling.errors import Terminated
from bardling.optim.build import set_learning_rate
from bardling.planning.layout import AXES
from bardling.training.objective import Forward, Objective, Sums
from bardling.training.recovery.signals import Stopped
from bardling.training.recovery.spikes import Limits
from bardling.training.state import TrainState


@dataclass(frozen=True)
class StepResult:
    """Metrics of one step over all processes; the tensors are scalars on the device."""

    loss: Tensor  # loss_sum / tokens
    loss_sum: Tensor  # (nats, for next-token loss)
    tokens: Tensor  # the objective's denominator: target tokens, for next-token loss
    sums: Mapping[str, Tensor]  # the objective's further sums
    grad_norm: Tensor  # before clipping
    lr: float
    bad: Tensor | None = None  # 1 where the update was skipped; None without limits


@dataclass(frozen=True)
class StepSettings:
    """What stays the same from step to step."""

    objective: Objective
    precision: Precision
    context: Context
    grad_clip: float = 1.0  # largest gradient norm; 0 disables clipping
    whole_gradients: bool = False  # of a sharded model: reduce gradients only after the last pass
    keep_gradients: bool = False  # zero gradients instead of freeing them, so that all passes accumulate in the same memory
    stop_requested: Callable[[], bool] = lambda: False  # called before each forward pass (several processes: before each step)
    interruptible: Callable[[], AbstractContextManager[None]] = nullcontext  # a pass may raise `Terminated`, to stop
    skip_on_device: bool | None = None  # let the device decide whether to skip, if the optimizer supports it; None: on CUDA


def train_step(
    state: TrainState,
    batches: Sequence[Batch],
    settings: StepSettings,
    *,
    forward: Forward,
    lr: float,
    limits: Limits | None = None,
) -> StepResult:
    """Update `state` by one step on `batches`, this process's share of the step.

    Args:
        forward: `state.model`, or its compiled or distributed wrapper.
        lr: learning rate of this step.
        limits: largest loss and gradient norm for which the update is applied; None: it always is.

    Raises:
        Stopped: `stop_requested` returned true in any process; the state is that before the step.
    """
    context, objective = settings.context, settings.objective
    state.zero_gradients(keep=settings.keep_gradients)
    if settings.keep_gradients:
        for parameter in state.model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
    tokens = context.sum(torch.stack([objective.denominator(batch) for batch in batches]).sum())
    reduce_all = state.shards is not None and not settings.whole_gradients
    totals = _Totals()

    def loss(forward: Forward, batch: Batch) -> Tensor:
        with settings.precision.autocast():
            sums = objective(forward, batch)
        totals.add(sums)
        # DDP averages gradients over data-parallel processes; the factor turns that into the sum over all tokens' mean.
        scaled = sums.loss * (context.data_size / tokens)
        return scaled if state.scaler is None else state.scaler.scale(scaled)

    pipeline = forward if isinstance(forward, Pipeline) else None
    for number, batch in enumerate(batches[:1] if pipeline else batches):
        # A vote waits for all processes, so several hold one per step.
        if (number == 0 or context.world_size == 1) and context.any(settings.stop_requested()):
            state.zero_gradients()
            raise Stopped
        which = f"the {len(batches)} passes" if pipeline else f"pass {number + 1} of {len(batches)}"
        context.activity(f"{which} of step {state.step + 1}", shared=True)
        try:
            with settings.interruptible(), gradient_sync(forward, on=reduce_all or number == len(batches) - 1):
                if pipeline is not None:
                    pipeline.run(batches, loss, settings.precision.autocast)
                else:
                    loss(forward, batch).backward()  # type: ignore[no-untyped-call]
        except Terminated:
            state.zero_gradients()
            raise Stopped from None
    if pipeline is not None:
        totals.sums, totals.names = pipeline.share(totals.sums, totals.names)
    assert totals.sums is not None
    loss_sum, *others = context.sum(totals.sums)
    norm, bad = _update(state, settings, loss_sum / tokens, lr, limits)
    return StepResult(loss_sum / tokens, loss_sum, tokens, dict(zip(totals.names, others, strict=True)), norm, lr, bad)


@dataclass
class _Totals:
    """What the passes of a step have added up to."""

    sums: Tensor | None = None  # loss sum, then the objective's further sums
    names: tuple[str, ...] = ()  # of the further sums

    def add(self, sums: Sums) -> None:
        found = torch.stack([sums.loss.detach(), *(value.to(sums.loss.dtype) for value in sums.others.values())])
        self.sums, self.names = found if self.sums is None else self.sums + found, tuple(sums.others)


def _update(
    state: TrainState, settings: StepSettings, loss: Tensor, lr: float, limits: Limits | None
) -> tuple[Tensor, Tensor | None]:
    """Clip and update unless a limit is exceeded; returns the gradient norm and whether the update was skipped."""
    if state.shards is not None:
        state.shards.collect_gradients()
    if state.scaler is not None:
        state.scaler.unscale_(state.optimizer)
    parameters = [parameter for parameter in state.parameters.values() if parameter.grad is not None]
    shards, named = state.shards, state.parameters.items()
    counted = [p.grad for name, p in named if p.grad is not None and (shards is None or shards.counts(name))]
    norm = nn.utils.get_total_norm(counted)
    if shards is not None:
        norm = settings.context.sum(norm.square(), MODEL_AXES).sqrt().to(loss.device)  # from host memory, if it is offloaded
    set_learning_rate(state.optimizer, lr)
    bad, on_device = None, False
    if limits is not None:
        # NaN is below no limit. The sum is a vote: processes must not disagree because of rounding.
        within = (loss <= limits.loss) & (norm <= limits.grad_norm)
        bad = (settings.context.sum((~within).float(), AXES) > 0).float()
        updates_there = all(parameter.device == bad.device for parameter in parameters)
        on_device = bad.is_cuda and updates_there if settings.skip_on_device is None else settings.skip_on_device
        on_device = on_device and getattr(state.optimizer, "_step_supports_amp_scaling", False)
    if bad is None or on_device or not bad.item():
        if settings.grad_clip:
            nn.utils.clip_grads_with_norm_(parameters, settings.grad_clip, norm)
        if on_device:
            # Gradients that overflow float16 make the norm infinite, so this flag covers the scaler's own.
            state.optimizer.found_inf = bad  # type: ignore[attr-defined]
            state.optimizer.step()
            del state.optimizer.found_inf  # type: ignore[attr-defined]
        elif state.scaler is None:
            state.optimizer.step()
        else:
            state.scaler.step(state.optimizer)
    if state.scaler is not None:
        state.scaler.update()
    return norm, bad


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Seed the global generator by (seed, step, `Context.dropout_rank`): a step draws the same masks after any restart."""
    torch.manual_seed((seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) % 2**63)
