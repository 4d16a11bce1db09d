"""Lengths, kinds of characters and repeated lines, compared with counts made one by one."""

import unicodedata

import numpy as np
import pytest

from bardling.data.text import statistics as module
from bardling.data.text.statistics import Histogram, LineCounter, TextStatistics
from bardling.data.text.words import code_points


def counted(*texts):
    found = TextStatistics()
    for text in texts:
        found.add("train", text, code_points(text), 3)
        found.end("train", len(text))
    return found


def test_sizes():
    found = counted("añ€", "b")
    sizes = found.sizes["train"]
    assert (sizes.documents, sizes.characters, sizes.bytes, sizes.words) == (2, 4, 7, 6)


def test_kinds():
    found = dict(counted("Añ Ж1\t日ひカ한.\ufffd\x00\ue000").characters_by_kind())
    fixed = {"digits": 1, "spaces and line breaks": 2, "punctuation and symbols": 1, "control characters": 1, "U+FFFD": 1}
    scripts = {"Latin": 2, "Cyrillic": 1, "Chinese characters": 1, "Hiragana": 1, "Katakana": 1, "Hangul": 1}
    assert found == {**fixed, **scripts, "other code points": 1}


def test_every_character_has_one_kind():
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    found = counted(text)
    assert sum(count for _, count in found.characters_by_kind()) == len(text)
    assert found.characters_of("control characters") == sum(unicodedata.category(c) == "Cc" and not c.isspace() for c in text)


def test_histogram():
    lengths = np.random.default_rng(0).integers(1, 5000, 2000)
    found = Histogram()
    for part in np.split(lengths, 10):
        found.add(part)
    assert sum(count for _, count in found.bars()) == 2000
    for low, count in found.bars():
        assert count == ((lengths >= low) & (lengths < 2 * low)).sum()
    assert found.quantile(0.5) == pytest.approx(np.median(lengths), rel=0.19)
    assert (found.shortest, found.longest) == (lengths.min(), lengths.max())


def test_repeated_lines():
    found = LineCounter()
    for number in range(50):
        found.add(f"a line that every document has\nshort\nonly in document {number:>10}\n")
    assert found.exact
    assert found.repeated() == [("a line that every document has", 50)]


def test_lines_are_counted_in_bounded_memory(monkeypatch):
    monkeypatch.setattr(module, "_MOST_LINES", 100)
    found = LineCounter()
    for number in range(2000):
        found.add(f"a line that every document has\nonly in document {number:>10}\n")
    assert not found.exact
    assert len(found._counts) <= 102
    ((line, count),) = found.repeated()
    assert line == "a line that every document has"
    assert 1900 <= count <= 2000
