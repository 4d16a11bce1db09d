"""Batch and context that grow: every step's size, and the samples before it, against a plain sum."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bardling.planning.schedules import Ramp


@given(st.integers(1, 60), st.integers(0, 4), st.floats(0, 1), st.integers(1, 3))
def test_sizes_only_double_and_samples_are_their_sum(steps, doublings, fraction, odd):
    ramp, whole = Ramp(doublings, fraction), odd * 16
    sizes = [ramp.size_at(step, steps, whole) for step in range(steps)]
    assert all(size in [whole >> n for n in range(doublings + 1)] for size in sizes)
    assert sizes == sorted(sizes)
    for step in range(steps + 1):
        assert ramp.total_before(step, steps, whole) == sum(sizes[:step])
    if fraction == 0 or doublings == 0:
        assert set(sizes) == {whole}
    assert ramp.size_at(steps, steps, whole) == whole


def test_stages_have_equal_length():
    ramp = Ramp(doublings=2, fraction=0.4)
    assert [ramp.size_at(step, 10, 256) for step in range(10)] == [64, 64, 128, 128, *[256] * 6]


def test_sizes_that_do_not_halve_are_refused():
    with pytest.raises(ValueError, match="12 cannot be halved 3 times: choose a multiple of 8"):
        Ramp(3, 0.5).size_at(0, 10, 12)
    with pytest.raises(ValueError, match="doublings"):
        Ramp(-1, 0.5)
