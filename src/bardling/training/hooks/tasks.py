"""Measures tasks, in which all processes take part."""

from collections.abc import Sequence

from bardling.config import EvalConfig
from bardling.data.tokens.tokenizer import Tokenizer
from bardling.evaluate.benchmarks import Benchmark, Subject
from bardling.monitor.records import TaskRecord
from bardling.training.hooks.base import HookContext, TimedHook
from bardling.training.state import TrainState


class Tasks(TimedHook):
    name = "tasks"
    may_fail = True

    def __init__(self, run: HookContext, config: EvalConfig, tokenizer: Tokenizer, tasks: Sequence[Benchmark]) -> None:
        super().__init__(run, config.every if config.tasks_every is None else config.tasks_every)
        self._tokenizer, self._tasks = tokenizer, tasks

    def work(self, state: TrainState) -> None:
        """Evaluate all tasks; their results are logged together, so that none is logged twice after an interruption."""
        run = self.run
        subject = Subject(
            state.model,
            self._tokenizer,
            run.precision,
            run.context,
            stop_requested=run.stop_requested,
            progress=run.monitor.progress,
        )
        found = [scores for task in self._tasks for scores in task.evaluate(subject)]
        for scores in found:
            run.monitor.log(TaskRecord(state.step, scores.task, scores.as_dict(), scores.items))
