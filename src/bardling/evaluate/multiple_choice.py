"""Multiple-choice accuracy: how often a model gives the right ending the smallest loss.

Every ending is scored by the log-likelihood of its tokens after the context (Zellers et al. 2019; Brown et al. 2020, section
2.4). The model chooses the ending with the smallest loss: summed, which favours short endings; per token, as in the usual 0.294
of GPT-2 124M on HellaSwag; or per character, which the language model evaluation harness calls `acc_norm`.

An ending's tokens are those of context + " " + ending, minus as many as the context alone has, because a tokenizer may treat
the beginning of a text differently. Spaces at the end of a context belong to the endings, a context begins with what the
tokenizer's post-processor puts there, and an empty one with the token that begins a text; all as in the language model
evaluation harness. A context therefore has the same tokens before each of its endings: it is computed once, and its keys and
values serve all endings. Items are batched by length, divided among the processes, and
reassembled before anything is counted, so the result does not depend on the division. Every process makes the same number of
forward passes: one without a batch in some turn evaluates a dummy item.

Limits: a context is cut from the left until it and the item's longest ending fit into the block size, and an ending that does
not fit even after a single token is scored on its beginning; the result counts both.
"""

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bardling.config import ModelConfig
from bardling.data.batches import IGNORE
from bardling.data.tokens.tokenizer import Tokenizer
from bardling.distributed.context import SINGLE, Context
from bardling.distributed.device import Precision
from bardling.errors import UserError
from bardling.evaluate.loss import Interrupted
from bardling.evaluate.tasks import ChoiceItem
from bardling.model.cache import KVCache
from bardling.model.gpt import GPT, evaluation_mode

Measure = Literal["sum", "tokens", "characters"]
"""What an ending's loss is: summed over its tokens, or the sum per token or per character."""

BATCH_TOKENS = {"cpu": 2048, "cuda": 16384, "mps": 8192}
"""Tokens per batch by device type. Beyond filling its cores, a CPU gains nothing from larger batches, and loses to padding."""


@dataclass(frozen=True)
class ItemScore:
    """A model's scores on one item."""

    id: str
    label: int
    losses: tuple[float, ...]  # of each ending, summed over its tokens (nats)
    tokens: tuple[int, ...]  # of each ending
    characters: tuple[int, ...]  # of each ending

    def choice(self, measure: Measure) -> int:
        """Index of the ending with the smallest loss; -1 when a loss is not finite."""
        lengths = {"sum": (1,) * len(self.losses), "tokens": self.tokens, "characters": self.characters}[measure]
        means = [loss / max(length, 1) for loss, length in zip(self.losses, lengths, strict=True)]
        return means.index(min(means)) if all(map(math.isfinite, means)) else -1


@dataclass(frozen=True)
class ChoiceResult:
    """A model's scores on a task."""

    task: str
    items: tuple[ItemScore, ...]  # in the order given
    cut_contexts: int  # items of which the model saw only the end of the context
    cut_endings: int  # endings of which only the beginning was scored
    seconds: float = field(compare=False)

    @property
    def total(self) -> int:
        return len(self.items)

    def correct(self, measure: Measure) -> int:
        """Number of items whose right ending has the smallest loss."""
        return sum(item.choice(measure) == item.label for item in self.items)

    def accuracy(self, measure: Measure) -> float:
        return self.correct(measure) / self.total

    def stderr(self, measure: Measure) -> float:
        """Standard error of the accuracy p of n items: sqrt(p (1 - p) / n)."""
        p = self.accuracy(measure)
        return math.sqrt(p * (1 - p) / self.total)

    @property
    def items_per_second(self) -> float:
        """Speed of all processes together."""
        return self.total / max(self.seconds, 1e-9)


Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Encoded:
    """An item as tokens, cut to fit the block size."""

    index: int  # among all items
    context: Ids  # at least one token
    endings: tuple[Ids, ...]
    cut_context: bool
    cut_endings: int

    @property
    def widths(self) -> tuple[int, int]:
        """Tokens computed once, and tokens computed for each ending. The context's last token belongs to the endings, since it
        predicts their first."""
        return len(self.context) - 1, max(map(len, self.endings))


