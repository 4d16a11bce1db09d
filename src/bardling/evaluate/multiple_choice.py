"""Multiple-choice accuracy: does a model find the right ending the likeliest?

Every ending is scored by the log-likelihood of its tokens after the context (Zellers et al. 2019; Brown et al. 2020, 2.4). The
chosen ending is the one with the smallest loss, counted in three ways:

- plain: the loss summed over the ending's tokens, which favours short endings;
- normalised: its mean per token, which is what the usual 0.294 of GPT-2 124M on HellaSwag counts;
- by characters: its sum divided by the ending's characters, which the language model evaluation harness calls `acc_norm`.

Context and " " + ending are encoded apart, so that a context is the same tokens before each of its endings. Items are batched
by their length in tokens, shared out over the processes, and put together again before anything is counted: how they were
divided does not show in the result. An item one of whose losses is not a finite number counts as wrong.

Limits: of a context that is too long only its end is seen, and of an ending that alone fills the context only its end is
scored; both are counted in the result.
"""

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from bardling.data.loader import IGNORE
from bardling.data.tokenizer import Tokenizer
from bardling.distributed.context import SINGLE, Context
from bardling.distributed.device import Precision
from bardling.errors import UserError
from bardling.evaluate.loss import Interrupted
from bardling.evaluate.tasks import ChoiceItem
from bardling.model.gpt import GPT

BATCH_TOKENS = 8192
"""Tokens in a forward pass of one process, padding included."""


@dataclass(frozen=True)
class ItemScore:
    """What a model made of one item."""

    id: str
    label: int
    losses: tuple[float, ...]  # of each ending, summed over its tokens (nats)
    tokens: tuple[int, ...]  # of each ending
    characters: tuple[int, ...]  # of each ending

    @property
    def choice(self) -> int:
        """Index of the ending with the smallest summed loss; -1 when a loss is not finite."""
        return self._smallest([1] * len(self.losses))

    @property
    def choice_norm(self) -> int:
        """Index of the ending with the smallest loss per token; -1 when a loss is not finite."""
        return self._smallest(self.tokens)

    @property
    def choice_chars(self) -> int:
        """Index of the ending with the smallest loss per character; -1 when a loss is not finite."""
        return self._smallest(self.characters)

    def _smallest(self, lengths: Sequence[int]) -> int:
        means = [loss / max(length, 1) for loss, length in zip(self.losses, lengths, strict=True)]
        return means.index(min(means)) if all(map(math.isfinite, means)) else -1


@dataclass(frozen=True)
class ChoiceResult:
    """What a model made of a task."""

    task: str
    items: tuple[ItemScore, ...]  # in the order in which they were given
    cut_contexts: int  # endings whose context did not fit
    cut_endings: int  # endings that did not fit themselves
    seconds: float = field(compare=False)  # that it took

    @property
    def total(self) -> int:
        """Items."""
        return len(self.items)

    @property
    def correct(self) -> int:
        """Items whose right ending has the smallest summed loss."""
        return sum(item.choice == item.label for item in self.items)

    @property
    def correct_norm(self) -> int:
        """Items whose right ending has the smallest loss per token."""
        return sum(item.choice_norm == item.label for item in self.items)

    @property
    def correct_chars(self) -> int:
        """Items whose right ending has the smallest loss per character."""
        return sum(item.choice_chars == item.label for item in self.items)

    @property
    def accuracy(self) -> float:
        """Part of the items that is right, by summed loss."""
        return self.correct / self.total

    @property
    def accuracy_norm(self) -> float:
        """Part of the items that is right, by loss per token."""
        return self.correct_norm / self.total

    @property
    def accuracy_chars(self) -> float:
        """Part of the items that is right, by loss per character."""
        return self.correct_chars / self.total

    @property
    def stderr(self) -> float:
        """Standard error of `accuracy`: sqrt(p (1 - p) / n)."""
        return _stderr(self.accuracy, self.total)

    @property
    def stderr_norm(self) -> float:
        """Standard error of `accuracy_norm`."""
        return _stderr(self.accuracy_norm, self.total)

    @property
    def stderr_chars(self) -> float:
        """Standard error of `accuracy_chars`."""
        return _stderr(self.accuracy_chars, self.total)

    @property
    def items_per_second(self) -> float:
        """Speed of the measurement, over all processes."""
        return self.total / max(self.seconds, 1e-9)


