"""Tells the user and the heartbeat that the next step compiles a new shape and may take long."""

from collections.abc import Callable
from dataclasses import dataclass, field

from bardling.distributed.context import Context
from bardling.planning.batching import TrainPlan
from bardling.training.state import TrainState
from bardling.training.step import StepResult


@dataclass
class NewShapes:
    plan: TrainPlan
    context: Context
    compiled: bool
    note: Callable[[str], None]
    _stages: set[int] = field(default_factory=set)  # first steps of those that have been compiled

    def __call__(self, state: TrainState, result: StepResult | None) -> None:
        stage = self.plan.at(state.step).first_step
        if self.compiled and state.step < self.plan.steps and stage not in self._stages:
            self._stages.add(stage)
            self.context.warming_up()
            self.note("compiling the model for the next step, which may take a minute")
        elif result is not None:
            self.context.warmed_up()
