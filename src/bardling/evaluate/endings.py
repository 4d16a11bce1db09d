"""Log-likelihoods of endings after contexts, all in tokens: what multiple-choice tasks, CORE and lm-eval are made of.

A context is computed once, and its keys and values serve all its endings; the head is computed for endings only. Groups (a
context and its endings) are batched by length, divided among the processes, and reassembled, so that results do not depend on
the division. Every process makes the same number of forward passes: one without a batch in some turn evaluates a dummy.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bardling.data.batches import IGNORE
from bardling.distributed.context import Context
from bardling.distributed.device import Precision
from bardling.evaluate.loss import Interrupted
from bardling.model.cache import KVCache
from bardling.model.gpt import GPT, evaluation_mode

Ids = npt.NDArray[np.int64]

BATCH_TOKENS = {"cpu": 2048, "cuda": 16384, "mps": 8192}
"""Tokens per batch by device type. Beyond filling its cores, a CPU gains nothing from larger batches, and loses to padding."""


@dataclass(frozen=True)
class Group:
    """A context and what may follow it. With any ending, except for its last token, the context fits into the block size."""

    index: int  # among the groups of all processes
    context: Ids  # at least one token
    endings: tuple[Ids, ...]  # at least one token each

    @property
    def widths(self) -> tuple[int, int]:
        """Tokens computed once, and tokens computed for each ending. The context's last token belongs to the endings, since it
        predicts their first."""
        return len(self.context) - 1, max(map(len, self.endings))


_DUMMY = Group(0, np.zeros(1, np.int64), (np.zeros(1, np.int64),))  # for a process without a batch


def windows(context: Ids, ending: Ids, block_size: int) -> Iterator[tuple[Ids, Ids]]:
    """Divide an ending into parts that fit into the block size, each with as much before it as fits: one part, with the end of
    the context, unless the ending alone is longer than the block size."""
    whole = np.concatenate([context, ending])
    for start in range(0, len(ending), block_size):
        part = ending[start : start + block_size]
        begin = len(context) + start
        yield whole[max(0, begin + len(part) - block_size - 1) : begin], part


def share_of(sizes: Sequence[int], context: Context) -> list[int]:
    """The indices of this process's groups, dealt from the longest to the shortest, so that all processes have equal work."""
    order = sorted(range(len(sizes)), key=lambda index: -sizes[index])
    return order[context.data_rank :: context.data_size]


