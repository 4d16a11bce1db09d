"""Measures the loss on a fixed set of validation sequences, of each source of a mixture, and records a new best.

The loss of a mixture is the mean over its sources with the weights of its last stage. These do not change during a run, so
losses can be compared, and the best checkpoint is the best for what the run ends with.
"""

from collections.abc import Sequence
from functools import partial

from bardling.data.batches.assemble import ValidationSet
from bardling.evaluate.loss import evaluate_loss, weighted_mean
from bardling.monitor.records import ValRecord
from bardling.training.hooks.base import HookContext, TimedHook
from bardling.training.state import TrainState


class Validate(TimedHook):
    name = "validate"

    def __init__(self, run: HookContext, sets: Sequence[ValidationSet], *, every: int, batch_size: int) -> None:
        super().__init__(run, every)
        self._sets, self._batch_size = sets, batch_size

    def work(self, state: TrainState) -> None:
        run = self.run
        results = [
            evaluate_loss(
                state.model,
                each.sequences,
                batch_size=self._batch_size,
                precision=run.precision,
                context=run.context,
                bytes_per_token=run.bytes_per_token,
                stop_requested=run.stop_requested,
                progress=partial(run.monitor.progress, f"validating {each.name}".strip()),
            )
            for each in self._sets
        ]
        result = weighted_mean(results, [each.weight for each in self._sets], [each.name for each in self._sets])
        sources = {f"loss/{name}": one.loss for name, one in result.sources.items()}
        best = result.loss < state.best_val_loss
        if best:
            state.best_val_loss, state.best_step = result.loss, state.step
        tokens = state.samples * run.plan.block_size
        run.monitor.log(ValRecord(state.step, result.loss, result.bits_per_byte, result.perplexity, best, tokens, sources))
