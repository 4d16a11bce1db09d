"""Passages of some texts (validation text, items of a task) in other texts (training documents), by runs of 13 words.

This is the measure of GPT-3 (Brown et al. 2020, appendix C): two texts overlap where 13 words in a row are the same. Texts of 8
to 12 words are looked for as a whole; shorter ones are skipped, because they occur by chance. What more than ten documents
contain is boilerplate, such as a licence, and can be told apart by `boilerplate`.

Method: the runs are 64-bit hashes in a sorted table behind a filter of bits, so that a text of no interest costs little. Above
`_MOST` runs, a fraction of them is looked for, chosen by their hashes: long passages are still found.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bardling.data.text.words import Hashes, Words, ngrams

RUN = 13  # words
SHORTEST = 8
MANY_DOCUMENTS = 10
_MOST = 1 << 24
_MOST_PASSAGES = 8  # kept of each text


class Passage(NamedTuple):
    """A run of words of a document that occurs in a text that is looked for."""

    owner: int  # number of that text
    document: str
    words: int
    excerpt: str
    boilerplate: bool


@dataclass(frozen=True)
class _Table:
    hashes: Hashes  # sorted
    owners: npt.NDArray[np.int32]
    documents: npt.NDArray[np.int64]  # how many documents contain each


class Overlaps:
    """Looks for texts in documents.

    Attributes:
        owners: how many texts were given.
        skipped: and how many of them are too short to be looked for.
        fraction: the fraction of their runs that are looked for.
    """

    def __init__(self, texts: Iterable[Hashes]) -> None:
        runs: dict[int, list[tuple[Hashes, int]]] = {}
        starts = [np.zeros(0, np.uint64)]
        self.owners = self.skipped = total = 0
        self.fraction = 1.0
        for words in texts:
            size = min(RUN, len(words))
            if size >= SHORTEST:
                found = self._kept(ngrams(words, size))
                runs.setdefault(size, []).append((found, self.owners))
                total += len(found)
                if size < RUN:
                    starts.append(ngrams(words, SHORTEST)[:1])
            else:
                self.skipped += 1
            self.owners += 1
            while total > _MOST:
                self.fraction /= 2
                runs = {size: [(self._kept(part), owner) for part, owner in parts] for size, parts in runs.items()}
                total = sum(len(part) for parts in runs.values() for part, _ in parts)
        self._tables = {size: _table(parts) for size, parts in sorted(runs.items())}
        self._starts = np.unique(np.concatenate(starts))  # of the texts with fewer than RUN words
        self._filter = np.zeros(1 << 16, bool)
        if total:
            self._filter = np.zeros(1 << max(16, int(total * 16).bit_length()), bool)
        for table in self._tables.values():
            self._filter[self._place(table.hashes)] = True
        self._passages: dict[int, list[tuple[int, int, int, str, str]]] = {}
        """The longest of each text: words, size, place in the table, document, excerpt."""

    def _kept(self, hashes: Hashes) -> Hashes:
        return hashes if self.fraction == 1 else hashes[hashes < np.uint64(int(self.fraction * 2.0**64))]

    def _place(self, hashes: Hashes) -> npt.NDArray[np.int64]:
        return (hashes & np.uint64(len(self._filter) - 1)).astype(np.int64)

    def look(self, name: str, text: str, words: Words, before: Hashes | None = None) -> None:
        """Look for the texts in a document, or in a part of it that comes after the words `before`."""
        whole = words.hashes if before is None else np.concatenate([before[1 - RUN :], words.hashes])
        begun = len(self._starts) and _rows(self._starts, ngrams(whole, SHORTEST))[1].any()
        for size, table in self._tables.items():
            joined = whole[max(0, len(whole) - len(words.hashes) - size + 1) :]
            earlier = len(joined) - len(words.hashes)
            if not len(words.hashes) or len(joined) < size or (size < RUN and not begun):
                continue
            hashes = ngrams(joined, size)
            places = np.flatnonzero(self._filter[self._place(hashes)])
            rows, hit = _rows(table.hashes, hashes[places])
            places, rows = places[hit], rows[hit]
            if not places.size:
                continue
            table.documents[np.unique(rows)] += 1
            for begin, end in _stretches(places, 1 if self.fraction == 1 else RUN):
                first, last = int(places[begin]), int(places[end - 1]) + size - 1
                begins, ends = max(0, first - earlier), min(last, first + 2 * RUN) - earlier
                excerpt = " ".join(text[words.starts[begins] : words.ends[ends]].split())
                row = int(rows[(begin + end) // 2])
                kept = self._passages.setdefault(int(table.owners[row]), [])
                kept.append((last - first + 1, size, row, name, excerpt))
                if len(kept) > _MOST_PASSAGES:
                    kept.remove(min(kept))

    def passages(self) -> Iterator[Passage]:
        """The longest passages of each text, from the longest of all on; of equal runs in several texts, the first has them."""
        found = [(passage, owner) for owner, passages in self._passages.items() for passage in passages]
        for (words, size, row, name, excerpt), owner in sorted(found, reverse=True):
            yield Passage(owner, name, words, excerpt, bool(self._tables[size].documents[row] > MANY_DOCUMENTS))

    def shares(self, *, boilerplate: bool) -> npt.NDArray[np.float64]:
        """The fraction of each text's runs that occur in the documents, [owners]; NaN if it is not looked for."""
        found, total = np.zeros(self.owners), np.zeros(self.owners)
        for table in self._tables.values():
            documents = table.documents[np.searchsorted(table.hashes, table.hashes)]  # of equal runs, the first is counted
            counted = np.ones(len(documents), bool) if boilerplate else documents <= MANY_DOCUMENTS
            total += np.bincount(table.owners[counted], minlength=self.owners)
            found += np.bincount(table.owners[counted & (documents > 0)], minlength=self.owners)
        shares = np.full(self.owners, np.nan)
        np.divide(found, total, out=shares, where=total > 0)
        return shares


def _table(parts: list[tuple[Hashes, int]]) -> _Table:
    hashes = np.concatenate([part for part, _ in parts])
    owners = np.repeat(np.array([owner for _, owner in parts], np.int32), [len(part) for part, _ in parts])
    order = np.argsort(hashes, kind="stable")
    return _Table(hashes[order], owners[order], np.zeros(len(hashes), np.int64))


def _rows(table: Hashes, hashes: Hashes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """The first places of hashes in a sorted table, and whether they are there."""
    rows = np.searchsorted(table, hashes)
    return rows, table[np.minimum(rows, len(table) - 1)] == hashes


def _stretches(places: npt.NDArray[np.int64], gap: int) -> Iterator[tuple[int, int]]:
    """Bounds of the parts of sorted `places` in which neighbours differ by at most `gap`."""
    cuts = np.flatnonzero(np.diff(places) > gap) + 1
    yield from zip([0, *cuts.tolist()], [*cuts.tolist(), len(places)], strict=True)
