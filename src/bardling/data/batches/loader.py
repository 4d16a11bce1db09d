"""Batches of token sequences, prefetched to the device.

A batch source is pure: `batch(first, size)` returns samples `first` to `first + size - 1`, whatever was requested before. The
loader's whole state is therefore one integer, and a resumed run, or one with another number of processes, sees the same
sequences.

Shapes: B sequences, T tokens of context. Targets are the inputs shifted by one.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from bardling.data.batches import IGNORE
from bardling.data.batches.order import DataOrder
from bardling.data.batches.packing import document_bounds, shorten_bounds
from bardling.data.tokens.conversations import ANSWER, BEGIN
from bardling.data.tokens.shards import TokenSplit
from bardling.errors import UserError


class Batch(NamedTuple):
    """Inputs and targets, int64 [B, T] both, and document bounds."""

    inputs: Tensor
    targets: Tensor
    documents: Tensor | None = None  # int32 cumulative document lengths (`packing.py`); None if attention crosses documents

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device; the copy is asynchronous from pinned memory."""
        return Batch._make(part if part is None else part.to(device, non_blocking=True) for part in self)

    def pinned(self) -> "Batch":
        return Batch._make(part if part is None else part.pin_memory() for part in self)


def shorten_context(batch: Batch, context: int) -> Batch:
    """[B, T] reshaped to [B * T / context, context]: the same tokens in the same order, with less context."""
    if batch.inputs.size(1) == context:
        return batch
    documents = None if batch.documents is None else shorten_bounds(batch.documents, batch.inputs.numel(), context)
    return Batch(batch.inputs.reshape(-1, context), batch.targets.reshape(-1, context), documents)


class BatchSource(Protocol):
    """A pure source of batches that can start anywhere."""

    def batch(self, first_sample: int, size: int) -> Batch:
        """Samples `first_sample` to `first_sample + size - 1`."""


class SequenceSet(Protocol):
    """A fixed set of `n` sequences, such as `EvalSequences`."""

    n: int

    def batch(self, first_sample: int, size: int) -> Batch:
        """Inputs and targets [size, time] of `size` sequences."""


class TrainSequences:
    """Sequences of a split in the order of a run; `document_start`, if set, is the id of the token that begins a document."""

    def __init__(self, split: TokenSplit, order: DataOrder, document_start: int | None = None) -> None:
        if order.n_tokens != len(split):
            raise ValueError(f"the order is for {order.n_tokens} tokens, the split has {len(split)}")
        self._split, self._order, self._document_start = split, order, document_start

    def batch(self, first_sample: int, size: int) -> Batch:
        """Samples `first_sample` to `first_sample + size - 1` of the run: [size, block_size]."""
        starts = self._order.starts(first_sample, size).tolist()
        return _read_batch(self._split, starts, self._order.block_size, self._document_start)


