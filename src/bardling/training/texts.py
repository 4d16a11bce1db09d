"""What a run encodes besides its data: the prompt of its samples and the items of its tasks.

All of it is encoded once before the first step, so that a character that the tokenizer lacks ends the run before it has cost
anything. A resumed run is not ended by what it was started with: it reports the fault and continues without the samples or the
task.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from bardling.config import RunConfig, SampleConfig
from bardling.data.tokens.chat_template import chat_prompt_ids
from bardling.data.tokens.conversations import ANSWER, BEGIN
from bardling.data.tokens.shards import TokenDataset
from bardling.data.tokens.tokenizer import Tokenizer
from bardling.errors import UserError
from bardling.evaluate.benchmarks import Benchmark, absolute_spec, open_task
from bardling.generation.generate import prompt_ids
from bardling.training.hooks.may_fail import is_failure
from bardling.training.hooks.sample import Prompt


@dataclass(frozen=True)
class RunTexts:
    sample: SampleConfig | None  # with the prompt to use; None: no samples
    prompts: list[Prompt] | None  # of a model that learns conversations; None: that of `sample`
    tasks: tuple[Benchmark, ...]
    warnings: tuple[str, ...]  # what is left out, and why


def load_texts(config: RunConfig, previous: RunConfig | None, tokenizer: Tokenizer | None, dataset: TokenDataset) -> RunTexts:
    """Read and check what the run encodes.

    Args:
        previous: the configuration that a resumed run was started with.

    Raises:
        UserError: something cannot be read or encoded, and `previous` does not have it.
    """
    if tokenizer is None:
        return RunTexts(None, None, (), ())
    warnings, tasks = list[str](), list[Benchmark]()

    def check(work: Callable[[], None], *, kept: bool, without: str) -> bool:
        try:
            work()
        except BaseException as error:
            if not is_failure(error):
                raise
            fault = error if isinstance(error, UserError) else UserError(f"{without}: {type(error).__name__}: {error}")
            if not kept:
                raise fault from error
            warnings.append(f"{fault}; the run continues without {without}")
            return False
        return True

    asked, before = config.sample, None if previous is None else previous.sample
    sample, prompts = asked, list[Prompt]()

    def encode() -> None:
        if dataset.manifest.holds_conversations:
            prompts.extend(_questions(asked, tokenizer, dataset))
        else:
            _check_prompt(asked.prompt, sample.prompt, tokenizer, config.model.vocab_size)

    if not dataset.manifest.holds_conversations:
        sample = replace(asked, prompt=asked.prompt or _new_document(tokenizer, dataset))
    kept = before is not None and before.every > 0 and before.prompt == asked.prompt
    sampled = not asked.every or check(encode, kept=kept, without="samples")

    def load(spec: str) -> None:
        task = open_task(spec, config.eval.task_items, config.seed)
        if task.name in [other.name for other in tasks]:
            raise UserError(f"eval.tasks: {spec} and another task are both called {task.name!r}: remove or rename one")
        task.check(tokenizer, config.model)
        tasks.append(task)

    old = set() if previous is None else set(map(absolute_spec, previous.eval.tasks))
    for spec in config.eval.tasks:
        check(partial(load, spec), kept=absolute_spec(spec) in old, without=f"the task {spec}")
    return RunTexts(sample if sampled else None, prompts or None, tuple(tasks), tuple(warnings))


def _questions(config: SampleConfig, tokenizer: Tokenizer, dataset: TokenDataset) -> list[Prompt]:
    """What a model that learns conversations answers: the configured question, or the first ones of the validation split."""
    if config.prompt:
        ids = chat_prompt_ids(tokenizer, [{"role": "user", "content": config.prompt}])
        return [Prompt(config.prompt, ids, is_chat=True)] * config.num_samples
    split = dataset.split("val")
    assert split.marks is not None
    prompts: list[Prompt] = []
    for start in range(0, len(split), split.row):
        row, marks = split.read(start, split.row), split.marks.read(start, split.row)
        begins = [*np.flatnonzero(marks & BEGIN).tolist(), split.row]
        for begin, end in itertools.pairwise(begins):
            answers = np.flatnonzero(marks[begin:end] & ANSWER)
            if len(answers) and answers[0]:
                question = row[begin : begin + int(answers[0])].tolist()
                prompts.append(Prompt(tokenizer.decode(question), question, is_chat=True))
            if len(prompts) == config.num_samples:
                return prompts
    return prompts


def _new_document(tokenizer: Tokenizer, dataset: TokenDataset) -> str:
    """The prompt with which a new document begins: nothing where an end-of-text token precedes one, else a line break, or the
    first token of a text that has no line breaks."""
    if tokenizer.interface.start:
        return ""
    single = dataset.manifest.train.documents == 1  # such a text has no end-of-text token to start after
    if not single and tokenizer.eot_id is not None:
        return ""
    try:
        tokenizer.encode("\n")
    except UserError:
        return tokenizer.decode(dataset.split("train").read(0, 1))
    return "\n" if single else ""


def _check_prompt(asked: str, prompt: str, tokenizer: Tokenizer, vocab_size: int) -> None:
    where = f"sample.prompt = {asked if len(asked) <= 60 else asked[:57] + '...'!r}"
    try:
        ids = prompt_ids(tokenizer, prompt)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if outside := [token for token in ids if token >= vocab_size]:
        raise UserError(f"{where}: contains token {outside[0]}, but the model has only {vocab_size}: change the prompt")
