"""Tokenising in several processes, in order, so that the result does not depend on how many there are.

Each worker is a Python process of its own that reads texts from its standard input and writes token ids to its standard output,
in frames of plain bytes. It is started afresh (never forked: the tokenizer's threads do not survive that) and imports nothing
of the program that uses this library, so scripts need no `__main__` guard. It ends when its input does, however its owner
ended; when a worker ends, its owner notices at once by the end of its output. Terminal signals do not reach it.

Method: one thread per worker hands it a batch and waits for the answer; answers are taken in the order of the batches, and only
a few batches are under way, which bounds memory. Limits: a batch is answered as a whole, so one document of a gigabyte
keeps one worker busy alone.
"""

import itertools
import json
import os
import queue
import struct
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from bardling.data.manifest import SplitName
from bardling.data.tokenizer import Tokenizer, load_tokenizer
from bardling.errors import UserError

SPLITS: tuple[SplitName, ...] = ("train", "val")
_SMALL = 16 << 20  # bytes of text below which starting processes costs more than it gains
_COUNT = struct.Struct("<Q")
_START = "import sys; sys.path.append(sys.argv[1]); from bardling.data.parallel import serve; serve(sys.argv[2])"


class Pieces(Protocol):
    """What is tokenised at a time: pieces of text, each for one of the splits."""

    @property
    def pieces(self) -> Sequence[tuple[SplitName, str]]:
        """Split and text of each piece, in order."""
        ...


BatchT = TypeVar("BatchT", bound=Pieces)


@dataclass(frozen=True)
class Encoded:
    """The tokens of one split in a batch.

    Attributes:
        ids: unsigned 32-bit integers [tokens], `end` after each piece that is not empty.
        documents: pieces that are not empty.
        bytes: UTF-8 bytes of the text.
        lengths: int64 [documents], tokens of each, `end` included.
    """

    ids: npt.NDArray[np.uint32]
    documents: int
    bytes: int
    lengths: npt.NDArray[np.int64]


def encode(tokenizer: Tokenizer, pieces: Sequence[tuple[SplitName, str]], end: Sequence[int]) -> list[Encoded]:
    """Tokenise pieces of text; one result for each of `SPLITS`."""
    rows = tokenizer.encode_batch([text for _, text in pieces])
    results = []
    for split in SPLITS:
        chosen = [(text, ids) for (where, text), ids in zip(pieces, rows, strict=True) if where == split and text]
        parts = [part for _, ids in chosen for part in (ids, np.array(end, np.int64))]
        ids = np.concatenate(parts).astype(np.uint32) if parts else np.empty(0, np.uint32)
        size = sum(len(text.encode("utf-8", "replace")) for text, _ in chosen)
        lengths = np.array([len(row) + len(end) for _, row in chosen], np.int64)
        results.append(Encoded(ids, len(chosen), size, lengths))
    return results


def default_workers(size: int, kind: str) -> int:
    """How many processes suit a source of `size` bytes (0: unknown) and a kind of tokenizer.

    That is all cores, or 1 where more gain nothing: little text, or bytes and characters, which are looked up in a table: that
    takes no longer than handing them to another process.
    """
    if kind in ("byte", "char") or 0 < size < _SMALL:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Encoders(Generic[BatchT]):
    """Turns batches into tokens, in order; as a context manager, leaves no process behind.

    Args:
        tokenizer: the tokenizer, which has been saved in `folder`.
        folder: where workers read it.
        end: ids that follow each piece.
        workers: processes; 1 works in this one.
    """

    def __init__(self, tokenizer: Tokenizer, folder: Path, end: Sequence[int], workers: int) -> None:
        if workers < 1:
            raise UserError(f"workers = {workers}: must be at least 1")
        self._tokenizer, self._folder, self._end, self._count = tokenizer, folder, tuple(end), workers
        self._workers: list[_Worker] = []
        self._threads: ThreadPoolExecutor | None = None
        self._mine = threading.local()

    def __enter__(self) -> "Encoders[BatchT]":
        if self._count > 1:
            waiting: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
            try:
                for _ in range(self._count):
                    self._workers.append(_Worker(self._folder))
                    waiting.put(self._workers[-1])
            except OSError as error:
                self._stop()
                raise UserError(
                    f"{self._count} processes cannot be started ({error.strerror}): ask for fewer workers"
                ) from error

            def take() -> None:
                self._mine.worker = waiting.get()

            self._threads = ThreadPoolExecutor(self._count, initializer=take)
        return self

    def run(self, batches: Iterable[BatchT]) -> Iterator[tuple[BatchT, list[Encoded]]]:
        """Each batch with its tokens, in the order of the batches.

        Raises:
            UserError: if a text cannot be encoded, or a worker has ended.
        """
        if self._threads is None:
            for batch in batches:
                yield batch, encode(self._tokenizer, batch.pieces, self._end)
            return
        under_way: deque[tuple[BatchT, Future[list[Encoded]]]] = deque()
        for batch in batches:
            under_way.append((batch, self._threads.submit(self._ask, batch.pieces)))
            if len(under_way) > self._count + 1:
                first, result = under_way.popleft()
                yield first, result.result()
        while under_way:
            first, result = under_way.popleft()
            yield first, result.result()

    def _ask(self, pieces: Sequence[tuple[SplitName, str]]) -> list[Encoded]:
        worker: _Worker = self._mine.worker
        return worker.encode(pieces, self._end)

    def _stop(self) -> None:
        for worker in self._workers:
            worker.stop()
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()


