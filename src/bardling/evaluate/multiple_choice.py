"""Multiple-choice accuracy: does a model find the right ending the likeliest?

Every ending is scored by the log-likelihood of its tokens after the context (Zellers et al. 2019; Brown et al. 2020, 2.4). The
chosen ending is the one with the smallest loss, counted in three ways:

- plain: the loss summed over the ending's tokens, which favours short endings;
- normalised: its mean per token, which is what the usual 0.294 of GPT-2 124M on HellaSwag counts;
- by characters: its sum divided by the ending's characters, which the language model evaluation harness calls `acc_norm`.

Context and " " + ending are encoded apart, so that a context is the same tokens before each of its endings: it is computed
once, and its keys and values serve all endings. Items are batched by their length in tokens, shared out over the processes, and
put together again before anything is counted: how they were divided does not show in the result. An item one of whose losses is
not a finite number counts as wrong.

Limits: a context is cut from the left until it and the item's longest ending fit into the block size, and an ending that does
not even fit behind one token is scored on its beginning; both are counted in the result.
"""

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bardling.data.loader import IGNORE
from bardling.data.tokenizer import Tokenizer
from bardling.distributed.context import SINGLE, Context
from bardling.distributed.device import Precision
from bardling.errors import UserError
from bardling.evaluate.loss import Interrupted
from bardling.evaluate.tasks import ChoiceItem
from bardling.model.cache import KVCache
from bardling.model.gpt import GPT

BATCH_TOKENS = {"cpu": 2048, "cuda": 16384, "mps": 8192}
"""Tokens of a batch by device type. A CPU gains nothing from more than fill its cores, and loses to padding."""


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
    cut_contexts: int  # of items: only the end of the context was seen
    cut_endings: int  # endings of which only the beginning was scored
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


Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Encoded:
    """An item as tokens, cut to what the model can see."""

    index: int  # among all items
    context: Ids  # at least one token
    endings: tuple[Ids, ...]
    cut_context: bool
    cut_endings: int

    @property
    def widths(self) -> tuple[int, int]:
        """Tokens computed once and tokens computed for each ending.

        The context's last token goes with the endings, since it foretells their first.
        """
        return len(self.context) - 1, max(map(len, self.endings))


def evaluate_choices(
    model: GPT,
    tokenizer: Tokenizer,
    items: Sequence[ChoiceItem],
    *,
    precision: Precision,
    task: str = "multiple-choice",
    batch_tokens: int | None = None,
    context: Context = SINGLE,
    stop_requested: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] | None = None,
) -> ChoiceResult:
    """Measure `model` on all `items`; the model's mode (training or not) is left as it was.

    Args:
        model: on the context's device; not compiled, since every batch has a shape of its own.
        task: what the result is called.
        batch_tokens: tokens of a batch in one process, padding included and the context counted with each ending: the keys and
            values of so many are held at a time. A single item may exceed it. Unset takes what suits the device.
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
    size = batch_tokens or BATCH_TOKENS.get(context.device.type, 2048)
    batches, own, turns = _plan(tokenizer, items, model.config.block_size, size, task, context)
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
                    count = len(item.endings)
                    table[0, item.index, :count], losses = losses[:count], losses[count:]
                    table[1, item.index, :count] = torch.tensor([len(ending) for ending in item.endings], dtype=torch.float64)
                    cuts += torch.tensor([item.cut_context, item.cut_endings], dtype=torch.float64)
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
    batches = _batches(encoded, batch_tokens, block_size)
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
        whole = [next(ids) for _ in items[index].endings]
        endings = tuple(ending[:block_size] for ending in whole)
        room = block_size + 1 - max(map(len, endings))  # for the context: the last token of an ending is only a target
        cut_endings = sum(len(ending) > block_size for ending in whole)
        encoded.append(_Encoded(index, start[-room:], endings, len(start) > room, cut_endings))
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


def _batches(encoded: list[_Encoded], batch_tokens: int, block_size: int) -> list[list[_Encoded]]:
    """Items of like length together, an item's endings always in one batch.

    The longest endings come first, so that memory that does not suffice shows at once; the other batches in random order, so
    that the speed so far tells the time left.
    """
    batches: list[list[_Encoded]] = []
    rows = before = after = 0  # of the last batch: endings, and the width of contexts and endings
    # By endings first, since each item has several: on all of HellaSwag padding then adds a fifth.
    for item in sorted(encoded, key=lambda item: (-item.widths[1], -item.widths[0])):
        wider = max(before, item.widths[0]), max(after, item.widths[1])
        if not batches or (rows + len(item.endings)) * sum(wider) > batch_tokens or sum(wider) > block_size:
            batches.append([])
            rows, wider = 0, item.widths
        batches[-1].append(item)
        rows, (before, after) = rows + len(item.endings), wider
    others = batches[1:]
    random.Random(0).shuffle(others)
    return batches[:1] + others


def _ending_losses(model: GPT, batch: Sequence[_Encoded], precision: Precision, device: torch.device) -> Tensor:
    """Summed loss of every ending of the batch, one item's after another's: float64 [endings], in host memory."""
    before, after = (max(widths) for widths in zip(*(item.widths for item in batch), strict=True))
    owner = [place for place, item in enumerate(batch) for _ in item.endings]  # of each ending, its item
    contexts = np.zeros((len(batch), before), np.int64)  # padded on the right, where nothing before it looks
    inputs = np.zeros((len(owner), after), np.int64)
    targets = np.full((len(owner), after), IGNORE, np.int64)
    for row, item in zip(contexts, batch, strict=True):
        row[: len(item.context) - 1] = item.context[:-1]
    for place, (last, ending) in enumerate((item.context[-1], ending) for item in batch for ending in item.endings):
        inputs[place, 0], inputs[place, 1 : len(ending)] = last, ending[:-1]
        targets[place, : len(ending)] = ending
    with torch.no_grad(), precision.autocast():
        seen = KVCache(model.config, len(owner), capacity=before + after)
        if before:
            once = KVCache(model.config, len(batch), capacity=before + after)
            model.hidden(torch.from_numpy(contexts).to(device), once)
            assert once.keys is not None
            assert once.values is not None
            owners = torch.tensor(owner, device=device)
            seen.keys, seen.values = (
                once.keys[:, owners],
                once.values[:, owners],
            )  # [n_layer, endings, n_head, capacity, head_dim]
            seen.lengths = [len(batch[place].context) - 1 for place in owner]  # what was padding will be written over or masked
        tokens, wanted = torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device)
        losses: Tensor = model(tokens, wanted, reduction="none", cache=seen)  # [endings, after]
    return losses.cpu().double().sum(1)
