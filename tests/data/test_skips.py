"""An order with ranges left out against the plain list with them cut out."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bardling.data.order import WindowOrder
from bardling.data.skips import merged, passing

ORDER = WindowOrder(7, 5_000, 16)
RANGES = st.lists(st.tuples(st.integers(0, 900), st.integers(0, 40)), max_size=6)


@settings(max_examples=60, deadline=None)
@given(RANGES, st.integers(0, 300), st.integers(0, 60))
def test_it_is_the_order_with_the_ranges_cut_out(ranges, first, count):
    gone = {window for begin, size in ranges for window in range(begin, begin + size)}
    left = [window for window in range(1500) if window not in gone]
    order = passing(ORDER, ranges)
    assert [w for begin, size in order.places(first, count) for w in range(begin, begin + size)] == left[first : first + count]
    every = ORDER.starts(0, 1500)
    assert np.array_equal(order.starts(first, count), every[left[first : first + count]])
    assert np.array_equal(order.starts(first, count), np.array([order.starts(first + i, 1)[0] for i in range(count)], np.int64))


@settings(max_examples=40, deadline=None)
@given(RANGES, st.integers(0, 200), st.integers(1, 20))
def test_passing_over_more_leaves_what_came_before(ranges, sample, count):
    before = passing(ORDER, ranges)
    after = passing(ORDER, [*ranges, *before.places(sample, count)])
    assert np.array_equal(after.starts(0, sample), before.starts(0, sample))
    assert np.array_equal(after.starts(sample, 30), before.starts(sample + count, 30))


def test_merged_ranges_are_in_order_and_apart():
    assert merged([(10, 5), (0, 3), (12, 8), (3, 1), (40, 0)]) == ((0, 4), (10, 10))
