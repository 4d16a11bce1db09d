"""The training loop: a step, then the hooks, until the plan is complete.

A hook is called after every step with the state and the step's metrics. When a run resumes, hooks are called once for the step
it resumes at, without metrics, so that work interrupted by a signal (a validation, say) is done before the next step.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from bardling.data.batches.loader import Batch, shorten_context
from bardling.planning.batching import TrainPlan
from bardling.training.build import Assembly
from bardling.training.recovery.guard import Guard
from bardling.training.recovery.signals import Stopped
from bardling.training.state import TrainState
from bardling.training.step import StepResult, StepSettings, seed_dropout, train_step


class Hook(Protocol):
    def __call__(self, state: TrainState, result: StepResult | None) -> None:
        """Act on the state after a step; `result` is None when a run resumes at this step."""


def fit(
    assembly: Assembly,
    batches: Iterator[Batch],
    plan: TrainPlan,
    settings: StepSettings,
    *,
    lr_at: Callable[[int], float],
    seed: int = 0,
    hooks: Sequence[Hook] = (),
    guard: Guard | None = None,
) -> None:
    """Train from the state's current step to the end of `plan`.

    Args:
        batches: this process's batches of whole samples in order, on its device; each step takes one for each of its forward
            passes.
        lr_at: learning rate of a step, counted from 0.
        seed: of dropout.
        guard: judges every step before the hooks see it.

    Raises:
        Stopped: a stop was requested; the state is consistent.
        RollbackRequested: the guard wants the run to return to its latest checkpoint.
    """
    state = assembly.state
    state.model.train()
    try:
        for hook in hooks:
            hook(state, None)
        while state.step < plan.steps:
            seed_dropout(seed, state.step, settings.context.dropout_rank)
            stage = plan.at(state.step)
            result = train_step(
                state,
                [shorten_context(next(batches), stage.context) for _ in range(stage.accumulation)],
                settings,
                forward=assembly.forward,
                lr=lr_at(state.step),
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
            guard.judge_pending(state)
        raise
