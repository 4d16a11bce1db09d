"""Copies among documents: equal texts by a hash, and similar ones by MinHash (Broder 1997) over runs of five words.

Similarity is the Jaccard index of the sets of five-word runs: what two documents have in common, divided by what they have
together. MinHash estimates it from 128 hashes per document (computed by `rensa`; standard error 0.035 at 0.8). Documents that
agree in one of 16 bands of 8 hashes are candidates, and each candidate pair is then compared by all 128. Documents that are
linked by such pairs form a group.

Limits: 400 bytes of memory per document; only the first `MOST_DOCUMENTS` are compared for similarity, and a pair at exactly the
threshold of 0.8 is a candidate with a probability of 95% (0.9: 99.99%). Documents without words have no similarity.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bardling.data.text.words import Hashes, ngrams
from bardling.errors import UserError

SHINGLE = 5  # words
THRESHOLD = 0.8
MOST_DOCUMENTS = 1_000_000
EXTRA = "pip install 'bardling[check]'"
_PERMUTATIONS, _BANDS = 128, 16
_BATCH = 1 << 21  # word runs
_SEED = 1
_NOTHING = 0xFFFFFFFF  # hash of a document without words


class Group(NamedTuple):
    """Documents that are copies of one another, by their numbers."""

    members: tuple[int, ...]  # in order
    twins: tuple[int, ...]  # for each, the first member with the same text; without one before it, the first of all


class Duplicates:
    """Collects documents, numbered in the order in which they are added; `groups` then finds the copies."""

    def __init__(self) -> None:
        try:
            from rensa import RMinHash
        except ImportError:
            raise UserError(f"finding near-duplicates needs the package rensa: {EXTRA}") from None
        self._digests = RMinHash.digest_matrix_from_flat_token_hashes
        self._texts: list[bytes] = []
        self._hash = hashlib.blake2b(digest_size=16)
        self._tail: Hashes = np.zeros(0, np.uint64)  # last words of the document so far
        self._waiting: list[Hashes] = []
        self._owners: list[int] = []  # numbers of the documents that these belong to
        self._open = np.zeros((0, _PERMUTATIONS), np.uint64)  # of the parts of the last document that are signed
        self._size = 0
        self._signatures: list[npt.NDArray[np.uint16]] = []
        self._all = np.zeros((0, _PERMUTATIONS), np.uint16)  # the same in one piece, after `groups`
        self._bands: list[npt.NDArray[np.uint64]] = []

    @property
    def count(self) -> int:
        return len(self._texts)

    def add(self, text: str, words: Hashes) -> None:
        """Add a document: its text, and the hashes of its words."""
        self._texts.append(b"")
        self._hash = hashlib.blake2b(digest_size=16)
        self._tail = self._tail[:0]
        self.extend(text, words)

    def extend(self, text: str, words: Hashes) -> None:
        """Add a part to the last document."""
        self._hash.update(text.encode("utf-8", "surrogatepass"))
        self._texts[-1] = self._hash.digest()
        if self.count <= MOST_DOCUMENTS:
            joined = np.concatenate([self._tail, words])
            self._waiting.append(ngrams(joined, SHINGLE) if len(words) else words)
            self._owners.append(self.count - 1)
            self._tail, self._size = joined[1 - SHINGLE :], self._size + len(words)
            if self._size >= _BATCH:
                self._sign(1)

    def _sign(self, kept: int) -> None:
        """Sign what waits, except the last document if `kept` is 1: more of it may follow."""
        if not self._owners:
            return
        ends = np.cumsum([0, *map(len, self._waiting)]).astype(np.uint64)
        rows = self._digests(np.concatenate([self._tail[:0], *self._waiting]), ends, _PERMUTATIONS, _SEED).to_rows()
        parts = np.concatenate([self._open, np.array(rows, np.uint64).reshape(-1, _PERMUTATIONS)])
        owners, first = np.unique(self._owners, return_index=True)
        full = np.minimum.reduceat(parts, first)  # [documents, permutations]
        self._open, self._owners = full[len(full) - kept :], self._owners[-1:] * kept
        full, owners = full[: len(full) - kept], owners[: len(full) - kept]
        self._waiting, self._size = [], 0
        with np.errstate(over="ignore"):
            bands = full.reshape(len(full), _BANDS, _PERMUTATIONS // _BANDS)
            total = np.zeros(bands.shape[:2], np.uint64)
            for place in range(bands.shape[2]):
                total = total * np.uint64(0x9E3779B97F4A7C15) + bands[:, :, place] + np.uint64(1)
        empty = (full == _NOTHING).all(1)
        total[empty] = owners[empty, None]  # without words, like no other
        self._bands.append(total)
        self._signatures.append(full.astype(np.uint16))

    def groups(self) -> list[Group]:
        """The groups of copies, in the order of their first members."""
        self._sign(0)
        if self._signatures:
            self._all = np.concatenate(self._signatures)
            self._signatures = [self._all]
        parent = list(range(self.count))

        def root(number: int) -> int:
            while parent[number] != number:
                parent[number] = parent[parent[number]]
                number = parent[number]
            return number

        first: dict[bytes, int] = {}
        for number, digest in enumerate(self._texts):
            parent[number] = first.setdefault(digest, number)
        same = list(parent)
        for one, other in self._candidates():
            a, b = root(one), root(other)
            if a != b and _similarity(self._all, one, other) >= THRESHOLD:
                parent[max(a, b)] = min(a, b)
        members: dict[int, list[int]] = {}
        for number in range(self.count):
            if (head := root(number)) != number:
                members.setdefault(head, [head]).append(number)
        return [
            Group(tuple(found), tuple(head if same[one] == one else same[one] for one in found))
            for head, found in sorted(members.items())
        ]

    def _candidates(self) -> Sequence[tuple[int, int]]:
        """Pairs that agree in a band: each document with the first of its bucket, and with the one before it."""
        if not self._bands:
            return []
        bands, pairs = np.concatenate(self._bands), set[tuple[int, int]]()
        for column in bands.T:
            order = np.argsort(column, kind="stable")
            agree = column[order[1:]] == column[order[:-1]]
            head = 0
            for place in np.flatnonzero(agree).tolist():
                if place == 0 or not agree[place - 1]:
                    head = int(order[place])
                pairs |= {(head, int(order[place + 1])), (int(order[place]), int(order[place + 1]))}
        return sorted(pairs)

    def compare(self, one: int, other: int) -> tuple[float, bool]:
        """The estimated similarity of two documents, after `groups`, and whether their texts are equal."""
        if self._texts[one] == self._texts[other]:
            return 1.0, True
        return (_similarity(self._all, one, other) if max(one, other) < len(self._all) else 0.0), False


def _similarity(signatures: npt.NDArray[np.uint16], one: int, other: int) -> float:
    return float((signatures[one] == signatures[other]).mean())
