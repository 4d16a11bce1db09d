"""Datasets of tokens on disk, read by position.

A dataset is a folder: `manifest.json`, `train-00000.bin` and so on, `val-00000.bin` and so on, `tokenizer.json`. The `.bin`
files are bare little-endian integers, 16 bits wide when the vocabulary fits and 32 otherwise. The manifest names every file
with its tokens and SHA-256, and carries a digest of itself, so that a cut, missing or edited part is noticed on opening, by
name; `TokenDataset.verify` also reads every byte.

Reading opens the file, reads at the position and closes it again: 5 microseconds for a window of 1,024 tokens, against 3 for a
memory map that stays open and 26 for one opened each time. That keeps no state, so threads and forked processes may share a
split, no descriptors pile up, and memory does not grow as the pages of a kept map would. Every id that is read is checked
against the vocabulary, so that a bad one is named here and not by a failing kernel on the device.
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from bardling.data.manifest import IndexFile, Manifest, ShardFile, SplitInfo, SplitName, read_manifest, token_dtype
from bardling.data.tokenizer import Tokenizer, load_tokenizer
from bardling.errors import UserError
from bardling.files import told_plainly

SHARD_TOKENS = 100_000_000
"""Tokens in one file at most, unless told otherwise: 200 MB at 16 bits."""


class ShardWriter:
    """Writes the files of one split into a folder; as a context manager, leaves no open file behind.

    Args:
        folder: an existing folder; the files are named `{split}-00000.bin` and so on.
        split: 'train' or 'val'.
        vocab_size: ids must be below it; it decides the width.
        shard_tokens: tokens in one file at most.
    """

    def __init__(self, folder: Path, split: SplitName, vocab_size: int, shard_tokens: int = SHARD_TOKENS) -> None:
        self._folder, self._split, self._vocab_size, self._shard_tokens = folder, split, vocab_size, shard_tokens
        self.dtype = token_dtype(vocab_size)
        self._dtype = np.dtype(self.dtype).newbyteorder("<")
        self._files: list[ShardFile] = []
        self._open: Any = None
        self._tokens = 0
        self._documents = 0
        self._bytes = 0

    def add(self, ids: npt.NDArray[Any], *, documents: int = 1, text_bytes: int = 0) -> None:
        """Append tokens.

        Raises:
            ValueError: if an id is outside the vocabulary; nothing is wrapped or clipped.
        """
        if ids.size and (int(ids.max()) >= self._vocab_size or int(ids.min()) < 0):
            bad = int(np.flatnonzero((ids >= self._vocab_size) | (ids < 0))[0])
            raise ValueError(f"token id {int(ids[bad])} is outside the vocabulary of {self._vocab_size}")
        self._documents += documents
        self._bytes += text_bytes
        while ids.size:
            if self._open is None:
                self._path = self._folder / f"{self._split}-{len(self._files):05d}.bin"
                self._open = self._path.open("xb")
                self._hash, self._tokens = hashlib.sha256(), 0
            part, ids = ids[: self._shard_tokens - self._tokens], ids[self._shard_tokens - self._tokens :]
            data = part.astype(self._dtype).tobytes()
            self._open.write(data)
            self._hash.update(data)
            self._tokens += part.size
            if self._tokens == self._shard_tokens:
                self._end_file()

    def _end_file(self) -> None:
        self._open.flush()
        os.fsync(self._open.fileno())
        self._open.close()
        self._open = None
        size = self._tokens * self._dtype.itemsize
        self._files.append(ShardFile(self._path.name, self._tokens, size, self._hash.hexdigest()))

    def sync(self) -> dict[str, Any]:
        """Make what was written so far survive a power cut; return what `restore` needs to go on from here."""
        if self._open is not None:
            self._open.flush()
            os.fsync(self._open.fileno())
        begun = self._tokens if self._open is not None else 0
        return {"files": list(map(asdict, self._files)), "begun": begun, "documents": self._documents, "bytes": self._bytes}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on, in a new writer for the same folder, where another one was when `sync` gave `state`.

        Raises:
            UserError: if the files are shorter than they were then.
        """
        self._files = [ShardFile(**file) for file in state["files"]]
        self._documents, self._bytes = state["documents"], state["bytes"]
        wanted = [(file.name, file.size) for file in self._files]
        if state["begun"]:
            wanted.append((f"{self._split}-{len(self._files):05d}.bin", state["begun"] * self._dtype.itemsize))
        for path in self._folder.glob(f"{self._split}-*.bin"):
            if path.name not in dict(wanted):
                path.unlink()  # begun later than the state
        for name, size in wanted:
            path = self._folder / name
            if not path.is_file() or path.stat().st_size < size:
                raise UserError(f"{path}: is missing or was cut: remove the folder {self._folder}, and it is made anew")
        for name, size in wanted[-1:]:
            os.truncate(self._folder / name, size)
        if state["begun"]:
            self._path, self._tokens = self._folder / wanted[-1][0], state["begun"]
            with self._path.open("rb") as file:
                self._hash = hashlib.sha256(file.read())
            self._open = self._path.open("ab")

    def finish(self) -> SplitInfo:
        """Close and sync the last file; say what was written."""
        if self._open is not None:
            self._end_file()
        tokens = sum(file.tokens for file in self._files)
        return SplitInfo(tokens, self._documents, self._bytes, tuple(self._files))

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None


