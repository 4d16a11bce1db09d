"""Runs that end at a given time: the number of steps is planned from the measured speed, and replanned as the speed changes.

`train.deadline` is the total time of a run, over all its starts: set-up, steps, validation and saving. (Steps that a kill
undid and the time between two starts do not count.) Some of it is reserved for the work after the last step. The learning rate
is the usual function of the step and the planned number of steps, so its decay ends at the last step. When the plan changes,
the learning rate moves to the new plan's curve, by less and less as the end approaches; a rise of more than 5% is reported.

The primary process plans for all. The plan depends on the machine: a run with a deadline is not reproducible bit for bit, and
a resumed one uses the plan in its checkpoint until it has measured its own speed.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field

from bardling.distributed.context import Context
from bardling.distributed.device import synchronize
from bardling.planning.batching import Horizon
from bardling.training.state import TrainState
from bardling.training.step import StepResult

UNBOUNDED_STEPS = 1 << 40
"""Steps to request batches for while the last step is unknown."""


@dataclass
class Deadline:
    """A hook that runs before all others, because it decides which step is the last."""

    budget: float  # total seconds of the run
    horizon: Horizon  # the plan's last step, which this hook sets
    context: Context
    _: KW_ONLY
    started_at: float  # `clock()` when this start of the run began
    seconds_before: float  # spent in earlier starts
    finishing_time: Callable[[float], float]  # seconds per step -> estimated seconds of work after the last step
    lr_at: Callable[[int, int], float]  # step, planned steps -> learning rate
    on_change: Callable[[int, str], None]  # receives the number of steps and a message for the user (empty for small changes)
    clock: Callable[[], float] = time.monotonic
    _marks: list[tuple[int, float]] = field(default_factory=list)  # (step, seconds) of each planning
    _next: int = 0

    def __call__(self, state: TrainState, result: StepResult | None) -> None:
        state.seconds = self._elapsed()
        if result is None:
            self._marks = [(state.step, state.seconds)]
            self._next = state.step + 1
            if state.planned:
                self.horizon.steps = state.planned
            if 0 < self.horizon.steps <= state.step:  # the run was finished; has the deadline been extended since?
                extended = self.budget - state.seconds > 0.05 * self.budget
                if self.context.any(self.context.is_primary and extended):
                    self._plan(state, state.seconds / state.step)
            return
        if state.step < self._next:
            return
        synchronize(self.context.device)
        state.seconds = self._elapsed()
        self._marks = [mark for mark in self._marks if mark[0] < state.step]  # a rollback has undone the others
        # The speed since the middle one of the plannings so far; this excludes the first step, with its set-up, early on.
        step, seconds = self._marks[len(self._marks) // 2]
        self._plan(state, (state.seconds - seconds) / (state.step - step))
        self._marks.append((state.step, state.seconds))

    def _elapsed(self) -> float:
        return self.seconds_before + self.clock() - self.started_at

    def _plan(self, state: TrainState, seconds_per_step: float) -> None:
        """Make the last step the last one that ends in time."""
        time_left = self.budget - state.seconds - self.finishing_time(seconds_per_step)
        steps = state.step + max(0, int(time_left / max(seconds_per_step, 1e-9)))
        steps, state.seconds = self.context.broadcast((steps, state.seconds))  # as measured by the primary process
        previous, self.horizon.steps, state.planned = state.planned, steps, steps
        left = steps - state.step
        self._next = state.step + max(1, min(state.step - self._marks[0][0], left // 10))
        before, after = (self.lr_at(state.step, number) for number in (previous or steps, steps))
        rises, message = after > 1.05 * before, ""
        if left > 0 and (rises or abs(steps - previous) > 0.05 * max(previous, 1)):
            rest = max(0.0, self.budget - state.seconds)
            ending = f"{rest:.0f} s" if rest < 120 else f"{rest / 60:.0f} min" if rest < 7200 else f"{rest / 3600:.1f} h"
            message = f"deadline: {steps:,} steps are planned, {left:,} of them in the next {ending}"
            if rises:
                message += f"; this raises the learning rate of step {state.step + 1:,} from {before:.3g} to {after:.3g}"
        self.on_change(steps, message)


def finishing_time(hooks: Sequence[object], budget: float, validation_steps: float, seconds_per_step: float) -> float:
    """How long the hooks after the last step will take: as long as the last time, plus a margin.

    Args:
        validation_steps: cost of a validation, in steps, until one has been timed.
    """
    durations = [hook.seconds for hook in hooks if hasattr(hook, "seconds")]
    measured: float = sum(duration for duration in durations if duration is not None)
    unmeasured = validation_steps * seconds_per_step if None in durations else 0.0
    return 1.3 * measured + unmeasured + max(0.2, 0.005 * budget)