def score_endings(
    model: GPT,
    mine: Sequence[Group],
    shape: tuple[int, int],
    *,
    precision: Precision,
    context: Context,
    greedy: bool = True,
    batch_tokens: int | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Score the endings of all groups; leave the model's mode (training or not) unchanged.

    Args:
        model: on the context's device; not compiled, since every batch has a different shape.
        mine: this process's groups.
        shape: number of groups of all processes, and the most endings of one.
        greedy: also find out which tokens are the likeliest.
        batch_tokens: tokens per batch of one process, padding included and the context counted with each ending: the keys and
            values of this many are held at a time. A single group may exceed it. None for a value that suits the device.
        stop_requested: called before each batch. progress: called with (groups done, groups in all), where with several
            processes the first is extrapolated from this one's.

    Returns:
        float64 [2, *shape] in host memory, the same in every process, and for every number of processes: the loss of each
        ending, summed over its tokens (nats), and, with `greedy`, how many of its tokens are the likeliest in their places.

    Raises:
        Interrupted: `stop_requested` returned true in any process.
    """
    batches = _batches(mine, batch_tokens or BATCH_TOKENS.get(context.device.type, 2048), model.config.block_size)
    with_context = _agree_on_passes(batches, context)
    # In host memory, so that one batch's losses do not delay the next; Apple GPUs have no float64 anyway.
    table, done = torch.zeros(2, *shape, dtype=torch.float64), 0
    with evaluation_mode(model):
        for turn, context_pass in enumerate(with_context, 1):
            if context.any(stop_requested()):
                raise Interrupted
            batch = batches[turn - 1] if turn <= len(batches) else []
            scores = _score(model, batch or [_DUMMY], precision, context.device, context_pass, greedy)
            for group in batch:
                count = len(group.endings)
                table[:, group.index, :count], scores = scores[:, :count], scores[:, count:]
            done += len(batch)
            if progress is not None:
                share = round(shape[0] * done / max(len(mine), 1))
                progress(shape[0] if turn == len(with_context) else min(share, shape[0] - 1), shape[0])
    return context.sum(table)


@dataclass(frozen=True)
class Score:
    """How a model predicts a continuation."""

    loss: float  # summed over its tokens (nats)
    tokens: int
    greedy: bool  # whether each of its tokens is the likeliest one in its place; False if that was not asked for


def score_pairs(
    model: GPT,
    pairs: Sequence[tuple[Ids, Ids]],
    *,
    precision: Precision,
    context: Context,
    greedy: bool = True,
    batch_tokens: int | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Score]:
    """Score pairs of a context (at least one token) and a continuation of any length; of a context that is too long, the model
    sees the end. Equal contexts are computed once. All processes give the same pairs and get the same result; further arguments
    as in `score_endings`."""
    limit = batch_tokens or BATCH_TOKENS.get(context.device.type, 2048)
    contexts: dict[bytes, dict[bytes, None]] = {}  # of each, its continuations
    size = model.config.block_size
    parts = [[(before.tobytes(), after.tobytes()) for before, after in windows(*pair, size)] for pair in pairs]
    for before, after in itertools.chain.from_iterable(parts):
        contexts.setdefault(before, {})[after] = None
    groups: list[Group] = []
    places: dict[tuple[bytes, bytes], tuple[int, int]] = {}  # group and ending
    for before, continuations in contexts.items():
        endings, ids = sorted(continuations, key=len), _ids(before)
        while endings:  # as many as fit into a batch, and at least one
            count = sum(number * (len(ids) - 1 + len(_ids(each))) <= limit for number, each in enumerate(endings, 1))
            taken, endings = endings[: max(count, 1)], endings[max(count, 1) :]
            places.update(((before, each), (len(groups), number)) for number, each in enumerate(taken))
            groups.append(Group(len(groups), ids, tuple(map(_ids, taken))))
    mine = share_of([sum(group.widths) * len(group.endings) for group in groups], context)
    table = score_endings(
        model,
        [groups[index] for index in mine],
        (len(groups), max((len(group.endings) for group in groups), default=0)),
        precision=precision,
        context=context,
        greedy=greedy,
        batch_tokens=limit,
        stop_requested=stop_requested,
        progress=progress,
    )
    losses, hits = table.tolist()

    def whole(part: Sequence[tuple[bytes, bytes]], tokens: int) -> Score:
        found = [places[one] for one in part]
        likeliest = sum(hits[group][ending] for group, ending in found)
        return Score(sum(losses[group][ending] for group, ending in found), tokens, greedy and likeliest == tokens)

    return [whole(part, len(after)) for part, (_, after) in zip(parts, pairs, strict=True)]


def _ids(key: bytes) -> Ids:
    return np.frombuffer(key, np.int64)


def _agree_on_passes(batches: Sequence[Sequence[Group]], context: Context) -> list[bool]:
    """For every turn of the process with the most batches: whether any process has contexts to compute in it."""
    mine = [int(any(group.widths[0] for group in batch)) for batch in batches]
    idle = [0] * (context.largest(len(mine)) - len(mine))
    return [count > 0 for count in context.sum(torch.tensor(mine + idle)).tolist()]


def _batches(groups: Sequence[Group], batch_tokens: int, block_size: int) -> list[list[Group]]:
    """Batch groups of similar length, all endings of a group together. The longest endings come first, so that a lack of memory
    shows at once; the other batches are in random order, so that the speed so far predicts the time left."""
    batches: list[list[Group]] = []
    rows = before = after = 0  # of the last batch: endings, width of contexts, width of endings
    # By endings first, since each group has several: on all of HellaSwag, padding then adds a fifth.
    for group in sorted(groups, key=lambda group: (-group.widths[1], -group.widths[0])):
        wider = max(before, group.widths[0]), max(after, group.widths[1])
        if not batches or (rows + len(group.endings)) * sum(wider) > batch_tokens or sum(wider) > block_size:
            batches.append([])
            rows, wider = 0, group.widths
        batches[-1].append(group)
        rows, (before, after) = rows + len(group.endings), wider
    others = batches[1:]
    random.Random(0).shuffle(others)
    return batches[:1] + others


def _score(
    model: GPT, batch: Sequence[Group], precision: Precision, device: torch.device, context_pass: bool, greedy: bool
) -> Tensor:
    """Loss and number of likeliest tokens of every ending of the batch, one group's after another's: float64 [2, endings], in
    host memory. `context_pass`: make a forward pass for contexts even if this batch has none, because another process does."""
    before, after = (max(widths) for widths in zip(*(group.widths for group in batch), strict=True))
    owner = [place for place, group in enumerate(batch) for _ in group.endings]  # the group of each ending
    contexts = np.zeros((len(batch), before), np.int64)  # padded on the right, where nothing before it looks
    inputs = np.zeros((len(owner), after), np.int64)
    targets = np.full((len(owner), after), IGNORE, np.int64)
    for row, group in zip(contexts, batch, strict=True):
        row[: len(group.context) - 1] = group.context[:-1]
    for place, (last, ending) in enumerate((group.context[-1], ending) for group in batch for ending in group.endings):
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
        scores: Tensor = model(tokens, wanted, reduction="none", cache=cache, output="scores" if greedy else "loss")
    scores = scores if greedy else torch.stack([scores, torch.zeros_like(scores)])  # [2, endings, after]
    return scores.cpu().double().sum(2)
