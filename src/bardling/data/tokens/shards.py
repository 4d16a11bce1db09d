"""Datasets of tokens on disk, read by position.

A dataset is a folder with `manifest.json`, `train-00000.bin` and so on, `val-00000.bin` and so on, and `tokenizer.json`. The
`.bin` files are bare little-endian integers of 16 bits if the vocabulary fits, else 32. The manifest lists every file with its
number of tokens and SHA-256 and contains a digest of itself, so opening a dataset names a part that is truncated, missing or
edited; `TokenDataset.verify` also reads every byte.

Each read opens the file, reads and closes it again. So threads and forked processes can share a split, descriptors do not
accumulate, and resident memory stays flat over 10,000 batches. A memory map that stays open is three times as fast, but all of
the dataset becomes resident; on one busy core, reading is 14 times as fast as a GPU that trains on 575,000 tokens per second
(`benchmarks/results/reading.md`). Every id is checked when it is read, so a bad one does not reach the device.
"""

import bisect
import hashlib
import itertools
import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bardling.data.tokens.journal import cut_back
from bardling.data.tokens.manifest import IndexFile, Manifest, ShardFile, SplitInfo, SplitName, read_manifest, token_dtype
from bardling.data.tokens.tokenizer import Tokenizer, load_tokenizer
from bardling.errors import UserError
from bardling.files.atomic import os_error_as_user_error, os_reason
from bardling.files.digests import file_sha256

SHARD_TOKENS = 100_000_000  # default maximum of tokens per file: 200 MB at 16 bits
MARKS = 4  # values of a token's mark
_SYNC_AHEAD = 32 << 20  # bytes written between two syncs
_CHECKED = 1 << 22  # tokens read at once where all are checked


