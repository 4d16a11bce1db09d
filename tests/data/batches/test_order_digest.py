"""The digest of the samples seen: a function of the samples alone."""

import numpy as np
import pytest

from bardling.data.batches import order_digest
from bardling.data.batches.order import SequenceOrder
from bardling.data.batches.order_digest import OrderDigest
from bardling.data.batches.skipped_ranges import skip_ranges

ORDER = SequenceOrder(3, 100_000, 16)


def digest(order, *ends):
    found = OrderDigest(order=order)
    for end in ends:
        found = found.upto(end)
    return str(found)


def test_is_that_of_a_plain_computation():
    """Python's integers instead of NumPy's; the value is part of the format."""

    def mix(x):
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    total = 0
    for sample, start in enumerate(ORDER.starts(0, 7).tolist()):
        total += mix(mix(mix((sample + 0x9E3779B97F4A7C15) % 2**64) ^ start) ^ 16)
    assert digest(ORDER, 7) == f"{total % 2**64:016x}"
    assert digest(ORDER, 0) == "0" * 16


def test_does_not_depend_on_steps(monkeypatch):
    whole = digest(ORDER, 1000)
    assert digest(ORDER, 1, 8, 8, 40, 1000) == whole
    monkeypatch.setattr(order_digest, "_CHUNK", 64)
    assert digest(ORDER, 1000) == whole


def test_differs_for_other_samples():
    skipping = skip_ranges(ORDER, [(100, 4)])
    assert digest(skipping, 100) == digest(ORDER, 100)
    orders = [ORDER, skipping, SequenceOrder(4, 100_000, 16), SequenceOrder(3, 100_001, 16), SequenceOrder(3, 100_000, 17)]
    assert len({digest(order, 200) for order in orders}) == len(orders)
    assert digest(ORDER, 199) != digest(ORDER, 200)


def test_the_same_samples_in_another_order_differ():
    class Swapped(SequenceOrder):
        def starts(self, first, count):
            found = super().starts(first, count)
            return np.concatenate([found[1::-1], found[2:]])

    assert digest(Swapped(3, 100_000, 16), 50) != digest(ORDER, 50)


def test_is_saved_and_continued():
    saved = OrderDigest(order=ORDER).upto(30).as_json()
    again = OrderDigest.from_json(saved, 30)
    assert str(OrderDigest(again.first, again.end, again.value, ORDER).upto(50)) == digest(ORDER, 50)


@pytest.mark.parametrize(
    "damaged",
    [
        [],
        {"first": 0},
        {"first": -1, "value": "0" * 16},
        {"first": 31, "value": "0" * 16},
        {"first": 0, "value": 3},
        {"first": 0, "value": "+" * 16},
        {"first": True, "value": "0" * 16},
    ],
)
def test_a_damaged_value_is_refused(damaged):
    with pytest.raises(ValueError, match="order_digest"):
        OrderDigest.from_json(damaged, 30)
