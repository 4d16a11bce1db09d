"""CORE, the metric of DCLM (Li et al. 2024, arXiv:2406.11794) for base models: 22 tasks in one number, `core:FOLDER`.

The score of a task is its accuracy, centered on that of guessing: (accuracy - baseline) / (1 - baseline). CORE is the mean over
the tasks. The folder has the layout of DCLM's evaluation bundle, as nanochat uses it: `core.yaml` lists the tasks,
`eval_meta_data.csv` has the baseline of each (in percent), and `eval_data/` the items, one JSON object per line. Prompts, the
choice of few-shot examples and the scores are nanochat's, so that results can be compared with its table:

- Few-shot examples precede an item, each followed by an empty line. Items are shuffled once, and each draws its examples from
  the other items with a seed of its own.
- `multiple_choice`: `choices` after a `query`; `schema`: a `continuation` after each of `context_options`. The model chooses
  the option with the smallest loss per token, from the first token in which the prompts of the choices differ, or over the
  tokens that all prompts end with.
- `language_modeling`: the `continuation` of a `context` counts if each of its tokens is the likeliest.

Limits: of a prompt that exceeds the block size, the model sees the end. Files are untrusted: sizes are limited, every item is
checked, and data files are inside the folder.
"""

import csv
import io
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

import numpy as np

from bardling.config import ModelConfig
from bardling.data.tokens.tokenizer import Tokenizer
from bardling.errors import UserError
from bardling.evaluate.benchmarks import Metric, Scores, Subject
from bardling.evaluate.endings import Ids, Score, score_pairs
from bardling.evaluate.tasks import MAX_ENDINGS, MAX_ITEMS, json_rows, short
from bardling.files.reading import read_small_text

TASKS_FILE, BASELINES, DATA = "core.yaml", "eval_meta_data.csv", "eval_data"
_MOST_FEWSHOT = 100
_MOST_TASKS = 1000
_SHUFFLE_SEED, _FEWSHOT_SEED = 1337, 1234  # nanochat's
Kind = Literal["multiple_choice", "schema", "language_modeling"]


