"""Skipped ranges, compared with a plain list from which they are removed."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bardling.data.batches.order import SequenceOrder
from bardling.data.batches.skipped_ranges import merge_ranges, skip_ranges

ORDER = SequenceOrder(7, 5_000, 16)
RANGES = st.lists(st.tuples(st.integers(0, 900), st.integers(0, 40)), max_size=6)


@settings(max_examples=60, deadline=None)
@given(RANGES, st.integers(0, 300), st.integers(0, 60))
def test_the_order_without_the_ranges(ranges, first, count):
    skipped = {position for begin, size in ranges for position in range(begin, begin + size)}
    left = [position for position in range(1500) if position not in skipped]
    order = skip_ranges(ORDER, ranges)
    assert [w for begin, size in order.places(first, count) for w in range(begin, begin + size)] == left[first : first + count]
    every = ORDER.starts(0, 1500)
    assert np.array_equal(order.starts(first, count), every[left[first : first + count]])
    assert np.array_equal(order.starts(first, count), np.array([order.starts(first + i, 1)[0] for i in range(count)], np.int64))


@settings(max_examples=40, deadline=None)
@given(RANGES, st.integers(0, 200), st.integers(1, 20))
def test_a_further_range_does_not_change_earlier_samples(ranges, sample, count):
    before = skip_ranges(ORDER, ranges)
    after = skip_ranges(ORDER, [*ranges, *before.places(sample, count)])
    assert np.array_equal(after.starts(0, sample), before.starts(0, sample))
    assert np.array_equal(after.starts(sample, 30), before.starts(sample + count, 30))


def test_merged_ranges_are_sorted_and_disjoint():
    assert merge_ranges([(10, 5), (0, 3), (12, 8), (3, 1), (40, 0)]) == ((0, 4), (10, 10))
