"""Saves checkpoints."""

import time
from collections.abc import Callable

from bardling.checkpoint.saver import Saver
from bardling.config import CheckpointConfig
from bardling.training.hooks.base import HookContext, TimedHook
from bardling.training.state import TrainState
from bardling.training.step import StepResult


class Save(TimedHook):
    """Saves the state at intervals of steps or of time, after the last step, and at each new best validation loss.

    Args:
        check: raises if the state must not be saved.
    """

    name = "checkpoint"
    uses_ema = False

    def __init__(
        self,
        run: HookContext,
        saver: Saver,
        config: CheckpointConfig,
        *,
        check: Callable[[TrainState], None] = lambda state: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(run, config.every_steps)
        self._saver, self._save_best, self._seconds = saver, config.save_best, config.every_seconds
        self._check, self._clock, self._since = check, clock, clock()

    def is_due(self, state: TrainState) -> bool:
        if super().is_due(state) or (self._save_best and state.best_step == state.step and state.step > 0):
            return True
        if self._seconds is None or state.step == 0:
            return False
        # The primary process's clock decides for all.
        context = self.run.context
        return context.any(context.is_primary and self._clock() - self._since >= self._seconds)

    def __call__(self, state: TrainState, result: StepResult | None) -> None:
        """Raise the error of the previous save, if it failed, and start a save if it is due."""
        self._saver.report()
        if result is not None:
            self._saver.prepare(state)
        super().__call__(state, result)

    def work(self, state: TrainState) -> None:
        self._check(state)
        state.hooks_done[self.name] = state.step
        self._saver.save(state, last=state.step == self.run.plan.steps)
        self._since = self._clock()
