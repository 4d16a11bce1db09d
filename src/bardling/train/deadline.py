"""A run that ends at a given time: its number of steps is planned from the measured speed, and planned again as that changes.

`train.deadline` is the time that the run may take in all: set-up, steps, validations and saving, over all its starts (what a
kill undid and the time between two starts do not count). Part of it is kept for what comes after the last step. The learning
rate is the same function of the step and of the planned number of steps as ever, so its decay ends with the last step; when the
plan changes, it moves to the new plan's curve, by less and less as the end comes near.

The plan is made by the primary process and told to all. It depends on the machine: a run with a deadline cannot be repeated to
the bit, and a resumed one goes on with the plan that its checkpoint holds until it has measured its own speed.
"""

import time
from collections.abc import Callable, Sequence

import torch

from bardling.distributed.context import Context
from bardling.train.plan import Horizon
from bardling.train.state import TrainState
from bardling.train.step import StepResult

FAR = 1 << 40
"""Steps of batches to ask for when the last step is not known yet."""


class Deadline:
    """A hook that goes before all others, since it decides which step is the last.

    Args:
        seconds: the whole run's time.
        horizon: the plan's last step; this hook sets it.
        began: `clock()` when this start of the run began.
        before: seconds that the run had taken by then.
        ending: seconds that the work after the last step takes, as far as it is known.
        changed: told the number of steps, and a sentence for the person who watches, when the plan changes.
    """

    def __init__(
        self,
        seconds: float,
        horizon: Horizon,
        context: Context,
        *,
        began: float,
        before: float,
        ending: Callable[[float], float],
        changed: Callable[[int, str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._budget, self._horizon, self._context = seconds, horizon, context
        self._ending, self._changed, self._clock = ending, changed, clock
        self._began, self._before = began, before
        self._marks: list[tuple[int, float]] = []  # (step, seconds) where the plan was made
        self._next = 0

    def __call__(self, state: TrainState, result: StepResult | None) -> None:
        """Plan again if it is time to."""
        state.seconds = self._before + self._clock() - self._began
        if result is None:
            self._marks = [(state.step, state.seconds)]
            self._next = state.step + 1
            if state.planned:
                self._horizon.steps = state.planned
            if 0 < self._horizon.steps <= state.step:  # the end was reached; was the deadline moved since?
                much = self._budget - state.seconds > 0.05 * self._budget
                if self._context.any(self._context.is_primary and much):
                    self._set(state, self._plan(state, state.seconds / state.step))
            return
        if state.step < self._next:
            return
        if self._context.device.type == "cuda":
            torch.cuda.synchronize(self._context.device)
            state.seconds = self._before + self._clock() - self._began
        self._marks = [mark for mark in self._marks if mark[0] < state.step]  # a rollback has undone the others
        # The rate over the latest half of the plans; the first step, which pays for set-up, is left out as soon as possible.
        step, seconds = self._marks[len(self._marks) // 2]
        self._set(state, self._plan(state, (state.seconds - seconds) / (state.step - step)))
        self._marks.append((state.step, state.seconds))

    def _plan(self, state: TrainState, rate: float) -> int:
        """The last step that ends in time, at `rate` seconds a step."""
        left = self._budget - state.seconds - self._ending(rate)
        return state.step + max(0, int(left / max(rate, 1e-9)))

    def _set(self, state: TrainState, steps: int) -> None:
        steps, seconds = self._context.broadcast((steps, state.seconds))  # as the primary measured it
        state.seconds = seconds
        before, self._horizon.steps, state.planned = state.planned, steps, steps
        left = steps - state.step
        self._next = state.step + max(1, min(state.step - self._marks[0][0], left // 10))
        if abs(steps - before) > 0.05 * max(before, 1) and left > 0:
            self._changed(steps, f"deadline: {steps:,} steps are planned, {left:,} of them in the next {self._left(seconds)}")
        else:
            self._changed(steps, "")

    def _left(self, seconds: float) -> str:
        left = max(0.0, self._budget - seconds)
        return f"{left:.0f} s" if left < 120 else f"{left / 60:.0f} min" if left < 7200 else f"{left / 3600:.1f} h"


def ending_of(hooks: Sequence[object], budget: float, validation_steps: float) -> Callable[[float], float]:
    """How long the hooks that are due after the last step will take: as long as the last time, and a little more.

    Args:
        validation_steps: what a validation costs, in steps, for as long as none has been timed.
    """

    def seconds(rate: float) -> float:
        known = [getattr(hook, "seconds", None) for hook in hooks]
        measured: float = sum(value for value in known if value is not None)
        untimed = any(value is None and hasattr(hook, "seconds") for hook, value in zip(hooks, known, strict=True))
        unknown = validation_steps * rate if untimed else 0.0
        return 1.3 * measured + unknown + max(0.2, 0.005 * budget)

    return seconds