class TokenSplit:
    """One split of a dataset; its length is its tokens. Holds no open file, so threads and processes may share it."""

    def __init__(
        self, folder: Path, name: str, files: tuple[ShardFile, ...], dtype: Literal["uint16", "uint32"], vocab_size: int
    ) -> None:
        self.name, self.vocab_size = name, vocab_size
        self._paths = [folder / file.name for file in files]
        self._offsets = [file.offset for file in files]
        self._ends = np.cumsum([file.tokens for file in files], dtype=np.int64)
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._length = int(self._ends[-1]) if files else 0

    def __len__(self) -> int:
        return self._length

    def place(self, position: int) -> tuple[str, int]:
        """The file that holds a token, and the token's place in it.

        Raises:
            ValueError: if the position is not within the split.
        """
        if not 0 <= position < self._length:
            raise ValueError(f"token {position} is not within the split's {self._length}")
        which = int(np.searchsorted(self._ends, position, side="right"))
        return self._paths[which].name, position - (int(self._ends[which - 1]) if which else 0)

    def read(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """The tokens from `start` on, across files.

        Returns:
            int64 [count].

        Raises:
            UserError: naming file and place, if a file is shorter than its manifest says or holds an id outside the vocabulary.
            ValueError: if the range is not within the split.
        """
        if start < 0 or count < 0 or start + count > self._length:
            raise ValueError(f"tokens {start} to {start + count} are not within the split's {self._length}")
        out = np.empty(count, np.int64)
        done = 0
        which = int(np.searchsorted(self._ends, start, side="right"))
        while done < count:
            end = int(self._ends[which])
            begin = int(self._ends[which - 1]) if which else 0
            part = min(count - done, end - (start + done))
            out[done : done + part] = self._read_file(which, start + done - begin, part)
            done += part
            which += 1
        return out

    def _read_file(self, which: int, place: int, count: int) -> npt.NDArray[Any]:
        path, width = self._paths[which], self._dtype.itemsize
        with told_plainly(path, "read"), path.open("rb", buffering=0) as file:
            file.seek(self._offsets[which] + place * width)
            data = file.read(count * width) or b""
            while len(data) < count * width and (more := file.read(count * width - len(data))):
                data += more  # one call may return less than was asked for, above 2 GB or on network file systems
        if len(data) < count * width:
            raise UserError(f"{path}: ends within token {place + len(data) // width:,}: it was cut; prepare the dataset again")
        ids = np.frombuffer(data, self._dtype)
        if ids.size and ids.max() >= self.vocab_size:
            bad = int(np.argmax(ids >= self.vocab_size))
            raise UserError(
                f"{path}: token {place + bad:,} is {ids[bad]}, outside the vocabulary of {self.vocab_size:,}: "
                "the file is damaged or was made with another tokenizer; prepare the dataset again"
            )
        return ids


class TokenDataset:
    """A dataset folder, opened. `open_dataset` makes one."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self.vocab_size, self.fingerprint = manifest.vocab_size, manifest.fingerprint

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that made the tokens; None when the dataset has none.

        Raises:
            UserError: if `tokenizer.json` is missing, unreadable or not the one that the manifest names.
        """
        if not self.manifest.tokenizer:
            return None
        tokenizer = load_tokenizer(self.path)
        if tokenizer.fingerprint != self.manifest.tokenizer:
            raise UserError(
                f"{self.path / 'tokenizer.json'}: has fingerprint {tokenizer.fingerprint}, but the tokens were made with "
                f"{self.manifest.tokenizer}: put the right tokenizer back, or prepare the dataset again"
            )
        return tokenizer

    def split(self, name: SplitName) -> TokenSplit:
        """The tokens of one split."""
        info = self.manifest.train if name == "train" else self.manifest.val
        return TokenSplit(self.path, name, info.files, self.manifest.dtype, self.vocab_size)

    def verify(self, progress: Callable[[int, int], None] | None = None) -> list[str]:
        """Read every byte and compare with the checksums.

        Args:
            progress: called with (bytes done, bytes in all).

        Returns:
            One line for each problem; empty when all is well.
        """
        train, val = self.manifest.train, self.manifest.val
        files: list[ShardFile | IndexFile] = [*train.files, *train.index, *val.files, *val.index]
        total, done = sum(file.size for file in files), 0
        problems = []
        for file in files:
            path, seen = self.path / file.name, hashlib.sha256()
            if path.exists() and not path.is_file():  # a pipe would wait for ever, and a device never end
                problems.append(f"{path}: is not a file")
                continue
            try:
                if (size := path.stat().st_size) != file.size:
                    problems.append(f"{path}: has {size:,} bytes instead of {file.size:,}")
                    continue
                with path.open("rb") as opened:
                    while block := opened.read(1 << 20):
                        seen.update(block)
                        done += len(block)
                        if progress is not None:
                            progress(done, total)
            except OSError as error:
                problems.append(f"{path}: {(error.strerror or str(error)).lower()}")
                continue
            if file.sha256 and seen.hexdigest() != file.sha256:
                problems.append(f"{path}: its checksum is not the manifest's")
        try:
            _ = self.tokenizer  # reading it is the check
        except UserError as error:
            problems.append(str(error))
        return problems


def open_dataset(folder: Path | str) -> TokenDataset:
    """Open a dataset folder, checking its manifest and the presence and size of every file.

    Raises:
        UserError: naming the file, if the manifest is missing, damaged, edited or of another format, or a file missing or cut.
    """
    folder = Path(folder)
    manifest = read_manifest(folder / "manifest.json")
    for split in (manifest.train, manifest.val):
        for file in split.files:
            path = folder / file.name
            if not path.is_file():
                raise UserError(f"{path}: is missing, but {folder / 'manifest.json'} names it: prepare the dataset again")
            if (size := path.stat().st_size) != file.size:
                raise UserError(
                    f"{path}: has {size:,} bytes instead of {file.size:,}: it was cut or changed; prepare the dataset again"
                )
    return TokenDataset(folder, manifest)
