"""What attention needs to know about the documents of a batch, computed once for all layers.

With `data.document_mask` a token sees only its own document (Llama 3, arXiv:2407.21783, section 3.2; Zhao et al. 2024,
arXiv:2402.13991). Documents are given as cumulative lengths (`data/batches/packing.py`). On CUDA in 16-bit precision,
FlashAttention's kernel takes these directly (`model/kernels/attention.py`); everywhere else masks are built here.

Learned positions restart at 0 with every document, as if it stood alone; rotary positions are relative and need no change.
Limits: the kernel does not support dropout, so CUDA uses masks with dropout, too.
Shapes: B batch, T time, w window, N documents.
"""

import torch
from torch import Tensor

from bardling.config.architecture import Architecture
from bardling.model.kernels.attention import Documents, WindowMasks, within_window
from bardling.planning.costs import is_blocked, is_varlen


def make_documents(
    bounds: Tensor, batch: int, time: int, arch: Architecture, dtype: torch.dtype, *, dropout: float
) -> Documents:
    """Prepare what all layers share, from int32 [N + 1] cumulative lengths of the documents of B * T tokens; the last ones may
    be empty. `dtype` is that of queries, keys and values, `dropout` that of attention."""
    tokens = torch.arange(batch * time, device=bounds.device, dtype=torch.int32)
    numbers = torch.searchsorted(bounds, tokens, right=True) - 1  # int64 [B * T], of each token's document
    positions = (tokens - bounds[numbers]).view(batch, time).long()
    if is_varlen(bounds.device.type, str(dtype).removeprefix("torch."), arch.head_dim, dropout):
        return Documents(bounds, positions, None, None)
    numbers, slots = numbers.view(batch, time), torch.arange(time, device=bounds.device)
    windows = {arch.window(layer) for layer in range(arch.n_layer)}
    effective = [window for window in windows if window is not None and window < time]
    full = None
    if len(effective) < len(windows):
        full = additive_mask(_same(numbers, numbers) & (slots <= slots[:, None]), dtype)
    return Documents(bounds, positions, full, _window_masks(numbers, slots, effective[0], dtype) if effective else None)


def _window_masks(numbers: Tensor, slots: Tensor, window: int, dtype: torch.dtype) -> WindowMasks:
    """The masks of layers with a window, in the shapes in which attention is computed."""
    batch, time = numbers.shape
    if not is_blocked(time, window):
        visible = _same(numbers, numbers) & within_window(slots[:, None], slots, window)
        return WindowMasks(None, additive_mask(visible, dtype))
    start, places = numbers[:, :window], slots[:window]
    first = additive_mask(_same(start, start) & (places <= places[:, None]), dtype)  # [B, 1, w, w]
    blocks = numbers.reshape(batch, -1, window)  # [B, T / w, w]
    queries = blocks[:, 1:].flatten(0, 1)  # [B * blocks, w]
    keys = torch.cat([blocks[:, :-1], blocks[:, 1:]], dim=2).flatten(0, 1)  # [B * blocks, 2w]
    near = within_window(slots[window : 2 * window, None], slots[: 2 * window], window)  # [w, 2w]
    return WindowMasks(first, additive_mask(_same(queries, keys) & near, dtype))


def _same(queries: Tensor, keys: Tensor) -> Tensor:
    """[B, Q], [B, S] -> [B, 1, Q, S]: whether a query and a key belong to the same document."""
    return (queries[:, :, None] == keys[:, None, :])[:, None]


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a query sees a key, else minus infinity."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)
