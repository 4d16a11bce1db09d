"""Journal of a preparation, so that an interrupted one resumes instead of starting over.

The work folder is `.NAME.partial` beside the dataset that is being made. Every few seconds the token files in it are synced and
the journal is replaced atomically; it records how many documents are done and how long each file was at that point. On
resuming, anything written later is cut off and half-replaced files are removed, so the result is the same to the byte wherever
the interruption happened.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bardling.data.tokens.manifest import SplitName
from bardling.errors import UserError
from bardling.files.atomic import check_place, remove_partial_files, sync_folder, write_atomically
from bardling.files.lock import locked

JOURNAL = "journal.json"
EVERY = 10.0  # seconds between two entries: the most work that an interruption loses


@dataclass(frozen=True)
class Position:
    """Progress of a preparation."""

    made_of: str  # digest of everything that determines the result
    documents: int  # number of finished documents
    last: str  # name of the last of them
    characters: int  # total characters in them
    splits: Mapping[SplitName, dict[str, Any]]  # as returned by `ShardWriter.sync` and `DocumentWriter.sync`
    names: Mapping[str, int] = field(default_factory=dict)  # how often each control token was written in the text
    only_library: bool = False  # because a faster encoder gave other ids


class Journal:
    def __init__(self, folder: Path) -> None:
        self._path = folder / JOURNAL
        self._written = time.monotonic()

    @property
    def kept(self) -> bool:
        """Whether there is an entry to resume from."""
        return self._path.is_file()

    def read(self, made_of: str) -> Position | None:
        """The position of an earlier attempt with the same digest; None if there is none."""
        if not self.kept:
            return None
        try:
            position = Position(**json.loads(self._path.read_bytes()))
        except (ValueError, TypeError, RecursionError):  # damaged, or of another version: start over
            return None
        return position if position.made_of == made_of else None

    @property
    def due(self) -> bool:
        return time.monotonic() - self._written >= EVERY

    def write(self, position: Position) -> None:
        """Replace the entry; sync the files that it describes first."""
        write_atomically(self._path, json.dumps(asdict(position)).encode())
        self._written = time.monotonic()


def cut_back(path: Path, size: int) -> None:
    """Cut off what a writer added to a file after the last entry; a `UserError` if the file is shorter than it was then."""
    if not path.is_file() or path.stat().st_size < size:
        raise UserError(f"{path}: is missing or truncated: remove the folder {path.parent} to start over")
    os.truncate(path, size)


def work_folder(out: Path) -> Path:
    """The folder in which the dataset `out` is prepared before it is renamed."""
    return out.with_name(f".{out.name}.partial")


def refuse_existing(out: Path) -> None:
    """Raise a `UserError` if there is something at `out`, where a dataset is to be created, or if it cannot be."""
    check_place(out)
    if out.exists() or out.is_symlink():
        raise UserError(f"{out}: already exists: choose another folder, or remove it first")


@contextmanager
def working_on(out: Path) -> Iterator[Path]:
    """Lock the work folder of `out`, waiting for other processes; a `UserError` if `out` exists, perhaps made by one."""
    work = work_folder(out)
    told = os.environ.get("LOCAL_RANK", "0") == "0"  # of several processes that wait, one tells it
    waiting = f"{out}: another process is preparing this dataset: waiting for it" if told else ""
    with locked(work / "lock", folder_moves=True, waiting=waiting):
        if out.exists() or out.is_symlink():
            (work / "lock").unlink(missing_ok=True)
            with suppress(OSError):  # it holds an earlier attempt
                work.rmdir()
            refuse_existing(out)
        remove_partial_files(work)
        yield work


@contextmanager
def becoming(out: Path, work: Path) -> Iterator[None]:
    """Give the work folder its name `out` in the end; if its contents cannot be completed and it has no journal, remove it."""
    try:
        yield
        sync_folder(work)
        work.rename(out)  # fails if another program has created a folder with files there in the meantime
    except BaseException:
        if not Journal(work).kept and work.exists():
            empty(work)
            (work / "lock").unlink(missing_ok=True)  # last, because another process may start from here on
            with suppress(OSError):
                work.rmdir()
        raise
    sync_folder(out.parent)
    (out / JOURNAL).unlink(missing_ok=True)  # not earlier: until the folder has its name, a kill must not lose the tokens
    (out / "lock").unlink(missing_ok=True)  # held until here, so that a waiting process finds the dataset


def empty(work: Path) -> None:
    """Remove everything except the lock from a work folder."""
    for path in work.iterdir():
        if path.name != "lock":
            path.unlink(missing_ok=True)
