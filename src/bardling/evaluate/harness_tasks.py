"""Tasks of the language model evaluation harness: `lm-eval:NAME`, with any name that `lm-eval ls tasks` lists, or the path of a
task's YAML file.

lm-eval reads the task and its dataset (from the hub, or its cache), builds the requests and computes the metrics; `harness.py`
answers the requests. Only the primary process runs lm-eval; the others take part in the forward passes that it asks for. What
lm-eval prints, and its use of global random number generators, are kept away from the caller.

Limits: a task's YAML file can run code (its templates, and functions that it names), as with `lm-eval` itself: only use files
that you trust. Standard errors that need resampling come from 1,000 samples.
"""

import contextlib
import importlib.util
import io
import os
import random
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from bardling.config import ModelConfig
from bardling.data.tokens.tokenizer import Tokenizer
from bardling.distributed.global_state import isolated
from bardling.errors import UserError, closest
from bardling.evaluate.benchmarks import Metric, Scores, Subject

_EXTRA = "pip install 'bardling[eval]'"
_RESAMPLES = 1000
_SEED = 1234  # of few-shot examples: lm-eval's own


class _Kind:
    """The tasks named `lm-eval:REST`."""

    def check(self, rest: str) -> None:
        if importlib.util.find_spec("lm_eval") is None:
            raise UserError(f"task lm-eval:{rest}: needs the package lm_eval: {_EXTRA}")
        if _is_file(rest) and not Path(rest).is_file():
            raise UserError(f"task lm-eval:{rest}: no such file")

    def absolute(self, rest: str) -> str:
        return str(Path.cwd() / rest) if _is_file(rest) else rest

    def open(self, rest: str, count: int | None, seed: int) -> "HarnessTask":
        self.check(rest)
        spec = f"lm-eval:{rest}"
        with _quiet():
            try:
                tasks, items = _load(rest, spec)
            except UserError:
                raise
            except Exception as error:  # of lm-eval, datasets, the hub's client or code of the task
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                remedy = "check the connection to the hub, or name the YAML file of a task with a local dataset"
                raise UserError(f"task {spec}: lm-eval cannot load it ({reason}): {remedy}") from error
        chosen = {name: _choose(size, count, seed) for name, size in items.items()}
        names = [rest] if rest in tasks["groups"] or not _is_file(rest) else [*tasks["groups"], *tasks["tasks"]]
        return HarnessTask(f"lm-eval:{names[0]}", tasks, chosen, sum(items.values()))


LM_EVAL = _Kind()


def _is_file(rest: str) -> bool:
    return rest.endswith((".yaml", ".yml"))


def _load(rest: str, spec: str) -> tuple[dict[str, Any], dict[str, int]]:
    """What lm-eval's task manager finds, and the number of items of each task."""
    manager = _manager(built_in=not _is_file(rest))
    if not _is_file(rest) and rest not in manager.all_tasks:
        hint = closest(rest, manager.all_tasks)
        raise UserError(f"task {spec}: lm-eval has no such task{hint}; `lm-eval ls tasks` lists them")
    found: dict[str, Any] = {"groups": {}, **manager.load([rest])}
    for task in found["tasks"].values():  # as lm-eval's command does
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_SEED)
    return found, {name: len(task.eval_docs) for name, task in found["tasks"].items()}


@cache
def _manager(*, built_in: bool) -> Any:
    """lm-eval's task manager. To find its own tasks, it reads thousands of files."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=built_in)


def _choose(size: int, count: int | None, seed: int) -> list[int] | None:
    """Which of `size` items to use, in ascending order; None for all."""
    return None if count is None or count >= size else sorted(random.Random(seed).sample(range(size), count))


@dataclass(frozen=True)
class HarnessTask:
    """A task of lm-eval, or a group of tasks, with the items to use of each."""

    name: str
    tasks: Mapping[str, Any] = field(repr=False)  # what lm-eval's task manager has found
    chosen: Mapping[str, list[int] | None] = field(repr=False)
    available: int

    def __getstate__(self) -> dict[str, Any]:
        """What other processes need: the tasks stay in the primary one."""
        return {**vars(self), "tasks": {}}

    def check(self, tokenizer: Tokenizer, config: ModelConfig) -> None:
        """Nothing to check: lm-eval writes the texts when it needs them."""

    def evaluate(self, subject: Subject) -> list[Scores]:
        try:
            from lm_eval.evaluator import evaluate

            from bardling.evaluate.harness import BardlingLM
        except ImportError as error:
            raise UserError(f"task {self.name}: needs the package {error.name}: {_EXTRA}") from error
        begun, outside = time.monotonic(), sys.stderr

        def progress(label: str, done: int, total: int) -> None:
            with contextlib.redirect_stderr(outside):
                subject.progress(self.name, done, total)

        model = BardlingLM(subject=replace(subject, progress=progress))
        if not subject.context.is_primary:
            return list(model.follow())
        samples = {name: numbers for name, numbers in self.chosen.items() if numbers is not None} or None
        with isolated(), _quiet():
            result = evaluate(model, self.tasks, samples=samples, bootstrap_iters=_RESAMPLES, log_samples=False)
        scores = [_scores(name, values) for name, values in result["results"].items()]
        scores.sort(key=lambda found: found.task == self.name)  # a group after its tasks
        items = sum(values["sample_len"] for name, values in result["results"].items() if name in self.chosen)
        total = f"{items:,} of {self.available:,} items, {items / max(time.monotonic() - begun, 1e-9):.1f} items/s"
        scores[-1] = replace(scores[-1], items=items, notes=(total,))
        model.finish(scores)
        return scores


def _scores(task: str, values: Mapping[str, Any]) -> Scores:
    """The metrics of a task, which lm-eval names `acc,none` and `acc_stderr,none`: a name and a filter of the answers."""
    metrics = []
    for key, value in values.items():
        name, comma, answers = key.partition(",")
        if comma and not name.endswith("_stderr") and isinstance(value, int | float):
            stderr = values.get(f"{name}_stderr,{answers}")
            shown = name if answers == "none" else key
            metrics.append(Metric(shown, float(value), float(stderr) if isinstance(stderr, int | float) else None, shown))
    return Scores(f"lm-eval:{task}", tuple(metrics), int(values.get("sample_len", 0)))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what lm-eval prints from the caller, and its resampling in this process."""
    name, out, error = "DISABLE_MULTIPROC", io.StringIO(), io.StringIO()
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
