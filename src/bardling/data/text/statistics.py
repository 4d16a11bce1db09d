"""Statistics of a stream of documents in bounded memory: lengths, kinds of characters, and lines that occur again and again.

Lines are counted by lossy counting (Manku and Motwani, VLDB 2002): when the table is full, lines that have been rare so far are
forgotten. Counts of frequent lines are then slightly too low, and are said to be "at least".
"""

import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

_PER_OCTAVE = 4  # bins of a histogram between a length and its double
_BINS = 48 * _PER_OCTAVE
_MOST_LINES = 1 << 20  # distinct lines counted at a time
_LINE, _LONGEST_LINE = 20, 1 << 14  # characters of lines that count as repeated
_LETTERS = 0x20000  # code points from here on are ideographs
_SMALLEST_SCRIPT = 24  # letters; names that fewer letters begin with are no scripts
_NO_SCRIPT = {"", "COMBINING", "MODIFIER", "MATHEMATICAL", "VARIATION", "FULLWIDTH", "HALFWIDTH", "SUPERSCRIPT", "DOUBLE"}
_FIXED = (
    "digits",
    "spaces and line breaks",
    "punctuation and symbols",
    "control characters",
    "U+FFFD",
    "other letters",
    "other code points",
)
"""Kinds besides scripts."""


class Histogram:
    """Counts of lengths, in bins whose bounds grow by a factor of 2^(1/4)."""

    def __init__(self) -> None:
        self.counts = np.zeros(_BINS, np.int64)
        self.total, self.shortest, self.longest = 0, 0, 0

    def add(self, lengths: npt.NDArray[np.int64]) -> None:
        """Count documents of these lengths, [documents]."""
        if lengths.size:
            bins = (np.log2(np.maximum(lengths, 1)) * _PER_OCTAVE).astype(np.int64)
            self.counts += np.bincount(np.minimum(bins, _BINS - 1), minlength=_BINS)
            self.shortest = min(int(lengths.min()), self.shortest if self.total else int(lengths.min()))
            self.longest, self.total = max(self.longest, int(lengths.max())), self.total + len(lengths)

    def quantile(self, fraction: float) -> int:
        """A length that about this fraction of the documents does not exceed: within 19%."""
        place = int(np.searchsorted(np.cumsum(self.counts), fraction * self.total))
        return max(self.shortest, min(round(2 ** ((place + 1) / _PER_OCTAVE)), self.longest))

    def bars(self) -> list[tuple[int, int]]:
        """Length and count of each bar: lengths from a power of two to just below the next, as far as they occur."""
        counts = self.counts.reshape(-1, _PER_OCTAVE).sum(1)
        used = np.flatnonzero(counts)
        return [(1 << number, int(counts[number])) for number in range(used[0], used[-1] + 1)] if used.size else []

    def facts(self, unit: str) -> dict[str, Any]:
        """What a report shows, as plain values."""
        found = {"median": self.quantile(0.5), "p95": self.quantile(0.95), "longest": self.longest}
        return {"unit": unit, "bars": self.bars(), **found}


class LineCounter:
    """Finds the most frequent lines of `_LINE` to `_LONGEST_LINE` characters."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._rare = 0  # lines seen this often have been forgotten

    def add(self, text: str) -> None:
        self._counts.update([line for line in text.splitlines() if _LINE <= len(line) <= _LONGEST_LINE])
        while len(self._counts) > _MOST_LINES:
            self._rare += 1
            self._counts = Counter(
                {line: count for line, count in self._counts.items() if count > self._rare and len(line.strip()) >= _LINE}
            )

    @property
    def exact(self) -> bool:
        return not self._rare

    def repeated(self) -> list[tuple[str, int]]:
        """Lines that occur more than once, with their counts, in the order of the characters that they take."""
        found = [(line, count) for line, count in self._counts.items() if count > 1 and len(line.strip()) >= _LINE]
        return sorted(found, key=lambda item: (-len(item[0]) * item[1], item[0]))


@dataclass
class Sizes:
    """How much text there is."""

    documents: int = 0
    characters: int = 0
    bytes: int = 0  # in UTF-8
    words: int = 0


class TextStatistics:
    """Sums over documents, whose sizes are kept apart by a label such as their split."""

    def __init__(self) -> None:
        self.sizes: dict[str, Sizes] = {}
        self.lengths, self.lines = Histogram(), LineCounter()
        self._kinds = np.zeros(len(kinds()), np.int64)

    def add(self, label: str, text: str, points: npt.NDArray[np.uint32], words: int) -> None:
        """Count a part of a document: its text, the same as code points [characters], and its number of words."""
        sizes = self.sizes.setdefault(label, Sizes())
        sizes.characters += len(text)
        sizes.bytes += len(text) if text.isascii() else len(text.encode("utf-8", "replace"))
        sizes.words += words
        self.lines.add(text)
        self._kinds += np.bincount(_kind_table()[points], minlength=len(self._kinds))

    def end(self, label: str, length: int) -> None:
        """Count the document of `length` characters whose parts have been added."""
        self.sizes[label].documents += 1
        self.lengths.add(np.array([length]))

    @property
    def characters(self) -> int:
        return sum(sizes.characters for sizes in self.sizes.values())

    def characters_by_kind(self) -> list[tuple[str, int]]:
        """Characters of each kind that occurs, the most frequent first: letters by their script, and what is no letter."""
        found = [(name, int(count)) for name, count in zip(kinds(), self._kinds, strict=True) if count]
        return sorted(found, key=lambda item: -item[1])

    def characters_of(self, kind: str) -> int:
        return int(self._kinds[kinds().index(kind)])


def kinds() -> tuple[str, ...]:
    """Names of all kinds of characters."""
    return _tables()[0]


def _kind_table() -> npt.NDArray[np.uint8]:
    """The kind of each code point: uint8 [0x110000]."""
    return _tables()[1]


@cache
def _tables() -> tuple[tuple[str, ...], npt.NDArray[np.uint8]]:
    """Scripts are the first words of the letters' names in Unicode."""
    letters = [point for point in range(_LETTERS) if unicodedata.category(chr(point))[0] in "LM"]
    script_of = {point: unicodedata.name(chr(point), "").split(" ")[0].split("-")[0] for point in letters}
    sizes = Counter(script_of.values())
    scripts = sorted(name for name, size in sizes.items() if size >= _SMALLEST_SCRIPT and name not in _NO_SCRIPT)
    names = (*_FIXED, *("Chinese characters" if name == "CJK" else name.capitalize() for name in scripts))
    number = {name: place for place, name in enumerate(names)}
    place_of = {script: place for place, script in enumerate(scripts, len(_FIXED))}
    table = np.full(0x110000, number["other code points"], np.uint8)
    for point in range(_LETTERS):
        category = unicodedata.category(chr(point))
        if point in script_of:
            kind = place_of.get(script_of[point], number["other letters"])
        else:
            kind = number[_kind_of_other(chr(point), category)]
        table[point] = kind
    table[_LETTERS:0x32000] = number["Chinese characters"]
    return names, table


def _kind_of_other(character: str, category: str) -> str:
    """The kind of a character that is no letter."""
    if character.isspace():
        return "spaces and line breaks"
    if character == "\ufffd":
        return "U+FFFD"
    kinds_by_category = {"N": "digits", "P": "punctuation and symbols", "S": "punctuation and symbols"}
    return kinds_by_category.get(category[0], "control characters" if category == "Cc" else "other code points")