class EvalSequences:
    """A fixed set of non-overlapping sequences, spread evenly over a split; `document_start` is as in `TrainSequences`.

    `n` is their number: `windows`, or all in the split if that is None or more than there are. All of them together have each
    token of the split except the first as a target exactly once. Where the split ends within the last one, its missing targets
    are `IGNORE`; a batch is only as wide as its longest sequence, so a short text is not padded to the whole context.
    """

    def __init__(
        self,
        split: TokenSplit,
        block_size: int,
        windows: int | None,
        document_start: int | None = None,
        *,
        remedy: str = "use a longer text",
    ) -> None:
        if len(split) < 2:
            fault = f"the {split.name} split has fewer than 2 tokens ({len(split)}), so there is nothing to predict"
            raise UserError(f"{fault}: {remedy}")
        self._split, self._block_size, self._document_start = split, block_size, document_start
        self._stride = split.row or block_size  # from one sequence to the next
        self._available = len(split) // split.row if split.row else -(-(len(split) - 1) // block_size)
        self.n = self._available if windows is None else min(windows, self._available)

    def batch(self, first_sample: int, size: int) -> Batch:
        """Sequences `first_sample` to `first_sample + size - 1`, fewer at the end: [up to size, up to block_size]."""
        chosen = range(first_sample, min(first_sample + size, self.n))
        starts = [sample * self._available // self.n * self._stride for sample in chosen]
        return _read_batch(self._split, starts, self._block_size, self._document_start)


class SlidingSequences:
    """Overlapping sequences of a split: each begins `stride` tokens after the one before it.

    Every token except the first is a target once, in the first sequence that reaches it: with at least `block_size` - `stride`
    tokens before it, except for those at the start of the split. `document_start` is as in `TrainSequences`.
    """

    def __init__(self, split: TokenSplit, block_size: int, stride: int, document_start: int | None = None) -> None:
        if not 1 <= stride <= block_size:
            raise UserError(f"--stride {stride}: must be 1 to the context of {block_size} tokens")
        first = EvalSequences(split, block_size, 1, document_start)  # refuses a split without targets
        self._split, self._block_size, self._stride, self._document_start = split, block_size, stride, document_start
        self.n = first.n + max(0, -(-(len(split) - 1 - block_size) // stride))

    def batch(self, first_sample: int, size: int) -> Batch:
        """Sequences `first_sample` to `first_sample + size - 1`, fewer at the end: [up to size, up to block_size]."""
        chosen = range(first_sample, min(first_sample + size, self.n))
        starts = [sample * self._stride for sample in chosen]
        batch = _read_batch(self._split, starts, self._block_size, self._document_start)
        # the first sequence has nothing before it that has these targets already
        batch.targets[first_sample == 0 :, : self._block_size - self._stride] = IGNORE
        return batch


def _read_batch(split: TokenSplit, starts: list[int], time: int, document_start: int | None) -> Batch:
    """The sequences from `starts` on; after the end of the split, targets are `IGNORE` and inputs are token 0.

    Of conversations, targets outside answers are `IGNORE`, and each conversation is a document.
    """
    time = min(time, len(split) - 1 - min(starts, default=0))
    tokens = np.full((len(starts), time + 1), IGNORE, np.int64)  # [B, T + 1]
    for row, start in zip(tokens, starts, strict=True):
        count = min(time + 1, len(split) - start)
        row[:count] = split.read(start, count)
    inputs = torch.from_numpy(np.where(tokens[:, :-1] == IGNORE, 0, tokens[:, :-1]))
    targets = torch.from_numpy(np.ascontiguousarray(tokens[:, 1:]))
    if split.marks is not None:
        marks = torch.from_numpy(np.stack([split.marks.read(start, time + 1) for start in starts]))  # [B, T + 1]
        targets[marks[:, 1:] & ANSWER == 0] = IGNORE
        return Batch(inputs, targets, document_bounds(marks[:, :-1] & BEGIN > 0))
    documents = None if document_start is None else document_bounds(inputs == document_start)
    return Batch(inputs, targets, documents)


class Prefetcher(Iterator[Batch], AbstractContextManager["Prefetcher"]):
    """Iterates over batches on a device, of which a background thread prepares up to `depth` ahead of time.

    An exception in the source or the requests is raised in place of the batch. For CUDA, batches wait in pinned memory, so that
    the copy overlaps with compute. The consumer issues the copy, so it runs on the stream that uses the batch and needs no
    further synchronization. `requests` are (first sample, size) of each batch, in order, and may be endless. Only the thread
    uses `source`.
    """

    def __init__(self, source: BatchSource, requests: Iterator[tuple[int, int]], device: torch.device, depth: int = 4) -> None:
        self._source, self._requests, self._device = source, requests, device
        self._thread = ThreadPoolExecutor(1, "prefetch")
        self._waiting = deque(self._thread.submit(self._load) for _ in range(depth))

    def _load(self) -> Batch | None:
        """The batch of the next request; None if there are no more."""
        if (request := next(self._requests, None)) is None:
            return None
        batch = self._source.batch(*request)
        if self._device.type != "cuda":
            return batch
        torch.cuda.set_device(self._device)  # per thread; otherwise pinning would initialize the first GPU
        return batch.pinned()

    def __next__(self) -> Batch:
        try:
            batch = self._waiting.popleft().result() if self._waiting else None
            if batch is None:
                raise StopIteration
        except BaseException:
            self.close()
            raise
        self._waiting.append(self._thread.submit(self._load))
        return batch.to(self._device)

    def close(self) -> None:
        """Stop the thread, wait for it to end, and drop waiting batches. Can be called repeatedly."""
        self._waiting.clear()
        self._thread.shutdown(cancel_futures=True)

    def __exit__(self, *_: object) -> None:
        self.close()
