"""The words of a text and their n-grams, as 64-bit hashes: two texts with the same words in a row have the same hashes.

A word is a run of letters, digits and their marks; case, punctuation and spacing do not count. In scripts without spaces
(Chinese, Japanese, Thai, ...), each character is a word.

Method: a polynomial hash modulo 2^64 from prefix sums, for all words of a text at once in NumPy (40 MB/s), mixed by the
finalizer of SplitMix64. Limits: capital letters without a lower-case letter of their own (such as the dotted I) stay as they
are; the hash detects equality and is not made to resist forgery.
"""

import unicodedata
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]

_FACTOR = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_PIECE = 1 << 18  # characters hashed at once
_OWN = 1 << 31  # marks a character that is a word of its own
_UNSPACED = ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x3400, 0x9FFF), (0xF900, 0xFAFF))
_PLANES = 0x20000  # code points from here on are ideographs


class Words(NamedTuple):
    """The words of a text."""

    hashes: Hashes  # [words]
    starts: npt.NDArray[np.int64]  # [words], position of the first character
    ends: npt.NDArray[np.int64]  # [words], position after the last one


def code_points(text: str) -> npt.NDArray[np.uint32]:
    """The characters of a text as numbers: uint32 [characters]."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def find_words(points: npt.NDArray[np.uint32]) -> Words:
    """The words of a text, given its `code_points`."""
    folded = _folding()[points]
    parts = [_words(folded[begin:end], begin) for begin, end in _pieces(folded)]
    return Words._make(np.concatenate(columns) for columns in zip(*parts, strict=True))


def ngrams(hashes: Hashes, size: int) -> Hashes:
    """A hash of each run of `size` words: [words - size + 1]; of a shorter text, one of all its words."""
    size = min(size, len(hashes))
    total, done = hashes, 1
    with np.errstate(over="ignore"):
        for bit in f"{size:b}"[1:]:  # a run is two of half its size, and perhaps one word
            total, done = total[:-done] * np.uint64(pow(_FACTOR, done, 1 << 64)) + total[done:], 2 * done
            if bit == "1":
                total, done = total[:-1] * np.uint64(_FACTOR) + hashes[done:], done + 1
    return _mix(total)


def _mix(x: Hashes) -> Hashes:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _pieces(folded: npt.NDArray[np.uint32]) -> Iterator[tuple[int, int]]:
    """Bounds of pieces that end between words, except in a word as long as a piece."""
    begin = 0
    while len(folded) - begin > _PIECE:
        gaps = np.flatnonzero(folded[begin : begin + _PIECE] == 0)
        end = begin + (int(gaps[-1]) + 1 if gaps.size else _PIECE)
        yield begin, end
        begin = end
    yield begin, len(folded)


def _words(folded: npt.NDArray[np.uint32], offset: int) -> Words:
    inside, own = np.zeros(len(folded) + 2, bool), np.zeros(len(folded) + 2, bool)  # with a gap at each end
    inside[1:-1], own[1:-1] = folded != 0, folded >= _OWN
    alone = own[1:] | own[:-1]
    starts = np.flatnonzero((inside[1:] & (~inside[:-1] | alone))[:-1])
    ends = np.flatnonzero((inside[:-1] & (~inside[1:] | alone))[1:]) + 1
    powers, inverses = _powers()
    sums = np.zeros(len(folded) + 1, np.uint64)
    np.cumsum(folded * powers[: len(folded)], out=sums[1:])
    return Words(_mix((sums[ends] - sums[starts]) * inverses[starts]), starts + offset, ends + offset)


@cache
def _powers() -> tuple[Hashes, Hashes]:
    """Powers of the factor and of its inverse, [_PIECE] each."""
    both = []
    for factor in (_FACTOR, pow(_FACTOR, -1, 1 << 64)):
        factors = np.full(_PIECE, factor, np.uint64)
        factors[0] = 1
        both.append(np.cumprod(factors, dtype=np.uint64))
    return both[0], both[1]


@cache
def _folding() -> npt.NDArray[np.uint32]:
    """For each code point, the lower-case letter that it counts as; 0 between words."""
    table = np.arange(0x110000, dtype=np.uint32) | np.uint32(_OWN)
    for point in range(_PLANES):
        letter = chr(point)
        lower = letter.lower()
        within = letter.isalnum() or unicodedata.category(letter)[0] == "M"
        table[point] = (ord(lower) if len(lower) == 1 else point) if within else 0
    for first, last in _UNSPACED:
        part = table[first : last + 1]
        part[part != 0] |= np.uint32(_OWN)
    table[0x30000 + 0x20000 :] = 0  # unassigned and private planes
    return table
