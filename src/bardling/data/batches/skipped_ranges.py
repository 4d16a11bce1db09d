"""Skipped ranges: parts of the data order that a run leaves out because they led to bad steps.

A run counts the samples that it has seen; positions in the data order also count the skipped ones. `SkippingOrder` maps one to
the other, so that sample number i of the run is still a pure function of (seed, i) and the list of ranges, whatever the number
of processes. Adding a range changes only what comes after it: a run rolled back to before it sees the same samples up to there.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from bardling.data.batches.order import DataOrder, Int64s

Range = tuple[int, int]  # first position in the data order, and number of sequences


def merge_ranges(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """The same positions in as few ranges as possible, sorted."""
    result: list[Range] = []
    for first, count in sorted(entry for entry in ranges if entry[1] > 0):
        if result and first <= sum(result[-1]):
            begin, size = result.pop()
            count, first = max(size, first + count - begin), begin
        result.append((first, count))
    return tuple(result)


@dataclass(frozen=True)
class SkippingOrder:
    """A data order without some ranges; made by `skip_ranges`."""

    order: DataOrder
    ranges: tuple[Range, ...] = ()  # as returned by `merge_ranges`

    @property
    def n_tokens(self) -> int:
        return self.order.n_tokens

    @property
    def block_size(self) -> int:
        return self.order.block_size

    @property
    def sequences_per_epoch(self) -> int:
        return self.order.sequences_per_epoch

    def places(self, first: int, count: int) -> list[Range]:
        """Positions in the data order of samples `first` to `first + count - 1`, in as few ranges as possible."""
        position, result = first, []
        for begin, size in self.ranges:
            part = min(count, max(0, begin - position))
            if part:
                result.append((position, part))
            position, count = position + part, count - part
            if position >= begin:
                position += size
        return [*result, (position, count)] if count else result

    def starts(self, first: int, count: int) -> Int64s:
        parts = [self.order.starts(*place) for place in self.places(first, count)]
        return np.concatenate(parts) if parts else self.order.starts(first, 0)

    def epochs(self, samples: int) -> list[float]:
        """As in the data order: what was skipped counts as visited."""
        return self.order.epochs(samples + sum(size for begin, size in self.ranges if begin < samples))


def skip_ranges(order: DataOrder, ranges: Iterable[Range]) -> SkippingOrder:
    """`order` without `ranges`, which may overlap."""
    return SkippingOrder(order, merge_ranges(ranges))