class ShardWriter(AbstractContextManager["ShardWriter"]):
    """Writes one split into files of at most `shard_tokens` tokens; a context manager that closes its file.

    The files are `{split}-00000.bin` and so on in an existing folder. `vocab_size` limits the ids and sets the integer type.
    """

    def __init__(self, folder: Path, split: str, vocab_size: int, shard_tokens: int = SHARD_TOKENS) -> None:
        self._folder, self._split, self._vocab_size, self._shard_tokens = folder, split, vocab_size, shard_tokens
        self._dtype = np.dtype(token_dtype(vocab_size)).newbyteorder("<")
        self._files: list[ShardFile] = []
        self._open: Any = None
        self._digest = hashlib.sha256()  # of the open file
        self._thread = ThreadPoolExecutor(1, "sync")
        self._syncing: Future[None] | None = None
        self._unsynced = 0  # bytes
        self._tokens = self._documents = self._bytes = 0  # tokens: of the open file

    def add(self, ids: npt.NDArray[Any], *, documents: int = 1, text_bytes: int = 0) -> None:
        """Append tokens; a `ValueError` if an id is outside the vocabulary, because ids are never wrapped or clipped."""
        if ids.size and (int(ids.max()) >= self._vocab_size or int(ids.min()) < 0):
            bad = int(np.flatnonzero((ids >= self._vocab_size) | (ids < 0))[0])
            raise ValueError(f"token id {int(ids[bad])} is outside the vocabulary of {self._vocab_size}")
        self._documents += documents
        self._bytes += text_bytes
        while ids.size:
            if self._open is None:
                self._open = self._path().open("xb")
            part, ids = ids[: self._shard_tokens - self._tokens], ids[self._shard_tokens - self._tokens :]
            data = np.ascontiguousarray(part, self._dtype).data
            self._open.write(data)
            self._digest.update(data)
            self._tokens += part.size
            self._sync_ahead(data.nbytes)
            if self._tokens == self._shard_tokens:
                self._finish_file()

    def _sync_ahead(self, written: int) -> None:
        """Let the disk work while tokens are made, so that the sync at the end does not wait for all of them."""
        self._unsynced += written
        if self._unsynced >= _SYNC_AHEAD and (self._syncing is None or self._syncing.done()):
            self._wait_for_sync()
            self._open.flush()
            self._syncing, self._unsynced = self._thread.submit(os.fsync, self._open.fileno()), 0

    def _wait_for_sync(self) -> None:
        if self._syncing is not None:
            self._syncing.result()
            self._syncing = None

    def _path(self) -> Path:
        """The file being written."""
        return self._folder / f"{self._split}-{len(self._files):05d}.bin"

    def _finish_file(self) -> None:
        self.sync()
        self._open.close()
        path, size = self._path(), self._tokens * self._dtype.itemsize
        self._files.append(ShardFile(path.name, self._tokens, size, self._digest.hexdigest()))
        self._open, self._tokens, self._digest = None, 0, hashlib.sha256()

    def sync(self) -> dict[str, Any]:
        """Make everything written so far survive a power failure; return the state from which `restore` can continue."""
        self._wait_for_sync()
        if self._open is not None:
            self._open.flush()
            os.fsync(self._open.fileno())
        files = list(map(asdict, self._files))
        return {"files": files, "begun": self._tokens, "documents": self._documents, "bytes": self._bytes}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue, in a new writer for the same folder, from the point where `sync` returned `state`; see `cut_back`."""
        self._files = [ShardFile(**file) for file in state["files"]]
        self._documents, self._bytes, self._tokens = state["documents"], state["bytes"], state["begun"]
        sizes = {self._folder / file.name: file.size for file in self._files}
        if self._tokens:
            sizes[self._path()] = self._tokens * self._dtype.itemsize
        for path in self._folder.glob(f"{self._split}-*.bin"):
            if path not in sizes:
                path.unlink()  # created after the state was saved
        for path, size in sizes.items():
            cut_back(path, size)
        if self._tokens:
            with self._path().open("rb") as file:
                self._digest = hashlib.file_digest(file, "sha256")
            self._open = self._path().open("ab")

    def finish(self) -> SplitInfo:
        """Sync and close the last file and describe the split."""
        if self._open is not None:
            self._finish_file()
        return SplitInfo(sum(file.tokens for file in self._files), self._documents, self._bytes, tuple(self._files))

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()
        if self._open is not None:
            self._open.close()


class TokenSplit:
    """One split of a dataset; `len` is its number of tokens. It keeps no file open, so threads and processes can share it.

    Attributes:
        row: tokens of each packed row of conversations; 0 for text.
        marks: of conversations, a number for each token (`conversations.py`); None for text.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        files: tuple[ShardFile, ...],
        dtype: str,
        vocab_size: int,
        *,
        row: int = 0,
        marks: "TokenSplit | None" = None,
    ) -> None:
        self.name, self.vocab_size, self.row, self.marks = name, vocab_size, row, marks
        self._paths = [folder / file.name for file in files]
        self._offsets = [file.offset for file in files]
        self._bounds = list(itertools.accumulate((file.tokens for file in files), initial=0))  # file i: [i] to [i + 1]
        self._dtype = np.dtype(dtype).newbyteorder("<")

    def __len__(self) -> int:
        return self._bounds[-1]

    def place(self, position: int) -> tuple[str, int]:
        """The file that contains a token, and the token's position in it; a `ValueError` if it is not within the split."""
        if not 0 <= position < len(self):
            raise ValueError(f"token {position} is not within the split's {len(self)}")
        index = bisect.bisect_right(self._bounds, position) - 1
        return self._paths[index].name, position - self._bounds[index]

    def read(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """`count` tokens from `start` on, across files: int64 [count]; a `ValueError` if they are not within the split.

        A `UserError` names a file that is shorter than in the manifest, or the position of an id outside the vocabulary.
        """
        if start < 0 or count < 0 or start + count > len(self):
            raise ValueError(f"tokens {start} to {start + count} are not within the split's {len(self)}")
        out = np.empty(count, np.int64)
        done, index = 0, bisect.bisect_right(self._bounds, start) - 1
        while done < count:
            part = min(count - done, self._bounds[index + 1] - (start + done))
            out[done : done + part] = self._read_file(index, start + done - self._bounds[index], part)
            done, index = done + part, index + 1
        return out

    def _read_file(self, index: int, position: int, count: int) -> npt.NDArray[Any]:
        path, width = self._paths[index], self._dtype.itemsize
        with os_error_as_user_error(path, "read"), path.open("rb", buffering=0) as file:
            file.seek(self._offsets[index] + position * width)
            data = file.read(count * width) or b""
            while len(data) < count * width and (more := file.read(count * width - len(data))):
                data += more  # one call may return fewer bytes than requested, above 2 GB or on network file systems
        if len(data) < count * width:
            end = position + len(data) // width
            raise UserError(f"{path}: ends within token {end:,}: it is truncated; prepare the dataset again")
        ids = np.frombuffer(data, self._dtype)
        if ids.size and ids.max() >= self.vocab_size:
            bad = int(np.argmax(ids >= self.vocab_size))
            reason = "the file is damaged or was made with another tokenizer; prepare the dataset again"
            place = f"token {position + bad:,} is {ids[bad]}, outside the vocabulary of {self.vocab_size:,}"
            raise UserError(f"{path}: {place}: {reason}")
        return ids


class TokenDataset:
    """An open dataset folder, as returned by `open_dataset`."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self.vocab_size, self.fingerprint = manifest.vocab_size, manifest.fingerprint

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that made the tokens; None if the dataset has none."""
        if not self.manifest.tokenizer:
            return None
        tokenizer = load_tokenizer(self.path)
        if tokenizer.fingerprint != self.manifest.tokenizer:
            fault = f"has fingerprint {tokenizer.fingerprint}, but the tokens were made with {self.manifest.tokenizer}"
            raise UserError(f"{self.path / 'tokenizer.json'}: {fault}: restore that tokenizer, or prepare the dataset again")
        return tokenizer

    def limit_vocabulary(self, size: int) -> None:
        """Refuse ids of at least `size`, of which none may occur: for a model with fewer rows than the tokenizer has ids."""
        self.vocab_size = size
        for split in (self.split("train"), self.split("val")):
            for start in range(0, len(split), _CHECKED):
                split.read(start, min(_CHECKED, len(split) - start))

    def split(self, name: SplitName) -> TokenSplit:
        manifest, info = self.manifest, self.manifest.split(name)
        marks = TokenSplit(self.path, f"marks-{name}", info.marks, token_dtype(MARKS), MARKS) if manifest.row else None
        return TokenSplit(self.path, name, info.files, manifest.dtype, self.vocab_size, row=manifest.row, marks=marks)

    @property
    def title(self) -> str:
        """What the dataset is called in results."""
        return str(self.path)

    def splits(self, name: SplitName) -> list[tuple[str, TokenSplit]]:
        """The split of each source, with its name, which is empty if there is only one (`corpus.py`)."""
        return [("", self.split(name))]

    def verify(self) -> list[str]:
        """Read every byte and compare with the checksums; one line per problem."""
        train, val = self.manifest.train, self.manifest.val
        files: list[ShardFile | IndexFile] = []
        for split in (train, val):
            files += [*split.files, *split.index, *split.marks]
        problems = [fault for file in files if (fault := _file_fault(self.path / file.name, file))]
        try:
            _ = self.tokenizer  # loading it checks it
        except UserError as error:
            problems.append(str(error))
        return problems


def _file_fault(path: Path, file: ShardFile | IndexFile) -> str:
    """What is wrong with a file of the manifest, in one line, or nothing."""
    if path.exists() and not path.is_file():  # reading a pipe could block forever, and a device may never end
        return f"{path}: is not a file"
    try:
        if (size := path.stat().st_size) != file.size:
            return f"{path}: has {size:,} bytes instead of {file.size:,}"
        if file.sha256 and file_sha256(path) != file.sha256:
            return f"{path}: its checksum does not match the manifest"
    except OSError as error:
        return f"{path}: {os_reason(error).lower()}"
    return ""


def open_dataset(folder: Path | str) -> TokenDataset:
    """Open a dataset folder, checking its manifest and the presence and size of every file of tokens."""
    folder = Path(folder)
    manifest = read_manifest(folder / "manifest.json")
    for file in (file for split in (manifest.train, manifest.val) for file in (*split.files, *split.marks)):
        path = folder / file.name
        if not path.is_file():
            raise UserError(f"{path}: is missing, but {folder / 'manifest.json'} lists it: prepare the dataset again")
        if (size := path.stat().st_size) != file.size:
            fault = f"has {size:,} bytes instead of {file.size:,}: it was truncated or changed"
            raise UserError(f"{path}: {fault}; prepare the data again")
    return TokenDataset(folder, manifest)