_DUMMY = _Encoded(0, np.zeros(1, np.int64), (np.zeros(1, np.int64),), False, 0)  # for a process without a batch


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
    """Measure `model` on all `items`; leave the model's mode (training or not) unchanged.

    Args:
        model: on the context's device; not compiled, since every batch has a different shape.
        batch_tokens: tokens per batch of one process, padding included and the context counted with each ending: the keys and
            values of this many are held at a time. A single item may exceed it. None for a value that suits the device.
        stop_requested: called before each batch. progress: called with (items done, items in all), where with several processes
            the first is extrapolated from this one's.

    Returns the same in every process, and for every number of processes.

    Raises:
        UserError: there are no items, the tokenizer is not the model's, or it cannot encode an item.
        Interrupted: `stop_requested` returned true in any process.
    """
    if not items:
        raise UserError(f"{task}: there are no items to evaluate")
    begun, encoded = time.monotonic(), _encode_share(tokenizer, items, model.config, task, context)
    batches = _batches(encoded, batch_tokens or BATCH_TOKENS.get(context.device.type, 2048), model.config.block_size)
    with_context = _agree_on_passes(batches, context)
    # In host memory, so that one batch's losses do not delay the next; Apple GPUs have no float64 anyway.
    width = max(len(item.endings) for item in items)
    table = torch.zeros(2, len(items), width, dtype=torch.float64)  # summed loss and number of tokens [2, items, endings]
    cuts = torch.zeros(2, dtype=torch.float64)
    done = 0
    with evaluation_mode(model):
        for turn, context_pass in enumerate(with_context, 1):
            if context.any(stop_requested()):
                raise Interrupted
            batch = batches[turn - 1] if turn <= len(batches) else []
            losses = _ending_losses(model, batch or [_DUMMY], precision, context.device, context_pass)
            _record(batch, losses, table, cuts)
            done += len(batch)
            if progress is not None:
                share = round(len(items) * done / max(len(encoded), 1))
                progress(len(items) if turn == len(with_context) else min(share, len(items) - 1), len(items))
    context.sum(table)
    context.sum(cuts)
    scores = []
    for item, losses_of, tokens in zip(items, table[0].tolist(), table[1].tolist(), strict=True):
        count, characters = len(item.endings), tuple(map(len, item.endings))
        scores.append(ItemScore(item.id, item.label, tuple(losses_of[:count]), tuple(map(int, tokens[:count])), characters))
    return ChoiceResult(task, tuple(scores), int(cuts[0]), int(cuts[1]), time.monotonic() - begun)


def _record(batch: Sequence[_Encoded], losses: Tensor, table: Tensor, cuts: Tensor) -> None:
    """Enter the losses of a batch into `table` [2, items, endings], and count what was cut in `cuts` (contexts, endings)."""
    for item in batch:
        count = len(item.endings)
        table[0, item.index, :count], losses = losses[:count], losses[count:]
        table[1, item.index, :count] = torch.tensor([len(ending) for ending in item.endings], dtype=torch.float64)
        cuts += torch.tensor([item.cut_context, item.cut_endings], dtype=torch.float64)


def check_items(tokenizer: Tokenizer, items: Sequence[ChoiceItem], config: ModelConfig, task: str) -> None:
    """Encode all items; a `UserError` names the first one that the tokenizer or the model cannot represent."""
    _encode(tokenizer, items, range(len(items)), config, task)


def _encode_share(
    tokenizer: Tokenizer, items: Sequence[ChoiceItem], config: ModelConfig, task: str, context: Context
) -> list[_Encoded]:
    # Dealt from longest to shortest, so that all processes have equal work. Measuring characters is accurate enough, and saves
    # each process from encoding the others' items.
    order = sorted(range(len(items)), key=lambda index: -len(items[index].context) - sum(map(len, items[index].endings)))
    try:
        encoded = _encode(tokenizer, items, order[context.data_rank :: context.data_size], config, task)
    except UserError:
        context.any(True)  # all stop together; otherwise the others would wait for this process
        raise
    if context.any(False):
        raise UserError(f"{task}: another process could not encode its items; see its error message")
    return encoded


def _agree_on_passes(batches: Sequence[Sequence[_Encoded]], context: Context) -> list[bool]:
    """For every turn of the process with the most batches: whether any process has contexts to compute in it."""
    mine = [int(any(item.widths[0] for item in batch)) for batch in batches]
    idle = [0] * (context.largest(len(mine)) - len(mine))
    return [count > 0 for count in context.sum(torch.tensor(mine + idle)).tolist()]