@dataclass(frozen=True)
class Item:
    """An item of any kind: the prompts of its options, of which one is right.

    Multiple choice has one context and several continuations, a schema several contexts and one continuation, and language
    modeling one of each.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int = 0

    def option(self, number: int) -> tuple[str, str]:
        """Context and continuation of an option."""
        return self.contexts[number % len(self.contexts)], self.continuations[number % len(self.continuations)]

    @property
    def options(self) -> int:
        return max(len(self.contexts), len(self.continuations))


@dataclass(frozen=True)
class CoreTask:
    """One of the tasks, with the items to use, shuffled."""

    label: str
    kind: Kind
    fewshot: int  # examples before each item
    delimiter: str  # between a context and its continuation
    baseline: float  # accuracy of guessing, 0 to 1
    items: tuple[Item, ...] = field(repr=False)

    def prompts(self, index: int) -> list[tuple[str, str]]:
        """Of each option of an item, the prompt without its continuation and the whole prompt."""
        examples = ""
        if self.fewshot:
            others = [number for number in range(len(self.items)) if number != index]
            for number in random.Random(_FEWSHOT_SEED + index).sample(others, self.fewshot):
                other = self.items[number]
                before, after = other.option(other.gold)
                examples += f"{before}{self.delimiter}{after}\n\n"
        found = []
        for number in range(self.items[index].options):
            before, after = self.items[index].option(number)
            start = f"{examples}{before}{self.delimiter}"
            found.append((start, start + after))
        return found

    def centered(self, accuracy: float) -> float:
        return (accuracy - self.baseline) / (1 - self.baseline)


@dataclass(frozen=True)
class Core:
    """All tasks of a folder."""

    tasks: tuple[CoreTask, ...]
    available: int  # items in all files
    name: str = "core"

    def check(self, tokenizer: Tokenizer, config: ModelConfig) -> None:
        """Encode all texts that the tokenizer might not know."""
        if tokenizer.kind in ("byte", "bpe"):
            return
        for task in self.tasks:
            for item in task.items:
                try:
                    tokenizer.encode_batch([*item.contexts, task.delimiter, *item.continuations])
                except UserError as error:
                    raise UserError(f"core, task {task.label}: {error}") from error

    def evaluate(self, subject: Subject) -> list[Scores]:
        found, total, variance = [], 0.0, 0.0
        for task in self.tasks:
            right = sum(map(int, _evaluate(task, subject, f"core:{task.label}")))
            count = len(task.items)
            accuracy, scale = right / count, 1 / (1 - task.baseline)
            stderr = math.sqrt(accuracy * (1 - accuracy) / count)
            metrics = (
                Metric("accuracy", accuracy, stderr, "accuracy"),
                Metric("centered", task.centered(accuracy), stderr * scale, f"centered on {task.baseline:.2%} for guessing"),
            )
            found.append(Scores(f"core:{task.label}", metrics, count))
            total, variance = total + task.centered(accuracy), variance + (stderr * scale) ** 2
        metric = Metric("core", total / len(found), math.sqrt(variance) / len(found), "CORE, mean of the centered accuracies")
        items = sum(scores.items for scores in found)
        return [*found, Scores(self.name, (metric,), items, (f"{items:,} of {self.available:,} items",))]


_ITEMS_AT_ONCE = 1024  # whose prompts are in memory as tokens


def _evaluate(task: CoreTask, subject: Subject, label: str) -> Iterator[bool]:
    """Whether the model is right, for each item. All processes call this together."""
    for first in range(0, len(task.items), _ITEMS_AT_ONCE):
        numbers = range(first, min(first + _ITEMS_AT_ONCE, len(task.items)))

        def progress(done: int, total: int, numbers: range = numbers) -> None:
            subject.progress(label, numbers.start + len(numbers) * done // max(total, 1), len(task.items))

        encoded = [_encode(task, number, subject, label) for number in numbers]
        scores = iter(
            score_pairs(
                subject.model,
                [pair for pairs in encoded for pair in pairs],
                precision=subject.precision,
                context=subject.context,
                greedy=task.kind == "language_modeling",
                stop_requested=subject.stop_requested,
                progress=progress,
            )
        )
        for number, pairs in zip(numbers, encoded, strict=True):
            yield _is_right(task.items[number], list(islice(scores, len(pairs))))


def _is_right(item: Item, scores: Sequence[Score]) -> bool:
    if len(scores) == 1:
        return scores[0].greedy
    means = [score.loss / score.tokens for score in scores]
    return all(map(math.isfinite, means)) and means.index(min(means)) == item.gold


def _encode(task: CoreTask, number: int, subject: Subject, label: str) -> list[tuple[Ids, Ids]]:
    """Context and continuation of each option of an item, as tokens, both not empty."""
    tokenizer, prompts = subject.tokenizer, task.prompts(number)
    name = f"{label}, item {number + 1}"
    if task.kind == "language_modeling":
        ((before, whole),) = prompts
        rows = tokenizer.encode_batch(
            [before.strip(), whole]
        )  # a space at its end would be part of the continuation's first token
    else:
        rows = tokenizer.encode_batch([whole for _, whole in prompts])
    first = tokenizer.interface.first
    rows = [np.concatenate([np.array([] if first is None else [first], np.int64), row]) for row in rows]
    shortest = min(map(len, rows))
    if shortest < 2 or int(max(row.max() for row in rows)) >= subject.model.config.vocab_size:
        fault = "a prompt has no tokens" if shortest < 2 else "the tokenizer has more ids than the model"
        raise UserError(f"{name}: {fault}: use the tokenizer that the model was trained with")
    if task.kind == "language_modeling":
        start = min(_common(rows), len(rows[1]) - 1)
        return [(rows[1][:start], rows[1][start:])]
    if task.kind == "multiple_choice":
        starts = [max(1, min(_common(rows), shortest - 1))] * len(rows)
    else:
        shared = max(1, min(_common([row[::-1] for row in rows]), shortest - 1))
        starts = [len(row) - shared for row in rows]
    return [(row[:start], row[start:]) for row, start in zip(rows, starts, strict=True)]


def _common(rows: Sequence[Ids]) -> int:
    """The number of tokens with which all rows begin."""
    shortest = min(map(len, rows))
    equal = np.logical_and.reduce([row[:shortest] == rows[0][:shortest] for row in rows])
    return shortest if equal.all() else int(np.argmin(equal))


class _Folder:
    """The tasks named `core:FOLDER`."""

    def check(self, rest: str) -> None:
        for name in (TASKS_FILE, BASELINES):
            if not (Path(rest) / name).is_file():
                layout = f"the folder of an evaluation bundle has {TASKS_FILE}, {BASELINES} and {DATA}/"
                raise UserError(f"task core:{rest}: {Path(rest) / name} not found: {layout}")

    def absolute(self, rest: str) -> str:
        return str(Path.cwd() / rest)

    def open(self, rest: str, count: int | None, seed: int) -> Core:
        """`count`: of each task, the first items after shuffling, as in nanochat; `seed` is not used."""
        self.check(rest)
        folder, available, tasks = Path(rest), 0, list[CoreTask]()
        baselines = _read_baselines(folder / BASELINES)
        for entry, place in _read_tasks(folder / TASKS_FILE):
            task, found = _open_task(entry, place, folder, baselines, count)
            if task.label in [other.label for other in tasks]:
                raise UserError(f"{place}: label = {task.label!r} occurs twice: rename one")
            tasks.append(task)
            available += found
        return Core(tuple(tasks), available)


CORE = _Folder()


def _read_baselines(path: Path) -> dict[str, float]:
    """The accuracy of guessing, 0 to 1, of each task."""
    rows = csv.DictReader(io.StringIO(read_small_text(path)))
    found = {}
    try:
        for row in rows:
            label, value = row.get("Eval Task"), row.get("Random baseline")
            if label is None or value is None:
                raise UserError(f"{path}, line {rows.line_num}: needs the columns 'Eval Task' and 'Random baseline'")
            try:
                found[label] = float(value) / 100
            except ValueError:
                found[label] = math.nan
            if not 0 <= found[label] < 1:
                raise UserError(
                    f"{path}, line {rows.line_num}: Random baseline = {short(value)}: must be a percentage below 100"
                )
    except csv.Error as error:
        raise UserError(f"{path}: is not a CSV file ({error})") from None
    return found


def _read_tasks(path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The entries of `core.yaml`, and where each is, for messages."""
    try:
        import yaml
    except ImportError:
        raise UserError(f"{path}: needs the package pyyaml: pip install 'bardling[eval]'") from None
    text = read_small_text(path)
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not valid YAML ({' '.join(str(error).split())[:160]})") from None
    tasks = content.get("icl_tasks") if isinstance(content, dict) else None
    if not isinstance(tasks, list) or not 0 < len(tasks) <= _MOST_TASKS:
        raise UserError(f"{path}: icl_tasks must be a list of 1 to {_MOST_TASKS} tasks")
    for number, entry in enumerate(tasks, 1):
        if not isinstance(entry, dict):
            raise UserError(f"{path}, task {number}: is not a mapping with label, dataset_uri and icl_task_type")
        yield entry, f"{path}, task {number}"


