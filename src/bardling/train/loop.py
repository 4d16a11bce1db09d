"""The loop: a step, then the hooks, until the plan is done.

A hook is called after every step with the state and the step's figures. When a run resumes, the hooks are called once
for the step it resumes at, with no figures, so that work which a signal interrupted (a validation, say) is done before
the next step.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from torch import Tensor, nn

from bardling.data.loader import Batch, cut
from bardling.distributed.context import SINGLE, Context
from bardling.distributed.device import Precision
from bardling.train.guard import Guard
from bardling.train.plan import TrainPlan
from bardling.train.signals import Stopped
from bardling.train.state import TrainState
from bardling.train.step import StepResult, seed_dropout, train_step


class Hook(Protocol):
    """Something done between steps."""

    def __call__(self, state: TrainState, result: StepResult | None) -> None:
        """Act on the state after a step; `result` is None when a run resumes at this step."""


def fit(
    state: TrainState,
    batches: Iterator[Batch],
    plan: TrainPlan,
    *,
    lr_at: Callable[[int], float],
    grad_clip: float = 1.0,
    seed: int = 0,
    forward: nn.Module | Callable[..., Tensor] | None = None,
    precision: Precision | None = None,
    context: Context = SINGLE,
    keep_gradients: bool = False,
    hooks: Sequence[Hook] = (),
    bytes_per_token: Tensor | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
    guard: Guard | None = None,
) -> None:
    """Train `state` from where it stands to the end of `plan`.

    Args:
        batches: this process's batches in order, as many for each step as its stage of the plan has forward passes, of whole
            samples, on `context.device`.
        lr_at: learning rate of a step, counted from 0.
        seed: of dropout.
        forward: what computes the loss, if not `state.model` itself (its compiled or distributed wrapper).
        precision: of matrix products; float32 when absent.
        keep_gradients: let gradients stay where they are in memory, as `wrap` wants it for CUDA graphs.
        guard: against bad steps; it judges a step before the hooks see it.

    Raises:
        Stopped: `stop_requested`; the state is whole.
        RollBack: the guard wants the run to go back.
    """
    precision = precision or Precision("float32", "default", context.device.type)
    state.model.train()
    try:
        for hook in hooks:
            hook(state, None)
        while state.step < plan.steps:
            seed_dropout(seed, state.step, context.rank)
            stage = plan.at(state.step)
            result = train_step(
                state,
                [cut(next(batches), stage.context) for _ in range(stage.accumulation)],
                forward=state.model if forward is None else forward,
                lr=lr_at(state.step),
                grad_clip=grad_clip,
                precision=precision,
                context=context,
                keep_gradients=keep_gradients,
                bytes_per_token=bytes_per_token,
                stop_requested=stop_requested,
                limits=None if guard is None else guard.limits(state),
            )
            if state.ema is not None:
                state.ema.update(state.step)
            state.step += 1
            state.samples += stage.samples
            if guard is not None:
                guard.judge(state, result, stage.samples)
            for hook in hooks:
                hook(state, result)
    except Stopped:
        if guard is not None:
            guard.settle(state)
        raise