def _stderr(p: float, n: int) -> float:
    return math.sqrt(p * (1 - p) / n)


@dataclass(frozen=True)
class _Encoded:
    """An item as tokens: a row for each ending, context first, cut to what the model can see."""

    index: int  # among all items
    rows: tuple[np.ndarray[tuple[int], np.dtype[np.int64]], ...]
    scored: tuple[int, ...]  # tokens at the end of each row that are scored
    cut_contexts: int
    cut_endings: int

    @property
    def longest(self) -> int:
        """Inputs of the longest row."""
        return max(len(row) for row in self.rows) - 1


def evaluate_choices(
    model: GPT,
    tokenizer: Tokenizer,
    items: Sequence[ChoiceItem],
    *,
    precision: Precision,
    task: str = "multiple-choice",
    batch_tokens: int = BATCH_TOKENS,
    context: Context = SINGLE,
    stop_requested: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] | None = None,
) -> ChoiceResult:
    """Measure `model` on all `items`; the model's mode (training or not) is left as it was.

    Args:
        model: on the context's device; not compiled, since every batch has a shape of its own.
        task: what the result is called.
        batch_tokens: tokens in a forward pass of one process, padding included; a single item may exceed it.
        stop_requested: asked before each batch.
        progress: called with (items done, items in all); over several processes the first is this process's part, scaled up.

    Returns:
        The same in every process, and for every number of processes.

    Raises:
        UserError: there are no items, the tokenizer is not the model's, or it cannot encode an item.
        Interrupted: `stop_requested`, in any process.
    """
    if not items:
        raise UserError(f"{task}: there are no items to evaluate")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{task}: the tokenizer has {tokenizer.vocab_size} ids, the model only {model.config.vocab_size}: "
            "use the tokenizer that the model was trained with"
        )
    begun = time.monotonic()
    batches, own, turns = _plan(tokenizer, items, model.config.block_size, batch_tokens, task, context)
    # In host memory, so that a batch's losses do not wait for the next; float64 does not exist on Apple GPUs besides.
    width = max(len(item.endings) for item in items)
    table = torch.zeros(2, len(items), width, dtype=torch.float64)  # summed loss and number of tokens [2, items, endings]
    cuts = torch.zeros(2, dtype=torch.float64)
    was_training, done = model.training, 0
    model.eval()
    try:
        for turn in range(turns):  # every process makes the same number of turns
            if context.any(stop_requested()):
                raise Interrupted
            if turn < len(batches):
                batch = batches[turn]
                losses = _ending_losses(model, batch, precision, context.device)
                for item in batch:
                    count = len(item.rows)
                    table[0, item.index, :count], losses = losses[:count], losses[count:]
                    table[1, item.index, :count] = torch.tensor(item.scored, dtype=torch.float64)
                    cuts += torch.tensor([item.cut_contexts, item.cut_endings], dtype=torch.float64)
                done += len(batch)
            if progress is not None:
                last = turn == turns - 1
                progress(len(items) if last else min(round(len(items) * done / max(own, 1)), len(items) - 1), len(items))
    finally:
        model.train(was_training)
    context.sum(table)
    context.sum(cuts)
    scores = []
    for given, summed, tokens in zip(items, table[0].tolist(), table[1].tolist(), strict=True):
        count = len(given.endings)
        lengths = tuple(map(len, given.endings))
        scores.append(ItemScore(given.id, given.label, tuple(summed[:count]), tuple(map(int, tokens[:count])), lengths))
    return ChoiceResult(task, tuple(scores), int(cuts[0]), int(cuts[1]), time.monotonic() - begun)