def _encode(
    tokenizer: Tokenizer, items: Sequence[ChoiceItem], chosen: Sequence[int], config: ModelConfig, task: str
) -> list[_Encoded]:
    texts = [text for index in chosen for text in _texts(tokenizer, items[index])]
    try:
        ids = iter(tokenizer.encode_batch(texts))
    except UserError:
        for index in chosen:
            try:
                tokenizer.encode_batch(_texts(tokenizer, items[index]))
            except UserError as error:
                raise UserError(f"{task}, item {items[index].id}: {error}") from error
        raise
    encoded, block_size = [], config.block_size
    for index in chosen:
        name, alone = f"{task}, item {items[index].id}", next(ids)
        about = tokenizer.interface
        start = np.concatenate([np.array(about.start, np.int64), alone])
        if about.first is not None and not (items[index].context and len(start)):
            start = np.array([about.first], np.int64)
        if not len(start):
            raise UserError(f"{name}: the context is empty, and the tokenizer has no end-of-text token to begin with")
        skipped = len(alone) if _jointly(tokenizer) else 0
        whole = [next(ids)[skipped:] for _ in items[index].endings]
        # together with an unknown word at the end of the context, an ending may become a single token
        whole = [
            row if len(row) else tokenizer.encode(" " + text) for row, text in zip(whole, items[index].endings, strict=True)
        ]
        _check_ids([start, *whole], name, tokenizer, config)
        endings = tuple(ending[:block_size] for ending in whole)
        room = block_size + 1 - max(map(len, endings))  # for the context: the last token of an ending is only a target
        cut_endings = sum(len(ending) > block_size for ending in whole)
        encoded.append(_Encoded(index, start[-room:], endings, len(start) > room, cut_endings))
    return encoded


def _jointly(tokenizer: Tokenizer) -> bool:
    """Whether an ending may have other tokens after its context than alone."""
    return tokenizer.kind not in ("byte", "char")


def _texts(tokenizer: Tokenizer, item: ChoiceItem) -> list[str]:
    """What is encoded: the context, then each ending, after the context where that matters."""
    context = item.context.rstrip()
    before = item.context if _jointly(tokenizer) else item.context[len(context) :]
    return [context, *(f"{before} {ending}" for ending in item.endings)]


def _check_ids(rows: Sequence[Ids], name: str, tokenizer: Tokenizer, config: ModelConfig) -> None:
    if not all(map(len, rows)):
        raise UserError(f"{name}: an ending has no tokens: the tokenizer knows none of its characters; remove the item")
    if (largest := max(int(row.max()) for row in rows)) >= config.vocab_size:
        fault = (
            f"token {largest} is out of range; the tokenizer has {tokenizer.vocab_size} ids, the model only {config.vocab_size}"
        )
        raise UserError(f"{name}: {fault}: use the tokenizer that the model was trained with")


def _batches(encoded: list[_Encoded], batch_tokens: int, block_size: int) -> list[list[_Encoded]]:
    """Batch items of similar length, all endings of an item together. The longest endings come first, so that a lack of memory
    shows at once; the other batches are in random order, so that the speed so far predicts the time left."""
    batches: list[list[_Encoded]] = []
    rows = before = after = 0  # of the last batch: endings, width of contexts, width of endings
    # By endings first, since each item has several: on all of HellaSwag, padding then adds a fifth.
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


def _ending_losses(
    model: GPT, batch: Sequence[_Encoded], precision: Precision, device: torch.device, context_pass: bool
) -> Tensor:
    """Summed loss of every ending of the batch, one item's after another's: float64 [endings], in host memory. `context_pass`:
    make a forward pass for contexts even if this batch has none, because another process does."""
    before, after = (max(widths) for widths in zip(*(item.widths for item in batch), strict=True))
    owner = [place for place, item in enumerate(batch) for _ in item.endings]  # the item of each ending
    contexts = np.zeros((len(batch), before), np.int64)  # padded on the right, where nothing before it looks
    inputs = np.zeros((len(owner), after), np.int64)
    targets = np.full((len(owner), after), IGNORE, np.int64)
    for row, item in zip(contexts, batch, strict=True):
        row[: len(item.context) - 1] = item.context[:-1]
    for place, (last, ending) in enumerate((item.context[-1], ending) for item in batch for ending in item.endings):
        inputs[place, 0], inputs[place, 1 : len(ending)] = last, ending[:-1]
        targets[place, : len(ending)] = ending
    with torch.no_grad(), precision.autocast():
        cache = KVCache(model.config, len(owner), capacity=before + after)
        if before:
            once = KVCache(model.config, len(batch), capacity=before + after)
            model(torch.from_numpy(contexts).to(device), cache=once, output="hidden")
            assert once.keys is not None
            assert once.values is not None
            owners = torch.tensor(owner, device=device)
            cache.keys, cache.values = once.keys[:, owners], once.values[:, owners]  # [n_layer, endings, K, capacity, head_dim]
            cache.lengths = [len(batch[place].context) - 1 for place in owner]  # padding is overwritten or masked
        elif context_pass:
            model(torch.zeros(1, 1, dtype=torch.int64, device=device), output="hidden")
        tokens, wanted = torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device)
        losses: Tensor = model(tokens, wanted, reduction="none", cache=cache)  # [endings, after]
    return losses.cpu().double().sum(1)
