"""Tasks of every kind behind one interface: what `bardling eval --tasks` and `eval.tasks` name, and what a task reports.

A task is named by a spec: 'hellaswag' or the path of a file in its format (`tasks.py`), or KIND:REST with a kind from the table
`extensions.TASKS`, such as `lm-eval:piqa` or `core:FOLDER`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bardling.config import ModelConfig
from bardling.data.tokens.tokenizer import Tokenizer
from bardling.distributed.context import SINGLE, Context
from bardling.distributed.device import Precision
from bardling.evaluate.multiple_choice import ChoiceResult, Measure, check_items, evaluate_choices
from bardling.evaluate.tasks import ChoiceItem, absolute_task, check_task, draw_items, load_items, task_name
from bardling.extensions import TASKS
from bardling.files.paths import expand_home
from bardling.model.gpt import GPT


@dataclass(frozen=True)
class Subject:
    """The model that is measured, and how."""

    model: GPT  # on the context's device; not compiled, since every batch has a different shape
    tokenizer: Tokenizer
    precision: Precision
    context: Context = SINGLE
    stop_requested: Callable[[], bool] = lambda: False  # called before each batch
    progress: Callable[[str, int, int], None] = lambda task, done, total: None

    def reporting(self, task: str) -> Callable[[int, int], None]:
        """`progress` of one task."""
        return lambda done, total: self.progress(task, done, total)


@dataclass(frozen=True)
class Metric:
    """One result of a task."""

    name: str  # in records: accuracy, acc_norm, ...; empty: not in records
    value: float
    stderr: float | None = None
    note: str = ""  # what it is, for people
    stderr_name: str = ""  # in records, unless it is the metric's name with _stderr


@dataclass(frozen=True)
class Scores:
    """The results of a task."""

    task: str
    metrics: tuple[Metric, ...]
    items: int
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, float]:
        """The metrics by name, with their standard errors."""
        found = {}
        for metric in (metric for metric in self.metrics if metric.name):
            found[metric.name] = metric.value
            if metric.stderr is not None:
                found[metric.stderr_name or f"{metric.name}_stderr"] = metric.stderr
        return found


class Benchmark(Protocol):
    """A task with its items, read and ready."""

    @property
    def name(self) -> str:
        """The task's name in logs."""

    def check(self, tokenizer: Tokenizer, config: ModelConfig) -> None:
        """Raise a `UserError` if the tokenizer or the model cannot represent an item."""

    def evaluate(self, subject: Subject) -> Sequence[Scores]:
        """Measure a model; of several tasks in one, the last scores are those of all together.

        All processes call this together and get the same result.
        """


class TaskKind(Protocol):
    """What an entry of `extensions.TASKS` provides."""

    def check(self, rest: str) -> None:
        """Raise a `UserError`, without reading or downloading, if KIND:`rest` cannot name a task."""

    def absolute(self, rest: str) -> str:
        """`rest` as it names the same task from any folder."""

    def open(self, rest: str, count: int | None, seed: int) -> Benchmark:
        """Read the task KIND:`rest`. `count`: how many of its items to use, chosen by `seed`; None for all."""


def check_spec(spec: str) -> None:
    """Raise a `UserError`, without reading or downloading, if `spec` cannot name a task."""
    kind, rest = _kind(spec)
    if kind is None:
        check_task(spec)
    else:
        kind.check(rest)


def absolute_spec(spec: str) -> str:
    """`spec` as it names the same task from any folder, so that a run can be resumed from there."""
    kind, rest = _kind(spec)
    return absolute_task(spec) if kind is None else f"{spec.partition(':')[0]}:{kind.absolute(rest)}"


def open_task(spec: str, count: int | None = None, seed: int = 0) -> Benchmark:
    """Read a task. `count`: how many of its items to use, a random but fixed choice that depends on `seed`; None for all."""
    kind, rest = _kind(spec)
    if kind is not None:
        return kind.open(rest, count, seed)
    found = load_items(spec)
    return ChoiceTask(task_name(spec), draw_items(found, count, seed), len(found))


def _kind(spec: str) -> tuple[TaskKind | None, str]:
    name, colon, rest = spec.partition(":")
    if not colon or name not in TASKS or Path(spec).exists():
        return None, spec
    return TASKS.get("task", name), expand_home(rest)


@dataclass(frozen=True)
class ChoiceTask:
    """A multiple-choice task with the items to use, of `available` ones."""

    name: str
    items: tuple[ChoiceItem, ...]
    available: int

    def check(self, tokenizer: Tokenizer, config: ModelConfig) -> None:
        check_items(tokenizer, self.items, config, self.name)

    def evaluate(self, subject: Subject) -> list[Scores]:
        result = evaluate_choices(
            subject.model,
            subject.tokenizer,
            self.items,
            precision=subject.precision,
            task=self.name,
            context=subject.context,
            stop_requested=subject.stop_requested,
            progress=subject.reporting(self.name),
        )
        metrics = (
            Metric("accuracy_norm", *_accuracy(result, "tokens"), "accuracy, ending losses normalised by tokens", "stderr"),
            Metric("accuracy", *_accuracy(result, "sum"), "accuracy, not normalised"),
            Metric("", *_accuracy(result, "characters"), "accuracy, normalised by characters"),
        )
        notes = [f"{result.total:,} of {self.available:,} items, {result.items_per_second:.1f} items/s"]
        if result.cut_contexts or result.cut_endings:
            cut = f"{result.cut_contexts} contexts and {result.cut_endings} endings"
            notes.append(f"{cut} truncated to the model's context")
        return [Scores(self.name, metrics, result.total, tuple(notes))]


def _accuracy(result: ChoiceResult, measure: Measure) -> tuple[float, float]:
    return result.accuracy(measure), result.stderr(measure)