class _Worker:
    """The owner's end of one worker."""

    def __init__(self, folder: Path) -> None:
        root = str(Path(__file__).resolve().parents[2])
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, root, str(folder.resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the owner, who then ends the workers
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
        )

    def encode(self, pieces: Sequence[tuple[SplitName, str]], end: Sequence[int]) -> list[Encoded]:
        """Have pieces tokenised."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        texts = [text.encode("utf-8", "surrogatepass") for _, text in pieces]
        header = {
            "splits": [SPLITS.index(split) for split, _ in pieces],
            "sizes": [len(text) for text in texts],
            "end": list(end),
        }
        try:
            _send(self._process.stdin, header, b"".join(texts))
            answer, body = _receive(self._process.stdout)
        except (OSError, EOFError, ValueError) as error:  # ValueError: the pipe was closed here, by `stop`
            status = self._process.wait()
            how = f"signal {-status}" if status < 0 else f"status {status}"
            hint = "perhaps for lack of memory: ask for fewer workers" if status == -9 else "what it said is above"
            raise UserError(f"a process that tokenised has ended with {how}, {hint} (--workers 1 uses none)") from error
        if "refused" in answer:
            raise UserError(answer["refused"])
        ids = np.frombuffer(body, "<u4")
        ends = np.cumsum([part["tokens"] for part in answer["parts"]])[:-1]
        return [
            Encoded(piece, part["documents"], part["bytes"], np.array(part["lengths"], np.int64))
            for piece, part in zip(np.split(ids, ends), answer["parts"], strict=True)
        ]

    def stop(self) -> None:
        """End the worker, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            try:
                if pipe is not None:
                    pipe.close()
            except OSError:
                continue  # what was still in the buffer has no reader any more


def serve(folder: str) -> None:
    """The worker's end: answer frames on standard input until it ends."""
    incoming, outgoing = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # so that nothing else gets between the frames
    tokenizer = load_tokenizer(folder)
    while True:
        try:
            header, body = _receive(incoming)
        except EOFError:
            return
        starts = np.cumsum([0, *header["sizes"]]).tolist()
        texts = [body[start:stop].decode("utf-8", "surrogatepass") for start, stop in itertools.pairwise(starts)]
        pieces = [(SPLITS[split], text) for split, text in zip(header["splits"], texts, strict=True)]
        try:
            results = encode(tokenizer, pieces, header["end"])
        except UserError as error:
            _send(outgoing, {"refused": str(error)}, b"")
            continue
        parts = [
            {"tokens": r.ids.size, "documents": r.documents, "bytes": r.bytes, "lengths": r.lengths.tolist()} for r in results
        ]
        _send(outgoing, {"parts": parts}, np.concatenate([r.ids for r in results]).astype("<u4").tobytes())


def _send(pipe: IO[bytes], header: Mapping[str, object], body: bytes) -> None:
    head = json.dumps(header).encode()
    pipe.write(_COUNT.pack(len(head)) + head + _COUNT.pack(len(body)))
    pipe.write(body)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> tuple[dict[str, Any], bytes]:
    head = json.loads(_exactly(pipe, _COUNT.unpack(_exactly(pipe, _COUNT.size))[0]))
    return head, _exactly(pipe, _COUNT.unpack(_exactly(pipe, _COUNT.size))[0])


def _exactly(pipe: IO[bytes], count: int) -> bytes:
    data = pipe.read(count)
    if len(data) < count:
        raise EOFError
    return data
