"""The data order: a permutation for every length, different in each epoch, and stable across versions."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bardling.data.batches.order import SequenceOrder, permute
from bardling.errors import UserError


@pytest.mark.parametrize("part", range(4))
def test_is_a_permutation_for_every_length(part: int) -> None:
    for size in range(1 + part * 750, 1 + (part + 1) * 750):
        key = np.full(size, size * 7919, np.uint64)
        out = permute(np.arange(size, dtype=np.uint64), key, size)
        assert np.array_equal(np.sort(out), np.arange(size)), size


def test_is_a_permutation_of_a_large_domain() -> None:
    size = 1_000_003
    out = permute(np.arange(size, dtype=np.uint64), np.full(size, 5, np.uint64), size)
    assert np.unique(out).size == size
    assert out.max() == size - 1


@given(
    seed=st.integers(-(2**70), 2**70),
    block_size=st.integers(1, 40),
    n_tokens=st.integers(2, 2000),
    first_epoch=st.integers(0, 10**6),
)
@settings(deadline=None)
def test_an_epoch_visits_each_sequence_once_within_the_split(
    seed: int, block_size: int, n_tokens: int, first_epoch: int
) -> None:
    if n_tokens < block_size + 1:
        with pytest.raises(UserError, match=r"model\.block_size"):
            SequenceOrder(seed, n_tokens, block_size)
        return
    order = SequenceOrder(seed, n_tokens, block_size)
    windows = order.sequences_per_epoch
    starts = np.sort(order.starts(first_epoch * windows, windows))
    assert starts.dtype == np.int64
    assert starts[0] >= 0
    assert starts[-1] + block_size <= n_tokens - 1  # the last target is in the split
    assert np.all(np.diff(starts) == block_size)  # inputs are disjoint
    assert n_tokens - windows * block_size < 2 * block_size + 1  # and nearly all of the text is visited


@given(first=st.integers(0, 10**9), counts=st.lists(st.integers(0, 50), min_size=1, max_size=6))
@settings(deadline=None)
def test_any_cut_of_the_samples_gives_the_same_starts(first: int, counts: list[int]) -> None:
    order = SequenceOrder(3, 1000, 16)
    whole = order.starts(first, sum(counts))
    parts, at = [], first
    for count in counts:
        parts.append(order.starts(at, count))
        at += count
    assert np.array_equal(whole, np.concatenate(parts))


def test_epochs_and_seeds_differ() -> None:
    order = SequenceOrder(1, 100_000, 100)
    n = order.sequences_per_epoch
    rows = [order.starts(e * n, n) for e in range(20)] + [SequenceOrder(s, 100_000, 100).starts(0, n) for s in (2, 3, -1)]
    assert len({row.tobytes() for row in rows}) == len(rows)
    offsets = {int(row.min()) for row in rows}
    assert len(offsets) > 12  # the grid moves


def test_offsets_use_the_whole_slack() -> None:
    order = SequenceOrder(1, 10 * 8 + 5, 8)  # 9 windows, slack 12
    offsets = {int(order.starts(e * 9, 9).min()) for e in range(600)}
    assert offsets == set(range(85 - 1 - 72 + 1))


@pytest.mark.parametrize("windows", [50, 257, 1000, 4096])
def test_shuffles_well(windows: int) -> None:
    order = SequenceOrder(11, windows * 8 + 8, 8)
    assert order.sequences_per_epoch == windows
    epochs = 40
    starts = order.starts(0, windows * epochs).reshape(epochs, windows)
    places = (starts - starts.min(axis=1, keepdims=True)) // 8  # [epoch, sample] -> which window of the grid
    samples = np.arange(windows)
    noise = 1 / np.sqrt(windows)
    for row, after in pairwise(places):
        assert abs(np.corrcoef(row, samples)[0, 1]) < 5 * noise  # not in the order of the text
        assert abs(np.corrcoef(row[:-1], row[1:])[0, 1]) < 5 * noise  # neighbours are not near
        assert abs(np.corrcoef(row, after)[0, 1]) < 5 * noise  # epochs are unlike
    fixed = (places == samples).sum(axis=1).mean()
    assert 0.5 < fixed < 1.6  # a random permutation keeps one element in place on average
    step = np.mean(np.diff(places, axis=1) == 1)
    assert step < 5 / windows  # nor do windows often follow each other
    # over epochs, every place of the order sees all parts of the text: chi-squared over quarters, 3 degrees of freedom
    quarters = np.stack([(places * 4 // windows == q).sum(axis=0) for q in range(4)])
    chi2 = ((quarters - epochs / 4) ** 2 / (epochs / 4)).sum(axis=0).mean()
    assert 2.4 < chi2 < 3.6


def test_small_domains_reach_all_permutations() -> None:
    seen = {tuple(permute(np.arange(3, dtype=np.uint64), np.full(3, key, np.uint64), 3).tolist()) for key in range(200)}
    assert len(seen) == 6


def test_the_order_never_changes() -> None:
    # resumed runs rely on exactly these numbers
    assert SequenceOrder(1337, 100_000, 256).starts(0, 6).tolist() == GOLDEN_START
    assert SequenceOrder(1337, 100_000, 256).starts(10**12, 3).tolist() == GOLDEN_LATE


GOLDEN_START = [37661, 74525, 76573, 31005, 51229, 82717]
GOLDEN_LATE = [29245, 69181, 79165]


def test_sequences_of_an_epoch() -> None:
    assert SequenceOrder(0, 1000, 10).sequences_per_epoch == 99


def test_a_split_that_is_too_short_is_refused_with_the_numbers() -> None:
    with pytest.raises(UserError, match=r"256 tokens, but one sequence needs model.block_size \+ 1 = 257.*at most 255"):
        SequenceOrder(0, 256, 256)
    assert SequenceOrder(0, 257, 256).sequences_per_epoch == 1
