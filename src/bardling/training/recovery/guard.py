"""Bad steps: detected, explained, and skipped, rolled back or taken as the end of the run, as `guard.policy` says.

A step is bad if its loss or gradient norm is NaN, infinite or a spike (`spikes.py`). Its update is never applied (`step.py`);
the policies differ in what follows:

- skip: the step counts as done, and training continues. After `max_skips` consecutive bad steps, the run ends if the last one
  is not finite; if it is, the loss or the gradient has shifted for good, and recent steps are no longer compared with.
- rollback: the run returns to its latest checkpoint, and skips the step's sequences from then on (`session.py`).
  After `max_rollbacks` rollbacks, the next bad step ends the run.
- stop: the run ends; its checkpoints precede the bad step.

No step waits for the GPU: its metrics are copied to pinned memory and read one step later, while the next step runs. Work that
must not see an unjudged state (saving) calls `judge_pending` first, which waits. All processes reach the same verdict, because
metrics are summed over all of them and the vote is part of the step.

With float16, a gradient too large for the loss scale is a normal part of finding the scale; it counts as bad only after
`_MAX_OVERFLOWS` in a row.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Literal

import torch
from torch import Tensor

from bardling.config import GuardConfig
from bardling.data.batches.order import DataOrder
from bardling.data.batches.skipped_ranges import Range, SkippingOrder
from bardling.distributed.context import Context
from bardling.errors import UserError
from bardling.monitor.records import EventRecord, Record
from bardling.planning.batching import TrainPlan
from bardling.training.recovery.explain import Explainer, describe_sequence
from bardling.training.recovery.rollback_log import Rollback
from bardling.training.recovery.spikes import Limits, require_gradient
from bardling.training.recovery.trace import order_after
from bardling.training.state import TrainState
from bardling.training.step import StepResult

_MAX_OVERFLOWS = 10

Action = Literal["skip", "rollback", "stop"]


class RollbackRequested(Exception):  # noqa: N818  a request, not an error
    """The run should return to its latest checkpoint and skip some sequences."""

    def __init__(self, rollback: Rollback) -> None:
        super().__init__(f"bad step {rollback.event.step}")
        self.rollback = rollback


@dataclass(frozen=True)
class _StepMetrics:
    """Loss, gradient norm and verdict of a step, possibly still being copied from the device."""

    step: int
    first: int  # sample
    count: int
    values: Tensor  # float32 [3] in host memory
    copied: torch.cuda.Event | None

    def read(self) -> tuple[float, float, bool]:
        if self.copied is not None:
            self.copied.synchronize()
        loss, norm, bad = self.values.tolist()
        return loss, norm, bool(bad)


@dataclass
class Guard:
    config: GuardConfig
    context: Context
    data_order: DataOrder  # before anything is skipped
    rollbacks: tuple[Rollback, ...]  # of the run so far
    explainer: Explainer  # runs a bad step's sequences once more, in all processes alike
    _: KW_ONLY
    plan: TrainPlan  # shapes of the steps
    log: Callable[[Record], None]  # receives the events
    note: Callable[[str], None]  # prints a line for the user
    late: bool | None = None  # judge each step after the next one has been launched; None: on CUDA only

    def __post_init__(self) -> None:
        self._late = self.context.device.type == "cuda" if self.late is None else self.late
        self._pending: deque[_StepMetrics] = deque()

    @property
    def order(self) -> SkippingOrder:
        """The order of the run's samples, without the sequences that rollbacks skip."""
        return order_after(self.data_order, self.rollbacks)

    def add_rollback(self, rollback: Rollback) -> None:
        """Take into account a rollback that has been recorded on disk."""
        self.rollbacks = (*self.rollbacks, rollback)
        self._pending.clear()

    def limits(self, state: TrainState) -> Limits | None:
        """What the next step must not exceed; None if the guard is off."""
        if self.config.policy == "off":
            return None
        return state.history.limits(state.step + 1, self.config, self._context_since(state.step + 1))

    def _context_since(self, step: int) -> int:
        """First step, counted from 1, with the context length of `step`: the loss depends on the context length."""
        return self.plan.context_start_step(step - 1) + 1

    def judge(self, state: TrainState, result: StepResult, samples: int) -> None:
        """Judge the step of `samples` samples that `state` has just made, or on CUDA the one before it.

        Raises:
            RollbackRequested: the run should return to its latest checkpoint.
            UserError: the run should end.
        """
        for rollback in self.rollbacks:
            # The event of a rollback is logged when its step has finally succeeded, so that it is logged exactly once, wherever
            # the run was interrupted meanwhile.
            if rollback.event.step == state.step:
                self.log(rollback.event)
        if result.bad is None:
            return
        self._pending.append(_copy_metrics(state.step, state.samples - samples, samples, result))
        self.judge_pending(state, keep=1 if self._late else 0)

    def judge_pending(self, state: TrainState, keep: int = 0) -> None:
        """Judge all steps so far but the last `keep`; raises as `judge` does."""
        while len(self._pending) > keep:
            self._judge(state, self._pending.popleft())

    def _judge(self, state: TrainState, metrics: _StepMetrics) -> None:
        loss, norm, bad = metrics.read()
        history = state.history
        if not bad:
            require_gradient(metrics.step, loss, norm)
            history.add(metrics.step, loss, norm, self.config.window)
            return
        if state.scaler is not None and math.isfinite(loss) and not math.isfinite(norm):
            history.overflows += 1
            if history.overflows < _MAX_OVERFLOWS:
                return
        history.skipped += 1
        finite = math.isfinite(loss) and math.isfinite(norm)
        action, remedy = self._decide(history.skipped, finite=finite)
        ranges = self.order.places(metrics.first, metrics.count)
        # Every process explains, so that all run the same forward passes; the primary's explanation counts.
        event = self.context.broadcast(self._explain(state, metrics, loss, norm, action, ranges))
        if action == "rollback":
            self.note(f"{describe_event(event)}; rolling back to the latest checkpoint, to skip these sequences")
            raise RollbackRequested(Rollback(event, tuple(ranges)))
        self.log(event)
        if action == "stop":
            raise UserError(f"{describe_event(event)}; training ends: {remedy}")
        self.note(f"{describe_event(event)}; its update was skipped")
        if finite and history.skipped >= self.config.max_skips:
            shifted = (
                f"after {history.skipped} bad steps in a row, loss {loss:.4g} and gradient norm {norm:.4g} count as normal"
            )
            self.note(f"step {metrics.step:,}: {shifted}: updates are applied again, and later steps are compared with these")
            history.forget()

    def _decide(self, skipped: int, *, finite: bool) -> tuple[Action, str]:
        """What follows the bad step, the `skipped`th in a row, and what to do if it ends the run."""
        config = self.config
        if config.policy == "rollback":
            remedy = (
                f"guard.max_rollbacks = {config.max_rollbacks} is reached: lower optim.lr, inspect the data, or resume with a "
                "higher limit"
            )
            return "rollback" if len(self.rollbacks) < config.max_rollbacks else "stop", remedy
        if config.policy == "skip":
            remedy = (
                f"this is bad step {skipped} in a row (guard.max_skips = {config.max_skips}), so training has diverged: "
                "lower optim.lr, or resume with --guard.policy rollback"
            )
            return "skip" if skipped < config.max_skips or finite else "stop", remedy
        return "stop", "guard.policy = 'stop': resume with --guard.policy skip (or rollback) to continue past it"

    def _explain(
        self, state: TrainState, metrics: _StepMetrics, loss: float, norm: float, action: Action, ranges: list[Range]
    ) -> EventRecord:
        step = metrics.step
        self.context.activity(f"explaining step {step}")
        context = self.plan.at(step - 1).context
        sequences = self.explainer.worst_sequences(state, ranges, context)
        worst = sequences[0]["sample"] if sequences and self._late else None
        reason = state.history.reason(step, loss, norm, self.config, self._context_since(step))
        return EventRecord(
            step=step,
            action=action,
            reason=reason or "a spike in another process",
            loss=loss,
            grad_norm=norm,
            samples=[list(part) for part in ranges],
            windows=sequences,
            tensors=self.explainer.largest_gradients(state, worst, context),
        )


def _copy_metrics(step: int, first: int, count: int, result: StepResult) -> _StepMetrics:
    """Start to copy a step's metrics to host memory."""
    assert result.bad is not None
    values = torch.stack([result.loss.float(), result.grad_norm.float(), result.bad.float()]).detach()
    if not values.is_cuda:
        return _StepMetrics(step, first, count, values.cpu(), None)
    host = torch.empty(3, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()
    return _StepMetrics(step, first, count, host, copied)


def describe_event(event: EventRecord) -> str:
    parts = [f"step {event.step:,}: {event.reason}"]
    if event.windows:
        reproduced = math.isfinite(event.loss) or not math.isfinite(float(event.windows[0]["loss"]))
        worst = f"worst sequence: {describe_sequence(event.windows[0])}"
        parts.append(worst if reproduced else "when recomputed, no sequence has a non-finite loss")
    if event.tensors:
        largest = event.tensors[0]
        nonfinite = f"{largest['nonfinite']:,} non-finite entries, " if largest["nonfinite"] else ""
        parts.append(
            f"largest gradient: {largest['name']} ({nonfinite}norm {float(largest['grad_norm']):.3g}, "
            f"weight RMS {float(largest['weight_rms']):.3g})"
        )
    return "; ".join(parts)
