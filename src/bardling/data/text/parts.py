"""Divides a source into parts that different machines prepare: whole documents, in order, so that joined they are the whole.

A source with at least as many files as parts (also on the hub) is divided by files, at the multiples of its size, and each part
reads only its own. Any other source is divided by number of documents, for which each part reads all of it, tokenizing its own.

Limits: files are not divided, so parts of a few large files differ in size, and some may be empty.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from bardling.data.text import hub
from bardling.data.text.findings import Findings
from bardling.data.text.named_datasets import HubSource
from bardling.data.text.sources import Document, FileSource, Source
from bardling.errors import UserError

MOST = 100_000


@dataclass(frozen=True)
class Shard:
    """One part of a source: `number`, counted from 1, of `count`."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


def parse_shard(text: str) -> Shard:
    """The part that 'I/N' names; a `UserError` if there is none."""
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    number, count = map(int, found.groups()) if found else (0, 0)
    if not 1 <= number <= count <= MOST:
        remedy = "use I/N with I from 1 to N, such as 3/8 (in a Slurm array: --array=1-8)"
        raise UserError(f"--shard {text}: names no part: {remedy}")
    return Shard(number, count)


def part_of(source: Source, shard: Shard) -> Source:
    """A source with the documents of one part; its identity is its own. A part of files may have no documents."""
    if isinstance(source, FileSource) and len(source.files) >= shard.count:
        sizes = [file.stat().st_size if isinstance(file, Path) else file.size for file in source.files]
        first, last = _range(sizes, shard)
        unread = source.unread if shard.number == 1 else ()
        return replace(source, files=source.files[first:last], unread=unread, findings=Findings(), is_part=True)
    if isinstance(source, HubSource):
        listing = hub.listing(source.repository, source.config, source.split)
        if len(listing.files) >= shard.count:
            first, last = _range([file.size for file in listing.files], shard)
            return replace(source, first=first, last=last, findings=Findings())
    return _Documents(source, shard)


def _range(sizes: Sequence[int], shard: Shard) -> tuple[int, int]:
    """First and last + 1 of the files that begin within the part's share of all bytes."""
    total, begin, first, last = max(1, sum(sizes)), 0, 0, 0
    for size in sizes:
        part = begin * shard.count // total + 1
        first += part < shard.number
        last += part <= shard.number
        begin += size
    return first, len(sizes) if shard.number == shard.count else last


class _Documents:
    """The part of any source, by number of documents."""

    def __init__(self, source: Source, shard: Shard) -> None:
        self._source, self._shard = source, shard
        self.name = source.name
        self.findings: Findings = getattr(source, "findings", Findings())

    @cached_property
    def _bounds(self) -> tuple[int, int]:
        total = sum(1 for _ in self._source.documents())
        number, count = self._shard.number, self._shard.count
        return total * (number - 1) // count, total if number == count else total * number // count

    def documents(self) -> Iterator[Document]:
        first, last = self._bounds
        if first == last:
            self.findings.clear()
            return
        documents = self._source.documents()
        for number, document in enumerate(documents):
            if number >= first:
                yield document
            if number + 1 == first:
                self.findings.clear()  # what comes between two parts belongs to the later one
            if number + 1 == last and self._shard.number < self._shard.count:
                return

    def identity(self) -> str:
        return f"{self._source.identity()} {self._shard}"

    def size(self) -> int:
        return self._source.size() // self._shard.count
