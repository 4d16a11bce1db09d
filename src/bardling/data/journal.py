"""What has been tokenised so far, so that an interrupted preparation goes on instead of starting again.

The work folder lies beside the dataset to be (`.NAME.partial`). From time to time the token files in it are synced and the
journal is replaced as a whole; it says up to which document, and how long each file was then. When the work is taken up, what
was written after that is cut off and what was just being replaced is removed, so the result is the same to the byte wherever
the interruption fell.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bardling.errors import UserError
from bardling.files import remove_unfinished, told_plainly, write_whole
from bardling.lock import locked

EVERY = 10.0
"""Seconds between two entries: what an interruption costs at most, and all that a shorter preparation ever loses."""
_NAME = "journal.json"


@dataclass(frozen=True)
class Position:
    """How far the work has come.

    Attributes:
        made_of: digest of all that decides the result.
        documents: documents that are done.
        last: name of the last of them.
        characters: their characters.
        splits: state of the writer of each split, as `ShardWriter.sync` gives it.
    """

    made_of: str
    documents: int
    last: str
    characters: int
    splits: Mapping[str, dict[str, Any]]


class Journal:
    """The journal in a work folder.

    Attributes:
        kept: whether there is an entry, so that the folder is worth keeping.
    """

    def __init__(self, folder: Path, every: float | None = None) -> None:
        self._path = folder / _NAME
        self._every = EVERY if every is None else every
        self._written = time.monotonic()
        self.kept = self._path.is_file()

    def read(self, made_of: str) -> Position | None:
        """The position of an earlier attempt at the same thing; None if there is none."""
        if not self.kept:
            return None
        with told_plainly(self._path, "read"):
            data = self._path.read_bytes()
        try:
            position = Position(**json.loads(data))
        except (ValueError, TypeError, RecursionError):  # another version's, or damaged: the work is done anew
            return None
        return position if position.made_of == made_of else None

    @property
    def due(self) -> bool:
        """Whether it is time for an entry."""
        return time.monotonic() - self._written >= self._every

    def write(self, position: Position) -> None:
        """Replace the entry; the files that it speaks of must have been synced."""
        write_whole(self._path, json.dumps(asdict(position)).encode())
        self._written, self.kept = time.monotonic(), True

    def remove(self) -> None:
        """Drop it: the work is done, or begins anew."""
        with told_plainly(self._path, "remove"):
            self._path.unlink(missing_ok=True)
        self.kept = False


def digest(*parts: object) -> str:
    """Digest of what decides a result."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def work_folder(out: Path) -> Path:
    """Where the dataset `out` is made."""
    return out.with_name(f".{out.name}.partial")


@contextmanager
def working_on(out: Path) -> Iterator[Path]:
    """The work folder of `out`, for this process alone; another one that makes the same waits.

    Raises:
        UserError: if `out` exists, perhaps because the other process has made it.
    """
    work = work_folder(out)
    with locked(work / "lock"):
        if out.exists() or out.is_symlink():
            for path in (work / "lock", work):  # the folder was made only to hold the lock
                path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
            raise UserError(f"{out}: exists already: choose another folder, or remove it first")
        remove_unfinished(work)
        yield work
