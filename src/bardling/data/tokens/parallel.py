"""Tokenization in several processes, in order, so that the result does not depend on their number.

Each worker is a separate Python process that reads texts from its standard input and writes token ids to its standard output,
as JSON and raw integers. It is started fresh (never forked, because the tokenizer's threads do not survive a fork) and imports
nothing from the program that uses this library, so scripts need no `__main__` guard. It ends when its input ends, even if its
owner is killed; its owner notices a worker's end immediately from the end of its output. Terminal signals do not reach it.

Method: one thread per worker sends it a batch and waits for the answer. Answers are consumed in the order of the batches, and
only a few batches are in flight, which bounds memory. Limits: a batch is answered as a whole, so a document of one gigabyte
occupies a single worker.
"""

import contextlib
import json
import os
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from bardling.data.tokens.manifest import SplitName
from bardling.data.tokens.tokenizer import Tokenizer, load_tokenizer
from bardling.errors import UserError

SPLITS: tuple[SplitName, ...] = ("train", "val")
Piece = tuple[SplitName, str]  # some text and its split
_SMALL = 16 << 20  # bytes of text below which starting processes takes longer than it saves
_START = "import sys; sys.path.append(sys.argv[1]); from bardling.data.tokens.parallel import serve; serve(sys.argv[2])"


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

    ids: npt.NDArray[np.uint32]  # [tokens], with `end` after each non-empty piece, and what begins a text before it
    bytes: int  # of the text in UTF-8
    lengths: npt.NDArray[np.int64]  # [documents], tokens of each non-empty piece, including those around it


def encode(tokenizer: Tokenizer, pieces: Sequence[Piece], end: Sequence[int]) -> list[Encoded]:
    """Tokenize pieces of text; one result for each of `SPLITS`. A piece begins with what the post-processor puts there."""
    rows = tokenizer.encode_batch([text for _, text in pieces])
    head, tail = np.array(tokenizer.interface.start, np.int64), np.array(end, np.int64)
    results = []
    for split in SPLITS:
        chosen = [(text, ids) for (where, text), ids in zip(pieces, rows, strict=True) if where == split and text]
        parts = [part for _, ids in chosen for part in (head, ids, tail)]
        size = sum(len(text.encode("utf-8", "replace")) for text, _ in chosen)
        lengths = np.array([len(head) + len(ids) + len(end) for _, ids in chosen], np.int64)
        results.append(Encoded(np.concatenate([tail[:0], *parts]).astype(np.uint32), size, lengths))
    return results


def default_workers(size: int, kind: str) -> int:
    """Number of processes for a source of `size` bytes (0: unknown) and a kind of tokenizer.

    All cores, or 1 if more would not help: for little text, and for bytes and characters, whose table lookup takes no longer
    than sending the text to another process.
    """
    if kind in ("byte", "char") or 0 < size < _SMALL:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Encoders(contextlib.AbstractContextManager["Encoders"]):
    """Tokenizes batches in order, appending `end` to each piece; a context manager that ends its processes.

    Several workers read the tokenizer from `folder`, where it is already saved; with one, this process does the work.
    """

    def __init__(self, tokenizer: Tokenizer, folder: Path, end: Sequence[int], workers: int) -> None:
        self._tokenizer, self._end, self._count = tokenizer, tuple(end), workers
        self._workers: list[_Worker] = []
        self._threads = ThreadPoolExecutor(workers)
        try:
            for _ in range(workers if workers > 1 else 0):
                self._workers.append(_Worker(folder))
        except OSError as error:
            self.__exit__()
            raise UserError(f"cannot start {workers} processes ({error.strerror}): use fewer workers") from error
        self._idle = list(self._workers)

    def run(self, batches: Iterable[TextBatch]) -> Iterator[tuple[TextBatch, list[Encoded]]]:
        """Each batch with its tokens, in order; a `UserError` if a text cannot be encoded, or a worker has ended."""
        if not self._workers:
            for batch in batches:
                yield batch, encode(self._tokenizer, batch.pieces, self._end)
            return
        in_flight: deque[tuple[TextBatch, Future[list[Encoded]]]] = deque()
        for batch in batches:
            in_flight.append((batch, self._threads.submit(self._encode, batch.pieces)))
            if len(in_flight) > self._count + 1:
                first, result = in_flight.popleft()
                yield first, result.result()
        for batch, result in in_flight:
            yield batch, result.result()

    def _encode(self, pieces: Sequence[Piece]) -> list[Encoded]:
        worker = self._idle.pop()  # there are as many workers as threads
        try:
            return worker.encode(pieces, self._end)
        finally:
            self._idle.append(worker)

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.stop()
        self._threads.shutdown(cancel_futures=True)


class _Worker:
    """The owner's side of one worker."""

    def __init__(self, folder: Path) -> None:
        root = str(Path(__file__).resolve().parents[2])
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, root, str(folder.resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C reaches only the owner, which then ends the workers
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
        )
        self._requests, self._answers = cast(IO[bytes], self._process.stdin), cast(IO[bytes], self._process.stdout)

    def encode(self, pieces: Sequence[Piece], end: Sequence[int]) -> list[Encoded]:
        try:
            _send(self._requests, [pieces, end])
            answer, body = _receive(self._answers)
        except (OSError, EOFError, ValueError) as error:  # ValueError: `stop` has closed the pipe
            status = self._process.wait()
            how = f"signal {-status}" if status < 0 else f"status {status}"
            hint = "perhaps out of memory: use fewer workers" if status == -9 else "see its output above"
            raise UserError(f"a tokenization worker ended with {how}, {hint} (--workers 1 uses no other process)") from error
        if isinstance(answer, str):
            raise UserError(answer)
        lengths = [np.array(part, np.int64) for _, part in answer]
        rows = np.split(np.frombuffer(body, "<u4"), np.cumsum([part.sum() for part in lengths])[:-1])
        return [Encoded(ids, size, part) for ids, (size, _), part in zip(rows, answer, lengths, strict=True)]

    def stop(self) -> None:
        self._process.kill()
        with contextlib.suppress(OSError), self._process:  # closes the pipes and waits; unsent data has no reader left
            pass


def serve(folder: str) -> None:
    """The worker's side: answer [pieces, end] on standard input until it ends, with the results or a user error's message."""
    incoming, outgoing = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # keeps other output out of the answers
    tokenizer = load_tokenizer(folder)
    with contextlib.suppress(EOFError):
        while True:
            (pieces, end), _ = _receive(incoming)
            try:
                results = encode(tokenizer, pieces, end)
            except UserError as error:
                _send(outgoing, str(error))
                continue
            body = np.concatenate([part.ids for part in results]).astype("<u4").tobytes()
            _send(outgoing, [[part.bytes, part.lengths.tolist()] for part in results], body)


def _send(pipe: IO[bytes], message: object, body: bytes = b"") -> None:
    head = json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass")
    pipe.write(struct.pack("<QQ", len(head), len(body)) + head)
    pipe.write(body)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> tuple[Any, bytes]:
    head_size, body_size = struct.unpack("<QQ", pipe.read(16).ljust(16, b"\0"))
    head, body = pipe.read(head_size), pipe.read(body_size)
    if not head or len(head) < head_size or len(body) < body_size:  # the other side has ended
        raise EOFError
    return json.loads(head.decode("utf-8", "surrogatepass")), body
