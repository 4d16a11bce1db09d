"""Measures the loss on a fixed set of validation sequences, and records a new best."""

from functools import partial

from bardling.evaluate.loss import SequenceSet, evaluate_loss
from bardling.monitor.records import ValRecord
from bardling.training.hooks.base import HookContext, TimedHook
from bardling.training.state import TrainState


class Validate(TimedHook):
    name = "validate"

    def __init__(self, run: HookContext, sequences: SequenceSet, *, every: int, batch_size: int) -> None:
        super().__init__(run, every)
        self._sequences, self._batch_size = sequences, batch_size

    def work(self, state: TrainState) -> None:
        run = self.run
        result = evaluate_loss(
            state.model,
            self._sequences,
            batch_size=self._batch_size,
            precision=run.precision,
            context=run.context,
            bytes_per_token=run.bytes_per_token,
            stop_requested=run.stop_requested,
            progress=partial(run.monitor.progress, "validating"),
        )
        best = result.loss < state.best_val_loss
        if best:
            state.best_val_loss, state.best_step = result.loss, state.step
        tokens = state.samples * run.plan.block_size
        run.monitor.log(ValRecord(state.step, result.loss, result.bits_per_byte, result.perplexity, best, tokens))
