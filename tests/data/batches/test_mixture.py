"""Mixtures: exact shares for any weights, every sequence of a source once per epoch, and an order that never changes."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bardling.data.batches.mixture import WINDOW, MixedOrder, MixtureStage, mixed_order
from bardling.data.batches.order import SequenceOrder
from bardling.data.batches.order_digest import OrderDigest
from bardling.data.batches.skipped_ranges import skip_ranges
from bardling.errors import UserError

LENGTHS = (30_000, 12_000, 5_000)
STAGES = (MixtureStage(0, (0.8, 0.15, 0.05)), MixtureStage(9_001, (0.2, 0.6, 0.2)))
ORDER = mixed_order(1337, LENGTHS, 16, 0, STAGES)

weight = st.one_of(st.just(0.0), st.floats(1e-6, 1e6))
weights = st.lists(weight, min_size=2, max_size=6).filter(any)


@pytest.mark.parametrize(
    "shares",
    [(1 / 3, 1 / 3, 1 / 3), (0.001, 0.333, 1), (5, 3, 1), (80, 15, 5), (1e-9, 1, 1), (0, 1, 2), (math.pi, math.e, 0.1)],
)
def test_shares_are_within_a_thousandth_of_the_weights(shares):
    order = mixed_order(1, LENGTHS, 16, 0, [MixtureStage(0, shares)])
    sources, _ = order.assignment(0, 30_000)
    found = np.bincount(sources, minlength=3) / 30_000
    assert np.abs(found - np.array(shares) / sum(shares)).max() < 0.001
    for size in (8_000, 12_345):  # also of any part of the run that is long enough
        found = np.bincount(sources[7_000 : 7_000 + size], minlength=3) / size
        assert np.abs(found - np.array(shares) / sum(shares)).max() < 0.003


@given(shares=weights, count=st.integers(0, 10**15), more=st.integers(0, 10**6))
def test_counts_add_up_and_never_fall(shares, count, more):
    stage = MixtureStage(0, tuple(shares))
    before, after = stage.apportion(count), stage.apportion(count + more)
    assert sum(before) == count
    assert all(one <= two for one, two in zip(before, after, strict=True))
    exact = [count * share / sum(shares) for share in shares]
    assert all(abs(one - two) <= 2 + 1e-9 * count for one, two in zip(before, exact, strict=True))


@given(data=st.data(), shares=st.lists(st.tuples(weight, weight, weight).filter(any), min_size=1, max_size=3))
@settings(max_examples=40)
def test_a_source_gets_its_numbers_in_turn_over_all_stages(data, shares):
    begins = sorted({0, *data.draw(st.lists(st.integers(1, 900), min_size=len(shares) - 1, max_size=len(shares) - 1))})
    stages = [MixtureStage(*pair) for pair in zip(begins, shares, strict=False)]
    order = mixed_order(data.draw(st.integers(-(2**70), 2**70)), LENGTHS, 16, 0, stages)
    end = stages[-1].first + 10 * WINDOW  # a whole number of windows after the last change
    sources, numbers = order.assignment(0, end)
    for source in range(3):
        assert np.sort(numbers[sources == source]).tolist() == list(range(int((sources == source).sum())))
    for samples in (0, 1, WINDOW, end - 1, end, *begins):
        assert order.counts(samples) == np.bincount(sources[:samples], minlength=3).tolist()


@given(first=st.integers(0, 20_000), counts=st.lists(st.integers(0, 200), min_size=1, max_size=6))
def test_any_cut_of_the_samples_gives_the_same_sequences(first, counts):
    whole, at, parts = ORDER.starts(first, sum(counts)), first, []
    for count in counts:
        parts.append(ORDER.starts(at, count))
        at += count
    assert np.array_equal(whole, np.concatenate(parts))


def test_the_weights_change_exactly_at_the_stage():
    stages = (MixtureStage(0, (1, 0, 0)), MixtureStage(9_001, (0, 1, 0)), MixtureStage(9_002, (0, 0, 1)))
    sources, numbers = mixed_order(3, LENGTHS, 16, 0, stages).assignment(8_990, 100)
    assert sources.tolist() == [0] * 11 + [1] + [2] * 88
    assert numbers[11] == 0


def test_a_later_stage_changes_nothing_before_it():
    other = mixed_order(1337, LENGTHS, 16, 0, (STAGES[0], MixtureStage(9_001, (0, 0, 1))))
    assert np.array_equal(other.starts(0, 9_001), ORDER.starts(0, 9_001))
    assert not np.array_equal(other.starts(9_001, 100), ORDER.starts(9_001, 100))


def test_each_source_is_visited_once_per_epoch_and_within_its_own_tokens():
    orders = [SequenceOrder(0, length, 16) for length in LENGTHS]
    sources, _ = ORDER.assignment(0, 9_001 + 64 * 200)
    starts = ORDER.starts(0, len(sources))
    for source, (begin, single) in enumerate(zip((0, 30_000, 42_000), orders, strict=True)):
        mine = np.sort(starts[sources == source])
        assert mine.min() >= begin
        assert mine.max() + 16 < begin + single.n_tokens
        epochs = ORDER.epochs(len(sources))[source]
        assert epochs == pytest.approx(len(mine) / single.sequences_per_epoch)
        visits = np.unique(mine, return_counts=True)[1]
        assert visits.max() <= math.ceil(epochs)  # the grid moves, so the same start may never come back


def test_sources_are_shuffled_without_a_period():
    sources, _ = mixed_order(5, LENGTHS, 16, 0, [MixtureStage(0, (1, 1, 0))]).assignment(0, WINDOW * 200)
    rows = sources.reshape(200, WINDOW)
    assert len({row.tobytes() for row in rows}) == 200
    assert np.all(rows.sum(axis=1) == WINDOW // 2)
    assert abs(rows.mean(axis=0) - 0.5).max() < 0.2  # no place of a window prefers a source


def test_one_source_has_the_order_that_it_always_had():
    for stages in ([MixtureStage(0, (1.0,))], [MixtureStage(0, (0.3,)), MixtureStage(50, (2.0,))]):
        order = mixed_order(1337, [100_000], 256, 0, stages)
        assert order == SequenceOrder(1337, 100_000, 256)
        assert order.starts(0, 6).tolist() == [37661, 74525, 76573, 31005, 51229, 82717]


def test_the_order_never_changes():
    # resumed runs rely on exactly these numbers
    assert isinstance(ORDER, MixedOrder)
    assert ORDER.assignment(0, 16)[0].tolist() == GOLDEN_SOURCES
    assert ORDER.starts(8_999, 5).tolist() == GOLDEN_CHANGE
    assert ORDER.starts(10**12, 3).tolist() == GOLDEN_LATE
    assert str(OrderDigest(order=ORDER).upto(20_000)) == GOLDEN_DIGEST


GOLDEN_SOURCES = [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]
GOLDEN_CHANGE = [45718, 12317, 37650, 35394, 15341]
GOLDEN_LATE = [45697, 39561, 46833]
GOLDEN_DIGEST = "5e82008116ca1227"


def test_ranges_are_skipped_as_in_any_order():
    skipping = skip_ranges(ORDER, [(10, 4), (9_000, 2)])
    expected = np.delete(ORDER.starts(0, 10_000), [10, 11, 12, 13, 9_000, 9_001])
    assert np.array_equal(skipping.starts(0, 9_994), expected)


def test_a_source_that_is_too_short_is_refused():
    with pytest.raises(UserError, match="has 16 tokens"):
        mixed_order(1, [1000, 16], 16, 0, [MixtureStage(0, (1, 1))])
