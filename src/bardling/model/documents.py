"""Attention in windows that hold several documents: a token sees only its own.

Llama 3 (arXiv:2407.21783, section 3.2); Zhao et al. 2024, arXiv:2402.13991. Which tokens belong together is given as cumulative
lengths (`data/packing.py`). On a CUDA device in 16-bit precision they go to FlashAttention's kernel for sequences of varying
lengths (Dao 2023, arXiv:2307.08691), which computes no score between documents. Everywhere else all scores are computed,
and a mask, made once for all layers, hides what a token must not see.

Learned positions start again at 0 with every document, as they would if it stood alone; rotary ones are relative, and stay.

Limits: the kernel knows no dropout, so with dropout CUDA takes the mask too.

Shapes: B batch, T time, H query heads, K key and value heads, D channels of a head, w window, N documents.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from bardling.architecture import Architecture
from bardling.model.arithmetic import is_blocked, is_varlen
from bardling.model.attend import WindowMasks, attend, attend_window, band, expand_heads

_SHARES_HEADS = torch.__version__ >= "2.12"
"""Whether PyTorch's `varlen_attn` takes fewer heads of keys and values than of queries."""


class Packed(NamedTuple):
    """What attention needs to know of a batch's documents. Masks are 0 where a query sees a key, else minus infinity."""

    bounds: Tensor  # int32 [N + 1], cumulative lengths over all B * T tokens
    positions: Tensor  # int64 [B, T], places within documents
    whole: Tensor | None  # [B, 1, T, T], for layers without a window
    near: WindowMasks | None  # for layers with one


def pack(bounds: Tensor, batch: int, time: int, made: Architecture, dtype: torch.dtype, *, dropout: float) -> Packed:
    """Prepare what all layers share.

    Args:
        bounds: int32 [N + 1] cumulative lengths of the documents of B * T tokens; the last ones may be empty.
        dtype: of queries, keys and values.
        dropout: of attention.
    """
    places = torch.arange(batch * time, device=bounds.device, dtype=torch.int32)
    numbers = torch.searchsorted(bounds, places, right=True) - 1  # int64 [B * T]
    positions = (places - bounds[numbers]).view(batch, time).long()
    if is_varlen(bounds.device.type, str(dtype).removeprefix("torch."), made.head_dim, dropout):
        return Packed(bounds, positions, None, None)
    numbers, slots = numbers.view(batch, time), torch.arange(time, device=bounds.device)
    windows = {made.window(layer) for layer in range(made.n_layer)}
    near = [window for window in windows if window is not None and window < time]
    whole = None
    if len(near) < len(windows):
        whole = _mask(_same(numbers, numbers) & (slots <= slots[:, None]), dtype)
    return Packed(bounds, positions, whole, _near(numbers, slots, near[0], dtype) if near else None)


def _near(numbers: Tensor, slots: Tensor, window: int, dtype: torch.dtype) -> WindowMasks:
    """The masks of layers with a window, in the form in which they are computed."""
    batch, time = numbers.shape
    if not is_blocked(time, window):
        return WindowMasks(None, _mask(_same(numbers, numbers) & band(slots[:, None], slots, window), dtype))
    start, places = numbers[:, :window], slots[:window]
    first = _mask(_same(start, start) & (places <= places[:, None]), dtype)  # [B, 1, w, w]
    blocks = numbers.reshape(batch, -1, window)  # [B, T / w, w]
    queries = blocks[:, 1:].flatten(0, 1)  # [B * blocks, w]
    keys = torch.cat([blocks[:, :-1], blocks[:, 1:]], dim=2).flatten(0, 1)  # [B * blocks, 2w]
    seen = band(slots[window : 2 * window, None], slots[: 2 * window], window)  # [w, 2w]
    return WindowMasks(first, _mask(_same(queries, keys) & seen, dtype))


def _same(queries: Tensor, keys: Tensor) -> Tensor:
    """[B, Q], [B, S] -> [B, 1, Q, S]: whether a query and a key are of one document."""
    return (queries[:, :, None] == keys[:, None, :])[:, None]


def _mask(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)


def attend_packed(q: Tensor, k: Tensor, v: Tensor, packed: Packed, window: int | None, *, dropout: float = 0.0) -> Tensor:
    """Causal attention within documents: q [B, H, T, D], k and v [B, K, T, D] -> [B, H, T, D].

    Args:
        window: tokens that a token sees at most, itself included; None: all of its document before it.
    """
    if packed.whole is None and packed.near is None:
        return _attend_varlen(q, k, v, packed.bounds, window)
    if window is None or packed.near is None or window >= q.size(2):
        return attend(q, k, v, mask=packed.whole, causal=False, dropout=dropout)
    return attend_window(q, k, v, window, masks=packed.near, dropout=dropout)


def _attend_varlen(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, window: int | None) -> Tensor:
    """The same by the kernel for sequences of varying lengths, to which a batch is one row of documents."""
    from torch.nn.attention.varlen import varlen_attn

    batch, heads, time, width = q.shape
    queries, keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [B * T, H or K, D], no copies
    # Its window is what lies before a token, without the token. No document is longer than T, and the kernel needs no more.
    near = (-1 if window is None else window - 1, 0)
    if not _SHARES_HEADS:
        keys, values = expand_heads(keys, heads), expand_heads(values, heads)
    # Older versions do not know the word for shared heads.
    kernel = varlen_attn if keys.size(1) == heads else partial(varlen_attn, enable_gqa=True)
    y = kernel(queries, keys, values, bounds, bounds, time, time, window_size=near)
    assert isinstance(y, Tensor)
    return y.view(batch, time, heads, width).transpose(1, 2)
