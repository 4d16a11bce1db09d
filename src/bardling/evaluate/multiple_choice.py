"""Multiple-choice accuracy: how often a model gives the right ending the smallest loss.

Every ending is scored by the log-likelihood of its tokens after the context (Zellers et al. 2019; Brown et al. 2020, section
2.4). The model chooses the ending with the smallest loss: summed, which favours short endings; per token, as in the usual 0.294
of GPT-2 124M on HellaSwag; or per character, which the language model evaluation harness calls `acc_norm`.

An ending's tokens are those of context + " " + ending, minus as many as the context alone has, because a tokenizer may treat
the beginning of a text differently. Spaces at the end of a context belong to the endings, a context begins with what the
tokenizer's post-processor puts there, and an empty one with the token that begins a text; all as in the language model
evaluation harness. A context therefore has the same tokens before each of its endings. `endings.py` scores them.

Limits: a context is cut from the left until it and the item's longest ending fit into the block size, and an ending that does
not fit even after a single token is scored on its beginning; the result counts both.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from bardling.config import ModelConfig
from bardling.data.tokens.tokenizer import Tokenizer
from bardling.distributed.context import SINGLE, Context
from bardling.distributed.device import Precision
from bardling.errors import UserError
from bardling.evaluate.endings import Group, Ids, score_endings, share_of
from bardling.evaluate.tasks import ChoiceItem
from bardling.model.gpt import GPT

Measure = Literal["sum", "tokens", "characters"]
"""What an ending's loss is: summed over its tokens, or the sum per token or per character."""


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


@dataclass(frozen=True)
class _Encoded(Group):
    """An item as tokens, cut to fit the block size."""

    cut_context: bool = False
    cut_endings: int = 0


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
        batch_tokens, stop_requested, progress: as in `score_endings`, in items.

    Returns the same in every process, and for every number of processes.

    Raises:
        UserError: there are no items, the tokenizer is not the model's, or it cannot encode an item.
        Interrupted: `stop_requested` returned true in any process.
    """
    if not items:
        raise UserError(f"{task}: there are no items to evaluate")
    begun, encoded = time.monotonic(), _encode_share(tokenizer, items, model.config, task, context)
    width = max(len(item.endings) for item in items)
    about = torch.zeros(len(items), width + 2, dtype=torch.float64)  # tokens of each ending; whether and how many were cut
    for own in encoded:
        about[own.index, : len(own.endings)] = torch.tensor([len(ending) for ending in own.endings])
        about[own.index, width:] = torch.tensor([own.cut_context, own.cut_endings])
    losses, _ = score_endings(
        model,
        encoded,
        (len(items), width),
        precision=precision,
        context=context,
        greedy=False,
        batch_tokens=batch_tokens,
        stop_requested=stop_requested,
        progress=progress,
    )
    context.sum(about)
    scores = []
    for item, losses_of, tokens in zip(items, losses.tolist(), about.tolist(), strict=True):
        count, characters = len(item.endings), tuple(map(len, item.endings))
        scores.append(ItemScore(item.id, item.label, tuple(losses_of[:count]), tuple(map(int, tokens[:count])), characters))
    cut_contexts, cut_endings = map(int, about[:, width:].sum(0).tolist())
    return ChoiceResult(task, tuple(scores), cut_contexts, cut_endings, time.monotonic() - begun)


def check_items(tokenizer: Tokenizer, items: Sequence[ChoiceItem], config: ModelConfig, task: str) -> None:
    """Encode all items; a `UserError` names the first one that the tokenizer or the model cannot represent."""
    _encode(tokenizer, items, range(len(items)), config, task)


def _encode_share(
    tokenizer: Tokenizer, items: Sequence[ChoiceItem], config: ModelConfig, task: str, context: Context
) -> list[_Encoded]:
    # Measuring characters is accurate enough, and saves each process from encoding the others' items.
    mine = share_of([len(item.context) + sum(map(len, item.endings)) for item in items], context)
    try:
        encoded = _encode(tokenizer, items, mine, config, task)
    except UserError:
        context.any(True)  # all stop together; otherwise the others would wait for this process
        raise
    if context.any(False):
        raise UserError(f"{task}: another process could not encode its items; see its error message")
    return encoded


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
