"""From a place in the tokens to the document that it came from.

`documents-train.bin` has two little-endian uint64 for each document of a split, in order: the first of its tokens, and where
its name begins in `documents-train.jsonl`, which holds one name a line as a JSON string. A lookup is a binary search that reads
a few pages. The files are named in the manifest with their checksums; training does without them, so a dataset that has none
(made earlier, or by another trainer) still opens. Its documents are then told apart by the end-of-text token: their
bounds are known, but neither name nor number.

Limits: without an index, a document that reaches further than `_REACH` tokens from the window is not followed to its ends.
"""

import bisect
import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from bardling.data.manifest import IndexFile, SplitName
from bardling.data.shards import TokenDataset
from bardling.errors import UserError
from bardling.files import told_plainly

_REACH = 1 << 20  # tokens
_WIDTH = 16  # bytes for a document
_LONGEST_NAME = 1 << 16  # bytes


@dataclass(frozen=True)
class Document:
    """A document's place in a split."""

    begin: int
    """Its first token."""
    end: int
    """After its last one; the end-of-text token counts as its own."""
    number: int | None = None
    """Counted from 0; unknown without an index."""
    name: str = ""
    """What its source called it; empty when unknown."""

    def __str__(self) -> str:
        place = f"tokens {self.begin:,} to {self.end - 1:,}"
        return f"the document of {place}" if self.number is None else f"{self.name!r} (document {self.number:,}, {place})"


class DocumentWriter:
    """Writes the index of one split; as a context manager, leaves no open file behind."""

    def __init__(self, folder: Path, split: SplitName) -> None:
        self._paths = [folder / f"documents-{split}.bin", folder / f"documents-{split}.jsonl"]
        self._files: list[Any] = []
        self._tokens = 0
        self._sizes = [0, 0]

    def add(self, lengths: npt.NDArray[np.int64], names: Sequence[str]) -> None:
        """Append documents.

        Args:
            lengths: [documents] their tokens.
            names: as many.
        """
        lines = [json.dumps(name).encode() + b"\n" for name in names]
        rows = np.zeros((len(lines), 2), "<u8")
        rows[:, 0] = self._tokens + np.cumsum(lengths) - lengths
        sizes = np.array([len(line) for line in lines], np.int64)
        rows[:, 1] = self._sizes[1] + np.cumsum(sizes) - sizes
        self._open()
        for number, data in enumerate((rows.tobytes(), b"".join(lines))):
            self._files[number].write(data)
            self._sizes[number] += len(data)
        self._tokens += int(lengths.sum())

    def _open(self) -> None:
        if not self._files:
            self._files = [path.open("ab") for path in self._paths]

    def sync(self) -> dict[str, Any]:
        """As `ShardWriter.sync`."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        return {"tokens": self._tokens, "sizes": list(self._sizes)}

    def restore(self, state: dict[str, Any]) -> None:
        """As `ShardWriter.restore`."""
        self._tokens, self._sizes = state["tokens"], list(state["sizes"])
        for path, size in zip(self._paths, self._sizes, strict=True):
            if size and (not path.is_file() or path.stat().st_size < size):
                raise UserError(f"{path}: is missing or was cut: remove the folder {path.parent}, and it is made anew")
            if path.exists():
                os.truncate(path, size)

    def finish(self) -> tuple[IndexFile, IndexFile]:
        """Close and sync the files; say what was written."""
        self._open()  # also of a split without documents there is an index
        self.sync()
        self._close()
        found = []
        for path, size in zip(self._paths, self._sizes, strict=True):
            with path.open("rb") as file:
                found.append(IndexFile(path.name, size, hashlib.file_digest(file, "sha256").hexdigest()))
        return found[0], found[1]

    def _close(self) -> None:
        for file in self._files:
            file.close()
        self._files = []

    def __enter__(self) -> "DocumentWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close()


class Documents:
    """The documents of one split of a dataset.

    Attributes:
        named: whether there is an index; otherwise documents have neither name nor number.
    """

    def __init__(self, dataset: TokenDataset, split: SplitName) -> None:
        self._split = dataset.split(split)
        tokenizer = dataset.tokenizer
        self._eot = None if tokenizer is None else tokenizer.eot_id
        info = dataset.manifest.train if split == "train" else dataset.manifest.val
        self._paths = [dataset.path / file.name for file in info.index]
        self._sizes = [file.size for file in info.index]
        self.named = bool(self._paths) and all(path.is_file() for path in self._paths)

    def at(self, start: int, count: int) -> list[Document]:
        """The documents that have some of the `count` tokens from `start` on, in order.

        Raises:
            UserError: naming the file, if the index was cut or changed.
        """
        if count < 1:
            return []
        return self._indexed(start, start + count) if self.named else self._scanned(start, start + count)

    def _indexed(self, start: int, stop: int) -> list[Document]:
        path, size = self._paths[0], self._sizes[0]
        with told_plainly(path, "read"):
            if path.stat().st_size != size or size % _WIDTH:
                raise UserError(f"{path}: was cut or changed, so documents cannot be named: prepare the dataset again")
            if not size:
                return []
            rows = np.memmap(path, "<u8", "r", shape=(size // _WIDTH, 2))

        def begin(number: int) -> int:
            return int(rows[number, 0])

        every = range(len(rows))
        first = bisect.bisect_right(every, start, key=begin) - 1
        last = bisect.bisect_left(every, stop, key=begin)
        if first < 0 or any(begin(n) > begin(n + 1) for n in range(first, min(last, len(rows) - 1))):
            raise UserError(f"{path}: its documents are not in order, so it is damaged: prepare the dataset again")
        return [
            Document(
                begin(number),
                begin(number + 1) if number + 1 < len(rows) else len(self._split),
                number,
                self._name(int(rows[number, 1])),
            )
            for number in range(first, last)
        ]

    def _name(self, place: int) -> str:
        path = self._paths[1]
        with told_plainly(path, "read"), path.open("rb") as file:
            file.seek(min(place, self._sizes[1]))
            line = file.readline(_LONGEST_NAME)
        try:
            name = json.loads(line)
        except (ValueError, RecursionError):
            name = None
        if not isinstance(name, str):
            raise UserError(f"{path}: holds no name at byte {place:,}, so it is damaged: prepare the dataset again")
        return name

    def _scanned(self, start: int, stop: int) -> list[Document]:
        """By the end-of-text tokens around and within; the whole split where there are none."""
        if self._eot is None:
            return [Document(0, len(self._split))]
        low, high = max(0, start - _REACH), min(len(self._split), stop + _REACH)
        ends = self._ends(max(0, start - 4096), min(len(self._split), stop + 4096))
        if not ends or ends[0] >= start or ends[-1] < stop - 1:
            ends = self._ends(low, high)
        # A search that was narrow enough for the window has found bounds on both sides of it, so `low` and `high` play no part.
        bounds = [low, *(end + 1 for end in ends), high]
        return [Document(a, b) for a, b in itertools.pairwise(bounds) if a < b and a < stop and b > start]

    def _ends(self, low: int, high: int) -> list[int]:
        """Places of end-of-text tokens."""
        found: list[int] = (np.flatnonzero(self._split.read(low, high - low) == self._eot) + low).tolist()
        return found
