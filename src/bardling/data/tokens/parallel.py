"""Tokenization in several processes, in order, so that the result does not depend on their number.

Each worker is a separate Python process that reads texts from its standard input and writes token ids to its standard output,
both as raw bytes. It is started fresh (never forked, because the tokenizer's threads do not survive a fork) and imports
nothing from the program that uses this library, so scripts need no `__main__` guard. It ends when its input ends, even if its
owner is killed; its owner notices a worker's end immediately from the end of its output. Terminal signals do not reach it.

Method: one thread reads the text ahead. One thread per worker sends it a batch and waits for the answer. Answers are consumed
in the order of the batches, and only a few batches are in flight, which bounds memory. So reading, tokenizing and writing
overlap.

Limits: a batch is answered as a whole, so a document of one gigabyte occupies a single worker.
"""

import contextlib
import json
import os
import re
import struct
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from bardling.data.text.fields import valid_text
from bardling.data.tokens.fast_encoding import BulkEncoder, EncodersDiffer
from bardling.data.tokens.manifest import SplitName, token_dtype
from bardling.data.tokens.read_ahead import read_ahead
from bardling.data.tokens.tokenizer import Tokenizer, load_tokenizer
from bardling.errors import UserError
from bardling.files.cpu_quota import cpu_quota

SPLITS: tuple[SplitName, ...] = ("train", "val")
Piece = tuple[SplitName, bytes]  # some text in UTF-8 and its split
MOST_WORKERS = 64
_MOST_FAST, _MOST_OTHERS = 3, 16  # processes by default; more fast ones would wait for the text
_SMALL, _SMALL_IF_FAST = 16 << 20, 64 << 20  # bytes of text below which starting processes takes longer than it saves
_PIPE = 1 << 20  # bytes that a pipe holds; the system's 64 KiB mean many switches between processes
_START = "import sys; sys.path.append(sys.argv[1]); from bardling.data.tokens.parallel import serve; serve(*sys.argv[2:])"


class TextBatch(NamedTuple):
    """Consecutive documents as pieces of the splits."""

    pieces: list[Piece]
    names: list[str]  # for each piece, that of its document
    documents: int
    characters: int

    def names_of(self, split: SplitName) -> list[str]:
        """Names of the documents that have text in a split."""
        return [name for name, (where, text) in zip(self.names, self.pieces, strict=True) if where == split and text]


class Encoded(NamedTuple):
    """The tokens of one split in a batch."""

    ids: npt.NDArray[Any]  # [tokens], with `end` after each non-empty piece, and what begins a text before it
    bytes: int  # of the text in UTF-8
    lengths: npt.NDArray[np.int64]  # [documents], tokens of each non-empty piece, including those around it
    names: Mapping[str, int] = {}  # how often each control token is written in the text


class PieceEncoder:
    """Encodes pieces of text; one result for each of `SPLITS`. A piece begins with what the post-processor puts there.

    With `end`, it ends with these tokens.
    """

    def __init__(self, tokenizer: Tokenizer, end: Sequence[int], *, allow_fast: bool = True) -> None:
        self._bulk = BulkEncoder(tokenizer, allow_fast=allow_fast)
        self._head, self._tail = np.array(tokenizer.interface.start, np.uint32), np.array(end, np.uint32)
        self._vocab_size, self._dtype = tokenizer.vocab_size, token_dtype(tokenizer.vocab_size)
        names = [re.escape(valid_text(name).encode()) for name in tokenizer.control_names]
        self._names = re.compile(b"|".join(names) if names else b"(?!)")

    def encode(self, pieces: Sequence[Piece]) -> list[Encoded]:
        rows = self._bulk.encode([text for _, text in pieces])
        results = []
        for split in SPLITS:
            chosen = [(text, ids) for (where, text), ids in zip(pieces, rows, strict=True) if where == split and text]
            ids = np.concatenate([self._tail[:0], *(part for _, ids in chosen for part in (self._head, ids, self._tail))])
            if ids.size and int(ids.max()) >= self._vocab_size:
                raise ValueError(f"token id {int(ids.max())} is outside the vocabulary of {self._vocab_size}")
            around = len(self._head) + len(self._tail)
            lengths = np.array([len(ids) + around for _, ids in chosen], np.int64)
            names = Counter(name.decode() for text, _ in chosen for name in self._names.findall(text))
            results.append(Encoded(ids.astype(self._dtype), sum(len(text) for text, _ in chosen), lengths, names))
        return results


