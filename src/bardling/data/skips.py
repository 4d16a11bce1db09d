"""Samples that a run passes over: ranges of the data's order that led to bad numbers.

A run counts the samples that it has seen; the order counts windows. `passing` is the order with the ranges left out, so that
sample number i of the run is still a pure function of (seed, i) and the list of ranges, whatever the number of processes.
A range that is added only moves what comes after it: a run that goes back to before it sees the same samples up to there.
"""

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from bardling.data.order import Int64s

Range = tuple[int, int]
"""First window of the order, and how many."""


class Order(Protocol):
    """Which window each sample is: `WindowOrder`, or one that leaves some out."""

    @property
    def n_tokens(self) -> int: ...

    @property
    def block_size(self) -> int: ...

    @property
    def windows_per_epoch(self) -> int: ...

    def starts(self, first: int, count: int) -> Int64s:
        """Where the windows of samples `first` to `first + count - 1` begin: int64 [count]."""
        ...


def merged(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """The same windows in as few ranges as possible, in order."""
    found: list[Range] = []
    for first, count in sorted(ranges):
        if count <= 0:
            continue
        if found and first <= sum(found[-1]):
            begin, _ = found[-1]
            found[-1] = (begin, max(sum(found[-1]), first + count) - begin)
        else:
            found.append((first, count))
    return tuple(found)


@dataclass(frozen=True)
class PassingOrder:
    """An order with ranges left out."""

    order: Order
    ranges: tuple[Range, ...]
    """As `merged` gives them."""
    _begins: tuple[int, ...] = field(init=False, repr=False)  # sample at which each range has been passed over
    _passed: tuple[int, ...] = field(init=False, repr=False)  # windows in the ranges up to there

    def __post_init__(self) -> None:
        begins, passed, total = [], [], 0
        for first, count in self.ranges:
            begins.append(first - total)
            total += count
            passed.append(total)
        object.__setattr__(self, "_begins", tuple(begins))
        object.__setattr__(self, "_passed", tuple(passed))

    @property
    def n_tokens(self) -> int:
        return self.order.n_tokens

    @property
    def block_size(self) -> int:
        return self.order.block_size

    @property
    def windows_per_epoch(self) -> int:
        return self.order.windows_per_epoch

    def places(self, first: int, count: int) -> list[Range]:
        """Where in the order samples `first` to `first + count - 1` are, in as few ranges as possible."""
        found = []
        while count > 0:
            which = bisect.bisect_right(self._begins, first)  # ranges passed over before this sample
            part = count if which == len(self._begins) else min(count, self._begins[which] - first)
            found.append((first + (self._passed[which - 1] if which else 0), part))
            first, count = first + part, count - part
        return found

    def starts(self, first: int, count: int) -> Int64s:
        """As `WindowOrder.starts`."""
        parts = [self.order.starts(*place) for place in self.places(first, count)]
        return np.concatenate(parts) if parts else self.order.starts(first, 0)


def passing(order: Order, ranges: Sequence[Range]) -> PassingOrder:
    """`order` without `ranges`, which may overlap."""
    return PassingOrder(order, merged(ranges))
