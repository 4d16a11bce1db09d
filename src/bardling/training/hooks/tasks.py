"""Measures accuracy on multiple-choice tasks, whose items are divided among the processes."""

from collections.abc import Mapping, Sequence
from functools import partial

from bardling.config import EvalConfig
from bardling.data.tokens.tokenizer import Tokenizer
from bardling.evaluate.multiple_choice import evaluate_choices
from bardling.evaluate.tasks import ChoiceItem
from bardling.monitor.records import TaskRecord
from bardling.training.hooks.base import HookContext, TimedHook
from bardling.training.state import TrainState


class Tasks(TimedHook):
    name = "tasks"
    may_fail = True

    def __init__(
        self, run: HookContext, config: EvalConfig, tokenizer: Tokenizer, items: Mapping[str, Sequence[ChoiceItem]]
    ) -> None:
        super().__init__(run, config.every if config.tasks_every is None else config.tasks_every)
        self._tokenizer, self._items = tokenizer, items

    def work(self, state: TrainState) -> None:
        """Evaluate all tasks; their results are logged together, so that none is logged twice after an interruption."""
        run, records = self.run, []
        for task, items in self._items.items():
            result = evaluate_choices(
                state.model,
                self._tokenizer,
                items,
                precision=run.precision,
                task=task,
                context=run.context,
                stop_requested=run.stop_requested,
                progress=partial(run.monitor.progress, task),
            )
            accuracies = result.accuracy("sum"), result.accuracy("tokens"), result.stderr("tokens")
            records.append(TaskRecord(state.step, task, *accuracies, result.total))
        for record in records:
            run.monitor.log(record)
