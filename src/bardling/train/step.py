"""One optimizer step: forward and backward over the step's batches, clipping, update.

The loss of a step is the sum over its target tokens divided by their true number over all processes, which is known before
the first forward pass; gradients are therefore exact for every split into processes and forward passes, also where
targets are masked. Nothing here waits for the device: losses and norms stay tensors until somebody prints them.

With `limits`, the update of a step whose loss or gradient norm is above them (or no number) is left out: weights and optimizer
stay as they were. The decision is made from figures of all processes and agreed by all. On CUDA it stays on the device: the
optimizer takes it as the flag by which mixed precision leaves out updates (PyTorch's fused AdamW and our Muon do). Optimizers
that know no such flag, and other devices, let the host decide, which waits for the step.

What a run on CUDA waits for is elsewhere: the guard reads the figures of the step before the one just given to the device, so
that the host is at most two steps ahead; the log reads those of every `log_every`-th step; a run with a deadline measures its
speed now and then; validation, samples and saving begin when the steps are done.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bardling.data.loader import IGNORE, Batch
from bardling.distributed.context import Context
from bardling.distributed.device import Precision
from bardling.optim.build import set_learning_rate
from bardling.train.signals import Stopped
from bardling.train.spikes import Limits
from bardling.train.state import TrainState


@dataclass(frozen=True)
class StepResult:
    """Figures of one step over all processes; the tensors are scalars on the device."""

    loss: Tensor  # mean over the step's target tokens (nats)
    loss_sum: Tensor  # (nats)
    tokens: Tensor  # target tokens
    bytes: Tensor | None  # UTF-8 bytes of these tokens
    grad_norm: Tensor  # before clipping
    lr: float
    bad: Tensor | None = None  # 1 where the update was left out; None without limits


def train_step(
    state: TrainState,
    batches: Sequence[Batch],
    *,
    forward: nn.Module | Callable[..., Tensor],
    lr: float,
    grad_clip: float,
    precision: Precision,
    context: Context,
    keep_gradients: bool = False,
    bytes_per_token: Tensor | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
    limits: Limits | None = None,
    on_device: bool | None = None,
) -> StepResult:
    """Update `state` by one step on `batches`, this process's share of it.

    Args:
        forward: `state.model`, or its compiled or distributed wrapper: (inputs, targets, reduction="sum") -> summed loss; it
            gets `documents` too where a batch has them.
        lr: learning rate of this step.
        grad_clip: largest gradient norm; 0 for no clipping.
        keep_gradients: set gradients to zero rather than free them, so that passes add to the same memory.
        bytes_per_token: [vocab] UTF-8 bytes of each token, to measure bits per byte.
        stop_requested: asked before each forward pass.
        limits: the largest loss and gradient norm with which the update is made; absent: it always is.
        on_device: leave the decision to the device, where the optimizer can; absent: on CUDA.

    Raises:
        Stopped: `stop_requested`, in any process; the state is that before the step.
    """
    _clear_gradients(state, keep=keep_gradients)
    counts = [torch.stack([(batch.targets != IGNORE).sum() for batch in batches]).sum()]
    if bytes_per_token is not None:
        counts.append(torch.stack([_bytes(batch.targets, bytes_per_token) for batch in batches]).sum())
    totals = context.sum(torch.stack(counts))
    tokens = totals[0]
    loss_sum = torch.zeros((), device=context.device)
    for number, batch in enumerate(batches):
        if context.any(stop_requested()):
            state.optimizer.zero_grad(set_to_none=True)
            raise Stopped
        last = number == len(batches) - 1
        context.doing(f"pass {number + 1} of {len(batches)} of step {state.step + 1}")
        with contextlib.nullcontext() if last or not isinstance(forward, DistributedDataParallel) else forward.no_sync():
            with precision.autocast():
                loss = forward(batch.inputs, batch.targets, reduction="sum", **batch.known())
            # DDP averages gradients over the processes; the factor makes that the sum which the division by all tokens needs.
            scaled = loss * (context.world_size / tokens)
            (scaled if state.scaler is None else state.scaler.scale(scaled)).backward()
        loss_sum += loss.detach()
    context.sum(loss_sum)

    if state.scaler is not None:
        state.scaler.unscale_(state.optimizer)
    parameters = [parameter for parameter in state.model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    set_learning_rate(state.optimizer, lr)
    loss, bad = loss_sum / tokens, None
    if limits is None:
        _update(state, parameters, norm, grad_clip, None)
    else:
        # A NaN is below no limit. The sum is the processes' vote: rounding must not let them differ.
        fine = (loss <= limits.loss) & (norm <= limits.grad_norm)
        bad = (context.sum((~fine).float()) > 0).float()
        on_device = bad.is_cuda if on_device is None else on_device
        masked = on_device and getattr(state.optimizer, "_step_supports_amp_scaling", False)
        if masked or not bad.item():
            _update(state, parameters, norm, grad_clip, bad if masked else None)
        elif state.scaler is not None:
            state.scaler.update()
    size = totals[1] if bytes_per_token is not None else None
    return StepResult(loss, loss_sum, tokens, size, norm, lr, bad)


def _clear_gradients(state: TrainState, *, keep: bool) -> None:
    state.optimizer.zero_grad(set_to_none=not keep)
    if keep:
        for parameter in state.model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)


def _update(state: TrainState, parameters: list[nn.Parameter], norm: Tensor, grad_clip: float, bad: Tensor | None) -> None:
    """Clip and update, unless `bad` (a scalar on the device, for an optimizer that heeds it) is 1."""
    if grad_clip:
        nn.utils.clip_grads_with_norm_(parameters, grad_clip, norm)
    if bad is not None:
        # Gradients that float16 cannot hold make the norm infinite, so this flag covers what the scaler's own would.
        state.optimizer.found_inf = bad  # type: ignore[attr-defined]
        state.optimizer.step()
        del state.optimizer.found_inf  # type: ignore[attr-defined]
    elif state.scaler is None:
        state.optimizer.step()
    else:
        state.scaler.step(state.optimizer)
    if state.scaler is not None:
        state.scaler.update()


def _bytes(targets: Tensor, bytes_per_token: Tensor) -> Tensor:
    """UTF-8 bytes of the targets that count."""
    return (bytes_per_token[targets.clamp(min=0)] * (targets != IGNORE)).sum()


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Key the random numbers by (seed, step, rank): a step draws the same dropout masks after any number of restarts."""
    torch.manual_seed((seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) % 2**63)
