"""Order of a mixture: which sequence of which source is sample number i of a run, as a pure function of (seed, i).

The stages of a mixture have their own weights. The samples of a stage are divided into windows of `WINDOW`. Up to the end of
each window, every source has received its weight's share of the stage's samples, rounded (`apportion`); a keyed permutation
shuffles the sources within the window. A source's samples are numbered without gaps over all windows and stages, and its own
`SequenceOrder` turns the number into a sequence. So nothing is stored, every source is visited once per epoch of its own, and
after any number of samples its count differs from its share by at most a few samples.

Positions are those in the sources' splits joined end to end, in the order of the sources. With one source, the order is that of
`SequenceOrder`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import lcm

import numpy as np

from bardling.data.batches.order import GOLDEN, MASK, DataOrder, Int64s, SequenceOrder, mix, permute

WINDOW = 64
"""Samples among which sources are shuffled. Like the order itself, it is part of the format."""


@dataclass(frozen=True)
class MixtureStage:
    first: int  # sample; the first stage begins at 0
    weights: tuple[float, ...]  # of the sources: at least 0, not all 0; their sum does not matter

    @cached_property
    def _whole(self) -> tuple[int, ...]:
        """The weights, exactly, as integers of the same proportions."""
        exact = [Fraction(weight) for weight in self.weights]
        scale = lcm(*(weight.denominator for weight in exact))
        return tuple(int(weight * scale) for weight in exact)

    def apportion(self, count: int) -> list[int]:
        """How many of the first `count` samples each source receives; they add up, and never fall as `count` grows."""
        result, rest = [], sum(self._whole)
        for weight in self._whole:
            share = (2 * count * weight + rest) // (2 * rest) if rest else 0
            result.append(share)
            count, rest = count - share, rest - weight
        return result


@dataclass(frozen=True)
class MixedOrder:
    """The order of several sources; see `DataOrder`. The stages begin at sample 0 and are sorted."""

    seed: int
    orders: tuple[SequenceOrder, ...]  # of each source
    stages: tuple[MixtureStage, ...]

    @property
    def n_tokens(self) -> int:
        return sum(order.n_tokens for order in self.orders)

    @property
    def block_size(self) -> int:
        return self.orders[0].block_size

    @property
    def sequences_per_epoch(self) -> int:
        """Sequences of all sources together."""
        return sum(order.sequences_per_epoch for order in self.orders)

    @cached_property
    def _given(self) -> tuple[tuple[int, ...], ...]:
        """Samples that each source has received before each stage."""
        totals, result = [0] * len(self.orders), list[tuple[int, ...]]()
        for number, stage in enumerate(self.stages):
            result.append(tuple(totals))
            if number + 1 < len(self.stages):
                shares = stage.apportion(self.stages[number + 1].first - stage.first)
                totals = [total + share for total, share in zip(totals, shares, strict=True)]
        return tuple(result)

    def assignment(self, first: int, count: int) -> tuple[Int64s, Int64s]:
        """The source of samples `first` to `first + count - 1`, and the sample's number within the source: int64 [count]."""
        if first < 0 or count < 0:
            raise ValueError(f"samples {first} to {first + count}: must not be negative")
        parts = [self._in_stage(*part) for part in self._by_stage(first, first + count)]
        empty = np.zeros((2, 0), np.int64)
        sources, numbers = np.concatenate([empty, *parts], axis=1)
        return sources, numbers

    def counts(self, samples: int) -> list[int]:
        """How many of the first `samples` samples came from each source."""
        number = max(number for number, stage in enumerate(self.stages) if stage.first <= samples)
        stage, begun = self.stages[number], self.stages[number].first
        whole = (samples - begun) // WINDOW * WINDOW
        rest = np.bincount(self.assignment(begun + whole, samples - begun - whole)[0], minlength=len(self.orders)).tolist()
        return [sum(parts) for parts in zip(self._given[number], stage.apportion(whole), rest, strict=True)]

    def epochs(self, samples: int) -> list[float]:
        """How often each source has been visited after `samples` samples."""
        return [count / order.sequences_per_epoch for count, order in zip(self.counts(samples), self.orders, strict=True)]

    def starts(self, first: int, count: int) -> Int64s:
        sources, numbers = self.assignment(first, count)
        result, begin = np.empty(count, np.int64), 0
        for number, order in enumerate(self.orders):
            chosen = np.flatnonzero(sources == number)
            result[chosen] = begin + order.starts_of(numbers[chosen])
            begin += order.n_tokens
        return result

    def _by_stage(self, first: int, end: int) -> Iterator[tuple[int, int, int]]:
        """The stages of samples `first` to `end` - 1: each one's number, and its first and last sample + 1 among these."""
        ends = [*(stage.first for stage in self.stages[1:]), end]
        for number, (stage, stage_end) in enumerate(zip(self.stages, ends, strict=True)):
            low, high = max(first, stage.first), min(end, stage_end)
            if low < high:
                yield number, low, high

    def _in_stage(self, number: int, first: int, end: int) -> Int64s:
        """`assignment` of samples `first` to `end` - 1, all of one stage: [2, end - first]."""
        stage = self.stages[number]
        length = self.stages[number + 1].first - stage.first if number + 1 < len(self.stages) else None
        local = np.arange(first - stage.first, end - stage.first)
        window = local // WINDOW
        low, high = int(window[0]), int(window[-1]) + 1
        bounds = [(n + 1) * WINDOW if length is None else min((n + 1) * WINDOW, length) for n in range(low - 1, high)]
        before = np.array([stage.apportion(bound) for bound in bounds], np.int64)  # [windows + 1, sources], after each window
        upto = np.diff(before, axis=0).cumsum(axis=1)  # [windows, sources]: places in the window up to this source
        key = mix(np.full(1, (self.seed ^ number * GOLDEN) & MASK, np.uint64) + np.uint64(GOLDEN))
        keys = mix(key ^ mix(window.astype(np.uint64) + np.uint64(1)))
        places, sizes = (local % WINDOW).astype(np.uint64), upto[:, -1][window - low]
        for size in np.unique(sizes).tolist():  # WINDOW, and what remains at the end of the stage
            same = np.flatnonzero(sizes == size)
            places[same] = permute(places[same], keys[same], size)
        place, row = places.astype(np.int64), window - low
        source = (place[:, None] >= upto[row]).sum(axis=1)  # [end - first]
        earlier = np.where(source > 0, upto[row, source - 1], 0)  # places of the sources before it in the window
        given = np.array(self._given[number], np.int64)[source]
        return np.stack([source, given + before[row, source] + place - earlier])


def mixed_order(seed: int, lengths: Sequence[int], block_size: int, row: int, stages: Sequence[MixtureStage]) -> DataOrder:
    """The order of sources with these numbers of tokens; see `SequenceOrder` for `block_size` and `row`."""
    seeds = [seed, *(_seed_of(seed, number) for number in range(1, len(lengths)))]
    orders = tuple(SequenceOrder(own, length, block_size, row) for own, length in zip(seeds, lengths, strict=True))
    return orders[0] if len(orders) == 1 else MixedOrder(seed, orders, tuple(stages))


def _seed_of(seed: int, source: int) -> int:
    return int(mix(np.full(1, (seed + source * GOLDEN) & MASK, np.uint64))[0])
