"""Document index: maps positions in the tokens to the documents that they came from.

`documents-train.bin` has two little-endian uint64 for each document of a split, in order: the position of its first token, and
the byte offset of its name in `documents-train.jsonl`, which has one JSON string per line. A lookup is a binary search that
reads a few pages. The manifest lists both files with their checksums. Training does not need them, so a dataset without them
(prepared earlier, or by another trainer) still opens; its documents are found by the end-of-text token, which gives their
bounds but no names or numbers.

Limits: without an index, a document is followed for at most `_REACH` tokens before and after the range in question.
"""

import bisect
import itertools
import json
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bardling.data.tokens.journal import cut_back
from bardling.data.tokens.manifest import IndexFile, SplitName
from bardling.data.tokens.shards import TokenDataset
from bardling.data.tokens.tokenizer import Tokenizer
from bardling.errors import UserError
from bardling.files.atomic import os_error_as_user_error
from bardling.files.digests import file_sha256

_REACH = 1 << 20  # tokens
_ROW_BYTES = 16
_MAX_NAME_BYTES = 1 << 16


@dataclass(frozen=True)
class Document:
    """The position of a document in a split."""

    begin: int  # position of its first token
    end: int  # position after its last token, which is the end-of-text token
    number: int | None = None  # counted from 0; None without an index
    name: str = ""  # in the source; empty without an index

    def __str__(self) -> str:
        place = f"tokens {self.begin:,} to {self.end - 1:,}"
        return f"the document at {place}" if self.number is None else f"{self.name!r} (document {self.number:,}, {place})"


class DocumentWriter(AbstractContextManager["DocumentWriter"]):
    """Writes the index of one split; a context manager that closes its files."""

    def __init__(self, folder: Path, split: SplitName) -> None:
        self._paths = [folder / f"documents-{split}.bin", folder / f"documents-{split}.jsonl"]
        self._files = [path.open("ab") for path in self._paths]  # a split without documents has an index too
        self._tokens = 0

    def add(self, lengths: npt.NDArray[np.int64], names: Sequence[str]) -> None:
        """Append documents with these names and numbers of tokens, [documents] both."""
        lines = [json.dumps(name).encode() + b"\n" for name in names]
        rows = np.zeros((len(lines), 2), "<u8")
        rows[:, 0] = self._tokens + np.cumsum(lengths) - lengths
        sizes = np.array([len(line) for line in lines], np.int64)
        rows[:, 1] = self._files[1].tell() + np.cumsum(sizes) - sizes
        self._files[0].write(rows.tobytes())
        self._files[1].write(b"".join(lines))
        self._tokens += int(lengths.sum())

    def sync(self) -> dict[str, Any]:
        """See `ShardWriter.sync`."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        return {"tokens": self._tokens, "sizes": [file.tell() for file in self._files]}

    def restore(self, state: dict[str, Any]) -> None:
        """See `ShardWriter.restore`."""
        self._tokens = state["tokens"]
        for path, file, size in zip(self._paths, self._files, state["sizes"], strict=True):
            cut_back(path, size)
            file.seek(size)

    def finish(self) -> tuple[IndexFile, ...]:
        sizes = self.sync()["sizes"]
        return tuple(IndexFile(path.name, size, file_sha256(path)) for path, size in zip(self._paths, sizes, strict=True))

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()


class Documents:
    """The documents of one split of a dataset; `named` is whether there is an index, and so names and numbers."""

    def __init__(self, dataset: TokenDataset, split: SplitName) -> None:
        self._split = dataset.split(split)
        self._eot = dataset.tokenizer and dataset.tokenizer.eot_id
        index = dataset.manifest.split(split).index
        self._paths = [dataset.path / file.name for file in index]
        self._sizes = [file.size for file in index]
        self.named = bool(self._paths) and all(path.is_file() for path in self._paths)

    def at(self, start: int, count: int) -> list[Document]:
        """The documents of the `count` tokens from `start` on; a `UserError` names an index file that is damaged."""
        return self._indexed(start, start + count) if self.named else self._scanned(start, start + count)

    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each document, [documents]; empty without an index."""
        if not self.named or not self._sizes[0]:
            return np.zeros(0, np.int64)
        begins = self._rows()[:, 0].astype(np.int64)
        return np.append(begins[1:], len(self._split)) - begins

    def _rows(self) -> npt.NDArray[np.uint64]:
        """The index: position, and offset of the name, of each document, [documents, 2]."""
        path, size = self._paths[0], self._sizes[0]
        with os_error_as_user_error(path, "read"):
            if path.stat().st_size != size or size % _ROW_BYTES:
                raise UserError(f"{path}: is truncated or was changed, so documents have no names: prepare the dataset again")
            return np.memmap(path, "<u8", "r", shape=(size // _ROW_BYTES, 2)) if size else np.zeros((0, 2), np.uint64)

    def _indexed(self, start: int, stop: int) -> list[Document]:
        path, rows = self._paths[0], self._rows()
        if not len(rows):
            return []
        begins = rows[:, 0]
        first, last = bisect.bisect_right(begins, start) - 1, bisect.bisect_left(begins, stop)
        bounds = [int(begins[number]) if number < len(rows) else len(self._split) for number in range(first, last + 1)]
        if first < 0 or any(start > end for start, end in itertools.pairwise(bounds)):
            raise UserError(f"{path}: is damaged, because its documents are out of order: prepare the dataset again")
        pairs = enumerate(itertools.pairwise(bounds), first)
        return [Document(*pair, number, self._name(int(rows[number, 1]))) for number, pair in pairs]

    def _name(self, offset: int) -> str:
        path = self._paths[1]
        with os_error_as_user_error(path, "read"), path.open("rb") as file:
            file.seek(min(offset, self._sizes[1]))
            line = file.readline(_MAX_NAME_BYTES)
        try:
            name = json.loads(line)
        except (ValueError, RecursionError):
            name = None
        if not isinstance(name, str):
            raise UserError(f"{path}: is damaged, because there is no name at byte {offset:,}: prepare the dataset again")
        return name

    def _scanned(self, start: int, stop: int) -> list[Document]:
        """Documents by the end-of-text tokens in and around a range; the whole split if the tokenizer has no such token."""
        if self._eot is None:
            return [Document(0, len(self._split))]
        for reach in (4096, _REACH):
            low, high = max(0, start - reach), min(len(self._split), stop + reach)
            ends = (np.flatnonzero(self._split.read(low, high - low) == self._eot) + low).tolist()
            if ends and ends[0] < start and ends[-1] >= stop - 1:
                break  # with bounds on both sides of the range, `low` and `high` do not matter
        bounds = [low, *(end + 1 for end in ends), high]
        return [Document(a, b) for a, b in itertools.pairwise(bounds) if a < b and a < stop and b > start]


def begins_documents(dataset: TokenDataset, tokenizer: Tokenizer) -> int | None:
    """The token before the text of each document: the one that the tokenizer puts there, or else the end-of-text token.

    Datasets of versions that left out the former are recognized by their first token.
    """
    first = [split.read(0, 1)[0] for split in (dataset.split("train"), dataset.split("val")) if len(split)][:1]
    return next((token for token in tokenizer.interface.start[:1] if token in first), tokenizer.eot_id)
