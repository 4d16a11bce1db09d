"""Batches of token windows, on the device in time.

A batch source is pure: `batch(first, size)` gives samples `first` to `first + size - 1`, whatever was asked before. That makes
the whole state of loading one integer, which is why a resumed run, or one on another number of processes, sees the same
sequences. `TrainWindows` follows an order; `EvalWindows` is a fixed, evenly spread set; `Prefetcher` asks a source ahead of
time in a background thread.

Shapes: B sequences, T tokens of context. Targets are the inputs shifted by one.
"""

import queue
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from bardling.data.order import Int64s
from bardling.data.packing import cut_bounds, document_bounds
from bardling.data.shards import TokenSplit
from bardling.data.skips import Order
from bardling.errors import UserError

IGNORE = -100
"""Target that no loss counts: PyTorch's default `ignore_index`."""


class Batch(NamedTuple):
    """Sequences and what follows each of their tokens: int64 [batch, time], both; and where documents begin in them."""

    inputs: Tensor
    targets: Tensor
    documents: Tensor | None = None
    """int32 cumulative lengths (`packing.py`) where a token is to see only its own document."""

    def to(self, device: torch.device) -> "Batch":
        """The same on a device; from pinned memory the copy does not wait."""
        documents = None if self.documents is None else self.documents.to(device, non_blocking=True)
        return Batch(self.inputs.to(device, non_blocking=True), self.targets.to(device, non_blocking=True), documents)

    def pinned(self) -> "Batch":
        """The same in pinned host memory."""
        documents = None if self.documents is None else self.documents.pin_memory()
        return Batch(self.inputs.pin_memory(), self.targets.pin_memory(), documents)

    def known(self) -> dict[str, Tensor]:
        """What a model is told besides inputs and targets, as keyword arguments."""
        return {} if self.documents is None else {"documents": self.documents}


def cut(batch: Batch, context: int) -> Batch:
    """[B, T] as [B * T / context, context]: the same tokens in the same order, each with less context before it."""
    if batch.inputs.size(1) == context:
        return batch
    documents = None if batch.documents is None else cut_bounds(batch.documents, batch.inputs.numel(), context)
    return Batch(batch.inputs.reshape(-1, context), batch.targets.reshape(-1, context), documents)


class BatchSource(Protocol):
    """Where batches come from: pure, restartable anywhere."""

    def batch(self, first_sample: int, size: int) -> Batch:
        """Samples `first_sample` to `first_sample + size - 1`."""
        ...


class TrainWindows:
    """Windows of a split in the order of a run; with `document_start`, a token's id, their documents are told apart by it."""

    def __init__(self, split: TokenSplit, order: Order, document_start: int | None = None) -> None:
        if order.n_tokens != len(split):
            raise ValueError(f"the order is for {order.n_tokens} tokens, the split has {len(split)}")
        self._split, self._order, self._document_start = split, order, document_start

    def batch(self, first_sample: int, size: int) -> Batch:
        """Samples `first_sample` to `first_sample + size - 1` of the run: [size, block_size]."""
        time = self._order.block_size
        windows = np.empty((size, time + 1), np.int64)  # [B, T + 1]
        for row, start in zip(windows, self._order.starts(first_sample, size), strict=True):
            row[:] = self._split.read(int(start), time + 1)
        return _shifted(windows, self._document_start)


class EvalWindows:
    """A fixed set of non-overlapping windows, spread evenly over a split: the same every time.

    Attributes:
        n: windows in the set: `windows`, or all that the split has when that is None or more than there are. Together, all of
            them hold every token of the split but the first as a target exactly once; the last one is shorter when the split
            ends within it, and its missing targets are `IGNORE`.

    With `document_start`, a token's id, documents are told apart as in training, so that the loss is of the same task.

    Raises:
        UserError: if the split has fewer than two tokens.
    """

    def __init__(self, split: TokenSplit, block_size: int, windows: int | None, document_start: int | None = None) -> None:
        if len(split) < 2:
            raise UserError(
                f"the {split.name} split has {len(split)} tokens, but one prediction needs 2: "
                "add text, or raise data.val_fraction"
            )
        self._split, self._block_size, self._document_start = split, block_size, document_start
        self._available = -(-(len(split) - 1) // block_size)
        self.n = self._available if windows is None else min(windows, self._available)

    def batch(self, first_sample: int, size: int) -> Batch:
        """Windows `first_sample` to `first_sample + size - 1` of the set, fewer where it ends: [up to size, block_size]."""
        time, chosen = self._block_size, range(first_sample, min(first_sample + size, self.n))
        windows = np.full((len(chosen), time + 1), IGNORE, np.int64)  # [B, T + 1]
        for row, sample in zip(windows, chosen, strict=True):
            start = sample * self._available // self.n * time
            count = min(time + 1, len(self._split) - start)
            row[:count] = self._split.read(start, count)
        return _shifted(windows, self._document_start)


def _shifted(windows: Int64s, document_start: int | None) -> Batch:
    """[B, T + 1] becomes inputs and targets of [B, T]; padding is no valid input, so it becomes token 0 there."""
    inputs = torch.from_numpy(np.where(windows[:, :-1] == IGNORE, 0, windows[:, :-1]))
    documents = None if document_start is None else document_bounds(inputs, document_start)
    return Batch(inputs, torch.from_numpy(np.ascontiguousarray(windows[:, 1:])), documents)


class Prefetcher:
    """Iterates over batches on a device, which a background thread makes ahead of time.

    Its whole state is which request comes next; to go on elsewhere, start another one from there.

    Args:
        source: what makes the batches; used only by the thread.
        requests: (first sample, size) of each batch, in order; may be endless.
        device: where the batches go. For CUDA they wait in pinned memory, so that the copy overlaps with computing. The copy is
            issued by whoever iterates, hence on the stream that will use it, and needs no further synchronisation.
        depth: batches that wait at most.

    An exception in the source or the requests is raised again where the batch would have come.
    """

    def __init__(self, source: BatchSource, requests: Iterator[tuple[int, int]], device: torch.device, depth: int = 4) -> None:
        self._source, self._requests, self._device = source, requests, device
        self._ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=max(1, depth))
        self._closed = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        last: BaseException | None = None
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # per thread: without it pinning would wake the first GPU
            for first, size in self._requests:
                batch = self._source.batch(first, size)
                if self._device.type == "cuda":
                    batch = batch.pinned()
                if not self._put(batch):
                    return
        except BaseException as error:  # noqa: BLE001 (handed over, and raised by the consumer)
            last = error
        self._put(last)

    def _put(self, item: Batch | BaseException | None) -> bool:
        """Wait for room; False when the prefetcher is closed meanwhile."""
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def __iter__(self) -> "Prefetcher":
        return self

    def __next__(self) -> Batch:
        if self._ended or self._closed.is_set():
            raise StopIteration
        item = self._ready.get()
        if isinstance(item, Batch):
            return item.to(self._device)
        self._ended = True
        if item is None:
            raise StopIteration
        raise item

    def close(self) -> None:
        """Stop the thread and wait until it has ended; batches that wait are dropped. May be called again."""
        self._closed.set()
        while True:  # wakes a thread that waits for room
            try:
                self._ready.get_nowait()
            except queue.Empty:
                break
        self._thread.join()

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