def _plan(
    tokenizer: Tokenizer, items: Sequence[ChoiceItem], block_size: int, batch_tokens: int, task: str, context: Context
) -> tuple[list[list[_Encoded]], int, int]:
    """This process's batches, the number of its items, and the number of turns that all processes make."""
    # Dealt out like cards from longest to shortest, so that every process has as much to do. Characters will do for that, and
    # spare each process from encoding the others' items.
    order = sorted(range(len(items)), key=lambda index: -len(items[index].context) - sum(map(len, items[index].endings)))
    own = order[context.rank :: context.world_size]
    error: UserError | None = None
    encoded: list[_Encoded] = []
    try:
        encoded = _encode(tokenizer, items, own, block_size, task)
    except UserError as caught:
        error = caught
    if context.any(error is not None):  # all stop together; otherwise the others would wait for this one
        raise error or UserError(f"{task}: another process could not encode its items; its message says why")
    batches = _batches(encoded, batch_tokens)
    counts = torch.zeros(context.world_size, dtype=torch.int64)
    counts[context.rank] = len(batches)
    return batches, len(encoded), int(context.sum(counts).max())


def _encode(
    tokenizer: Tokenizer, items: Sequence[ChoiceItem], chosen: Sequence[int], block_size: int, task: str
) -> list[_Encoded]:
    texts = [text for index in chosen for text in _texts(items[index])]
    try:
        ids = iter(tokenizer.encode_batch(texts))
    except UserError as error:
        raise UserError(f"{task}, {_culprit(tokenizer, items, chosen)}: {error}") from error
    encoded = []
    for index in chosen:
        start = next(ids)
        if not len(start):
            if tokenizer.eot_id is None:
                raise UserError(
                    f"{task}, item {items[index].id}: the context is empty, and the tokenizer has no token to start from"
                )
            start = np.array([tokenizer.eot_id], np.int64)
        rows, scored, cut_contexts, cut_endings = [], [], 0, 0
        for _ in items[index].endings:
            ending = next(ids)
            row = np.concatenate([start, ending])
            cut_contexts += len(row) - 1 > block_size
            cut_endings += len(ending) > block_size
            rows.append(row[-(block_size + 1) :])  # a row's last token is only a target
            scored.append(min(len(ending), block_size))
        encoded.append(_Encoded(index, tuple(rows), tuple(scored), cut_contexts, cut_endings))
    return encoded


def _texts(item: ChoiceItem) -> list[str]:
    return [item.context, *(" " + ending for ending in item.endings)]


def _culprit(tokenizer: Tokenizer, items: Sequence[ChoiceItem], chosen: Sequence[int]) -> str:
    for index in chosen:
        try:
            tokenizer.encode_batch(_texts(items[index]))
        except UserError:
            return f"item {items[index].id}"
    return "an item"


def _batches(encoded: list[_Encoded], batch_tokens: int) -> list[list[_Encoded]]:
    """Items of like length together, an item's endings always in one batch.

    The longest batch comes first, so that memory that does not suffice shows at once; the others in random order, so that the
    speed so far tells the time left.
    """
    batches: list[list[_Encoded]] = []
    rows = longest = 0
    for item in sorted(encoded, key=lambda item: -item.longest):
        if not batches or (rows + len(item.rows)) * longest > batch_tokens:
            batches.append([])
            rows, longest = 0, item.longest
        batches[-1].append(item)
        rows += len(item.rows)
    others = batches[1:]
    random.Random(0).shuffle(others)
    return batches[:1] + others


def _ending_losses(model: GPT, batch: Sequence[_Encoded], precision: Precision, device: torch.device) -> Tensor:
    """Summed loss of every row of the batch, one item's after another's: float64 [rows], in host memory."""
    rows = [(row, scored) for item in batch for row, scored in zip(item.rows, item.scored, strict=True)]
    width = max(item.longest for item in batch)
    inputs = np.zeros((len(rows), width), np.int64)  # padded on the right, where nothing before it looks
    targets = np.full((len(rows), width), IGNORE, np.int64)
    for place, (row, scored) in enumerate(rows):
        length = len(row) - 1
        inputs[place, :length] = row[:-1]
        targets[place, length - scored : length] = row[len(row) - scored :]
    with torch.no_grad(), precision.autocast():
        tokens, wanted = torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device)
        losses: Tensor = model(tokens, wanted, reduction="none")  # [rows, width]
    return losses.cpu().double().sum(1)