def _open_task(
    entry: Mapping[str, Any], place: str, folder: Path, baselines: Mapping[str, float], count: int | None
) -> tuple[CoreTask, int]:
    """The task that an entry describes, with up to `count` of its items, and how many it has."""

    def text(key: str, default: str | None = None) -> str:
        value = entry.get(key, default)
        if not isinstance(value, str) or len(value) > 1000:
            raise UserError(f"{place}: {key} = {short(value)}: must be a string")
        return value

    label, kind, uri = text("label"), text("icl_task_type"), text("dataset_uri")
    if kind not in get_args(Kind):
        raise UserError(f"{place}: icl_task_type = {kind!r}: must be {', '.join(get_args(Kind))}")
    if PurePosixPath(uri).is_absolute() or ".." in Path(uri).parts or Path(uri).is_absolute():
        raise UserError(f"{place}: dataset_uri = {short(uri)}: must be a path inside {folder / DATA}")
    if label not in baselines:
        raise UserError(f"{place}: label = {short(label)}: {folder / BASELINES} has no baseline for it")
    fewshot = entry.get("num_fewshot", 0)
    fewshot = fewshot[0] if isinstance(fewshot, list) and fewshot else fewshot
    if type(fewshot) is not int or not 0 <= fewshot <= _MOST_FEWSHOT:
        raise UserError(f"{place}: num_fewshot = {short(fewshot)}: must be a number from 0 to {_MOST_FEWSHOT}")
    path = folder / DATA / uri
    items = [_READERS[kind](row, where) for where, row in islice(json_rows(path), MAX_ITEMS + 1)]
    random.Random(_SHUFFLE_SEED).shuffle(items)
    used = items[:count]
    if not fewshot < len(used) <= MAX_ITEMS:
        fault = f"{len(used):,} items, for {fewshot} examples before each" if len(used) <= fewshot else f"over {MAX_ITEMS:,}"
        raise UserError(f"{path}: {fault}: the task needs {fewshot + 1} to {MAX_ITEMS:,} items")
    delimiter = text("continuation_delimiter", " ")
    return CoreTask(label, kind, fewshot, delimiter, baselines[label], tuple(used)), len(items)  # type: ignore[arg-type]


def _text(row: Any, key: str, place: str) -> str:
    value = row.get(key) if isinstance(row, dict) else None
    if not isinstance(value, str) or (key == "continuation" and not value):
        raise UserError(f"{place}: {key} = {short(value)}: must be a string")
    return value


def _options(row: Any, key: str, place: str) -> tuple[tuple[str, ...], int]:
    """A list of options, and the number of the right one."""
    values, gold = (row.get(name) if isinstance(row, dict) else None for name in (key, "gold"))
    if not isinstance(values, list) or not 2 <= len(values) <= MAX_ENDINGS or not all(isinstance(one, str) for one in values):
        raise UserError(f"{place}: {key} = {short(values)}: must be a list of 2 to {MAX_ENDINGS} strings")
    if type(gold) is not int or not 0 <= gold < len(values):
        raise UserError(f"{place}: gold = {short(gold)}: must be the index of the right option, 0 to {len(values) - 1}")
    return tuple(values), gold


def _multiple_choice(row: Any, place: str) -> Item:
    choices, gold = _options(row, "choices", place)
    return Item((_text(row, "query", place),), choices, gold)


def _schema(row: Any, place: str) -> Item:
    contexts, gold = _options(row, "context_options", place)
    return Item(contexts, (_text(row, "continuation", place),), gold)


def _language_modeling(row: Any, place: str) -> Item:
    return Item((_text(row, "context", place).strip(),), (_text(row, "continuation", place),))


_READERS: dict[str, Callable[[Any, str], Item]] = {
    "multiple_choice": _multiple_choice,
    "schema": _schema,
    "language_modeling": _language_modeling,
}
