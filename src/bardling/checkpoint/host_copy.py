"""A copy of tensors in host memory, so that training can modify the originals while the copy is written to disk.

All copies share one block of memory, as large as everything that is copied, allocated once and reused. For GPU tensors the
block is page-locked, so that the device copies into it at full bus speed. Faulting the block's pages in takes several times as
long as filling them later; `prepare` does it in advance, in the background.
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


class HostCopy:
    """Host memory for a copy of one set of tensors at a time."""

    def __init__(self) -> None:
        self._layout: tuple[tuple[str, torch.dtype, torch.Size], ...] = ()
        self._views: dict[str, Tensor] = {}

    def prepare(self, tensors: Mapping[str, Tensor]) -> None:
        """Allocate the memory that `take` needs for tensors of these names, dtypes and shapes, and touch every page.

        A failure is ignored: `take` tries again, and raises if there is still not enough memory.
        """
        with contextlib.suppress(OSError, RuntimeError):
            if self._reserve(tensors):
                for view in self._views.values():
                    view.zero_()

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy `tensors` from any device; the copies are valid until the next call. Without enough memory: `OSError`."""
        self._reserve(tensors)
        for name, tensor in tensors.items():
            _copy(tensor.detach(), self._views[name])
        for device in {tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"}:
            torch.cuda.synchronize(device)
        return dict(self._views)

    def _reserve(self, tensors: Mapping[str, Tensor]) -> bool:
        """Allocate a block and its views unless the layout is unchanged; returns whether it did."""
        layout = tuple((name, tensor.dtype, tensor.shape) for name, tensor in tensors.items())
        if layout == self._layout:
            return False
        self._layout, self._views = (), {}  # free the old block before allocating the new one
        sizes = [-(-tensor.nbytes // _ALIGN) * _ALIGN for tensor in tensors.values()]
        block = _allocate(sum(sizes), pinned=any(tensor.device.type == "cuda" for tensor in tensors.values()))
        for part, (name, tensor) in zip(torch.split_with_sizes(block, sizes), tensors.items(), strict=True):
            self._views[name] = part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        self._layout = layout
        return True


def _copy(source: Tensor, target: Tensor) -> None:
    """Copy one tensor; a copy from a GPU may still be in progress on return."""
    if source.device.type == "cpu" and source.is_contiguous():
        # Single-threaded on purpose. PyTorch's copy splits each tensor over all threads and waits for the slowest: on two
        # cores shared with other processes it took 3 to 8 s for GPT-2 124M, against 0.5 to 0.9 s.
        target_bytes, source_bytes = (tensor.reshape(-1).view(torch.uint8).numpy() for tensor in (target, source))
        np.copyto(target_bytes, source_bytes)
    else:
        target.copy_(source, non_blocking=source.device.type == "cuda")


def _allocate(size: int, *, pinned: bool) -> Tensor:
    """A new uint8 [size] tensor, in huge pages where available: these are faulted in much faster."""
    if hasattr(mmap, "MAP_ANONYMOUS"):
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(AttributeError, OSError):  # not supported by this system or kernel
            pages.madvise(mmap.MADV_HUGEPAGE)
        block = torch.frombuffer(pages, dtype=torch.uint8)  # keeps `pages` alive
    else:
        block = torch.empty(size, dtype=torch.uint8)
    if pinned:
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        # Not torch's pinned allocator, which rounds up to a power of two. A failure only costs speed.
        if int(runtime.cudaHostRegister(block.data_ptr(), size, 0)) == 0:
            weakref.finalize(block.untyped_storage(), runtime.cudaHostUnregister, block.data_ptr())
    return block
