"""Skipped ranges: parts of the data order that a run leaves out because they led to bad steps.

A run counts the samples that it has seen; positions in the data order also count the skipped ones. `SkippingOrder` maps one to
the other, so that sample number i of the run is still a pure function of (seed, i) and the list of ranges, whatever the number
of processes. Adding a range changes only what comes after it: a run rolled back to before it sees the same samples up to there.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from bardling.data.batches.order import Int64s, SequenceOrder

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
class SkippingOrder(SequenceOrder):
    """A data order without some ranges; made by `skip_ranges`."""

    ranges: tuple[Range, ...] = ()  # as returned by `merge_ranges`

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
        starts = super().starts
        parts = [starts(*place) for place in self.places(first, count)]
        return np.concatenate(parts) if parts else starts(first, 0)


def skip_ranges(order: SequenceOrder, ranges: Iterable[Range]) -> SkippingOrder:
    """`order` without `ranges`, which may overlap."""
    return SkippingOrder(order.seed, order.n_tokens, order.block_size, order.row, merge_ranges(ranges))
