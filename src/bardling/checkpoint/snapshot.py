"""A copy of tensors in host memory, so that training may change them while they are being written.

All copies lie in one block that is reserved once and used again by every later copy: memory does not grow from save to save.
For a GPU the block is locked in memory, which lets the device write into it at the bus's full speed. Making the block's pages
takes several times as long as filling them later, so `prepare` can do it beforehand, in the background.

Limits: the block is as large as everything that is copied.
"""

import contextlib
import mmap
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ALIGN = 64  # bytes: a cache line

_Layout = tuple[tuple[str, torch.dtype, torch.Size], ...]


class HostCopy:
    """Room in host memory for copies of a set of tensors, one set at a time."""

    def __init__(self) -> None:
        self._layout: _Layout = ()
        self._views: dict[str, Tensor] = {}

    def prepare(self, tensors: Mapping[str, Tensor]) -> None:
        """Reserve the memory that `take` will need for tensors of these names, types and shapes, and touch every page.

        Raises:
            OSError: there is not enough memory.
        """
        if self._reserve(tensors):
            for view in self._views.values():
                view.zero_()

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy `tensors`, which may be on any device; the copies hold until the next call.

        Raises:
            OSError: there is not enough memory.
        """
        self._reserve(tensors)
        for name, tensor in tensors.items():
            _copy(tensor.detach(), self._views[name])
        for device in {tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"}:
            torch.cuda.synchronize(device)
        return dict(self._views)

    def _reserve(self, tensors: Mapping[str, Tensor]) -> bool:
        """Make the views of one new block, unless they are there already; whether there was something to do."""
        layout = tuple((name, tensor.dtype, tensor.shape) for name, tensor in tensors.items())
        if layout == self._layout:
            return False
        self._layout, self._views = (), {}  # the old block goes before the new one comes
        places, size = [], 0
        for tensor in tensors.values():
            places.append(size)
            size += -(-tensor.numel() * tensor.element_size() // _ALIGN) * _ALIGN
        block = _block(max(size, 1), locked=any(tensor.device.type == "cuda" for tensor in tensors.values()))
        for place, (name, tensor) in zip(places, tensors.items(), strict=True):
            end = place + tensor.numel() * tensor.element_size()
            self._views[name] = block[place:end].view(tensor.dtype).view(tensor.shape)
        self._layout = layout
        return True


def _copy(source: Tensor, target: Tensor) -> None:
    """Copy one tensor; from a GPU the copy may still be under way afterwards."""
    if source.device.type == "cpu" and source.is_contiguous():
        # In one thread, on purpose. PyTorch's copy shares each tensor out over all threads and waits for the slowest: while
        # others used the same two cores that was measured at 3 to 8 s for GPT-2 124M, against 0.5 to 0.9 s.
        np.copyto(_bytes(target), _bytes(source))
    else:
        target.copy_(source, non_blocking=source.device.type == "cuda")


def _bytes(tensor: Tensor) -> np.ndarray:
    """The bytes of a contiguous tensor, not copied: uint8 [bytes]."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _block(size: int, *, locked: bool) -> Tensor:
    """A uint8 [size] tensor of fresh memory, in huge pages where the system has them: they are made much faster."""
    if hasattr(mmap, "MAP_ANONYMOUS"):
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                pages.madvise(mmap.MADV_HUGEPAGE)
        block = torch.frombuffer(pages, dtype=torch.uint8)  # keeps `pages` alive
    else:
        block = torch.empty(size, dtype=torch.uint8)
    if locked:
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        # Not torch's own pinned memory: that is rounded up to a power of two. A refusal only costs speed.
        if int(runtime.cudaHostRegister(block.data_ptr(), size, 0)) == 0:
            weakref.finalize(block.untyped_storage(), runtime.cudaHostUnregister, block.data_ptr())
    return block
