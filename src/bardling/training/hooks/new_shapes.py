"""Tells the heartbeat that the next step compiles a new shape and may take long."""

from dataclasses import dataclass

from bardling.distributed.context import Context
from bardling.planning.batching import TrainPlan
from bardling.training.state import TrainState
from bardling.training.step import StepResult


@dataclass
class NewShapes:
    plan: TrainPlan
    context: Context
    compiled: bool

    def __call__(self, state: TrainState, result: StepResult | None) -> None:
        if self.compiled and self.plan.at(state.step).first_step == state.step:
            self.context.warming_up()
        elif result is not None:
            self.context.warmed_up()