def utf8(text: str) -> bytes:
    """A text in UTF-8, with lone surrogates replaced by U+FFFD."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return valid_text(text).encode()


def default_workers(size: int, kind: str, *, fast: bool = False) -> int:
    """Number of other processes for a source of `size` bytes (0: unknown) and a kind of tokenizer, `fast` with `gigatoken`.

    All cores that this process may use, up to a limit; if they are fast, one of the cores is for reading. 0 if they would not
    help: for little text, and for bytes and characters, whose table lookup takes no longer than sending the text.
    """
    if kind in ("byte", "char") or 0 < size < (_SMALL_IF_FAST if fast else _SMALL):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(cores, cpu_quota() or cores)
    return min(cores - 1, _MOST_FAST) if fast else min(cores, _MOST_OTHERS) if cores > 1 else 0


class Encoders(contextlib.AbstractContextManager["Encoders"]):
    """Tokenizes batches in order, appending `end` to each piece; a context manager that ends its processes.

    The `processes` read the tokenizer from `folder`, where it is already saved; with 0, this process does the work. An
    `EncodersDiffer` may come from here or any batch, unless `allow_fast` is False (`fast_encoding.py`).
    """

    def __init__(
        self, tokenizer: Tokenizer, folder: Path, end: Sequence[int], processes: int, *, allow_fast: bool = True
    ) -> None:
        self._encoder = None if processes else PieceEncoder(tokenizer, end, allow_fast=allow_fast)
        self._count = max(1, processes)
        self._workers: list[_Worker] = []
        self._threads = ThreadPoolExecutor(self._count)
        try:
            for _ in range(processes):
                self._workers.append(_Worker(folder, end, allow_fast=allow_fast))
        except OSError as error:
            self.__exit__()
            raise UserError(f"cannot start {processes} processes ({error.strerror}): use fewer workers") from error
        self._idle = list(self._workers)

    def run(self, batches: Iterable[TextBatch]) -> Iterator[tuple[TextBatch, list[Encoded]]]:
        """Each batch with its tokens, in order; a `UserError` if a text cannot be encoded, or a worker has ended."""
        in_flight: deque[tuple[TextBatch, Future[list[Encoded]]]] = deque()
        with read_ahead(batches, 2) as read:
            for batch in read:
                in_flight.append((batch, self._threads.submit(self._encode, batch.pieces)))
                if len(in_flight) > self._count + 3:
                    first, result = in_flight.popleft()
                    yield first, result.result()
            for batch, result in in_flight:
                yield batch, result.result()

    def _encode(self, pieces: Sequence[Piece]) -> list[Encoded]:
        if self._encoder is not None:
            return self._encoder.encode(pieces)
        worker = self._idle.pop()  # there are as many workers as threads
        try:
            return worker.encode(pieces)
        finally:
            self._idle.append(worker)

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.stop()
        self._threads.shutdown(cancel_futures=True)


class _Worker:
    """The owner's side of one worker."""

    def __init__(self, folder: Path, end: Sequence[int], *, allow_fast: bool = True) -> None:
        root, settings = str(Path(__file__).resolve().parents[2]), json.dumps([list(end), allow_fast])
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, root, str(folder.resolve()), settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pipesize=_PIPE,
            start_new_session=True,  # Ctrl-C reaches only the owner, which then ends the workers
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
        )
        self._requests, self._answers = cast(IO[bytes], self._process.stdin), cast(IO[bytes], self._process.stdout)

    def encode(self, pieces: Sequence[Piece]) -> list[Encoded]:
        sizes = np.array([len(text) for _, text in pieces], "<i8").tobytes()
        splits = bytes(SPLITS.index(split) for split, _ in pieces)
        try:
            _send(self._requests, sizes, splits, b"".join(text for _, text in pieces))
            head, *parts = _receive(self._answers)
        except (OSError, EOFError, ValueError) as error:  # ValueError: `stop` has closed the pipe
            status = self._process.wait()
            how = f"signal {-status}" if status < 0 else f"status {status}"
            hint = "perhaps out of memory: use fewer workers" if status == -9 else "see its output above"
            raise UserError(f"a tokenization worker ended with {how}, {hint} (--workers 1 uses no other process)") from error
        answer = json.loads(head)
        if "differs" in answer:
            raise EncodersDiffer(answer["differs"])
        if "error" in answer:
            raise UserError(answer["error"])
        results = zip(answer["splits"], parts[::2], parts[1::2], strict=True)
        dtype = np.dtype(answer["dtype"]).newbyteorder("<")
        return [
            Encoded(np.frombuffer(ids, dtype), size, np.frombuffer(lengths, "<i8"), names)
            for (size, names), ids, lengths in results
        ]

    def stop(self) -> None:
        self._process.kill()
        with contextlib.suppress(OSError), self._process:  # closes the pipes and waits; unsent data has no reader left
            pass


def serve(folder: str, settings: str) -> None:
    """The worker's side: answer texts on standard input until it ends, with the results or an error's message.

    `settings` are [end, whether `gigatoken` may be used] as JSON.
    """
    incoming, outgoing = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # keeps other output out of the answers
    end, allow_fast = json.loads(settings)
    tokenizer, encoder = load_tokenizer(folder), None
    with contextlib.suppress(EOFError):
        while True:
            sizes, splits, body = _receive(incoming)
            bounds = np.cumsum(np.frombuffer(sizes, "<i8")).tolist()
            texts = [body[start:stop] for start, stop in zip([0, *bounds], bounds, strict=False)]
            try:
                encoder = encoder or PieceEncoder(tokenizer, end, allow_fast=allow_fast)
                results = encoder.encode([(SPLITS[split], text) for split, text in zip(splits, texts, strict=True)])
            except (UserError, EncodersDiffer) as error:
                key = "error" if isinstance(error, UserError) else "differs"
                _send(outgoing, json.dumps({key: str(error)}).encode())
                continue
            answer = {"splits": [[part.bytes, part.names] for part in results], "dtype": results[0].ids.dtype.name}
            arrays = [
                part.astype(part.dtype.newbyteorder("<")).tobytes() for each in results for part in (each.ids, each.lengths)
            ]
            _send(outgoing, json.dumps(answer).encode(), *arrays)


def _send(pipe: IO[bytes], *parts: bytes) -> None:
    pipe.write(struct.pack(f"<Q{len(parts)}Q", len(parts), *map(len, parts)))
    for part in parts:
        pipe.write(part)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> list[bytes]:
    head = pipe.read(8)
    sizes = pipe.read(8 * int.from_bytes(head, "little"))
    parts = [pipe.read(size) for (size,) in struct.iter_unpack("<Q", sizes)]
    if len(head) < 8 or sum(map(len, parts)) < sum(size for (size,) in struct.iter_unpack("<Q", sizes)):
        raise EOFError  # the other side has ended
    return parts
