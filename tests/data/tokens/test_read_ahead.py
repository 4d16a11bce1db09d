"""Reading ahead changes neither the items nor their order nor errors."""

import threading
import time
from itertools import count

import pytest

from bardling.data.tokens.read_ahead import read_ahead


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


def test_items_come_in_order():
    with read_ahead(range(1000), 3) as items:
        assert list(items) == list(range(1000))
    with read_ahead((), 1) as items:
        assert list(items) == []


def test_an_error_comes_in_its_place():
    def broken():
        yield from range(5)
        raise ValueError("five")

    seen = []
    with pytest.raises(ValueError, match="five"), read_ahead(broken(), 2) as items:
        seen.extend(items)
    with read_ahead(broken(), 2) as items:
        assert [next(items) for _ in range(5)] == list(range(5))


def test_only_a_few_items_are_read_ahead_and_none_after_the_end():
    read = []

    def endless():
        for number in count():
            read.append(number)
            yield number

    with read_ahead(endless(), 2) as items:
        assert next(items) == 0
        time.sleep(0.1)
        assert len(read) <= 4  # one consumed, two waiting, one to be handed over
    for _ in range(100):
        if not readers():
            break
        time.sleep(0.1)
    assert not readers()
    assert len(read) <= 5
