"""Scaled dot-product attention, causal or in a sliding window, over heads that may share keys and values.

Grouped-query attention: Ainslie et al. 2023, arXiv:2305.13245. Sliding windows: Beltagy et al. 2020, arXiv:2004.05150; layers
with and without a window in turn, as in Gemma 2 (arXiv:2408.00118).

A window of w tokens needs only two blocks of keys for each block of w queries: the block itself and the one before. Where the
length T is a multiple of w that is how it is computed, with w * w + (T - w) * 2w scores a head instead of T * T. Other lengths
compute all scores and mask.

Shapes: B batch, H query heads, K key and value heads, T queries, S keys, D channels of a head.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bardling.model.arithmetic import is_blocked
from bardling.model.explicit import attend_explicitly, is_explicit


def attend(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = True, dropout: float = 0.0) -> Tensor:
    """Attention of q [B, H, T, D] to k, v [B, K, S, D], each of the K heads shared by H / K neighbouring query heads.

    Args:
        mask: [B or 1, 1, T, S]: true where a query sees a key; or in the dtype of q, what is added to scores.
        causal: a token sees itself and what is before it; only without a mask.
    """
    plain = mask.dtype == q.dtype and k.size(2) == q.size(2) if mask is not None else causal
    if plain and q.device.type == "cpu" and q.dtype == torch.bfloat16 and is_explicit(q.size(2)):
        return attend_explicitly(q, k, v, mask, dropout)
    if q.is_cuda and (mask is not None or q.dtype == torch.float32):
        # There, only kernels for 16 bits without a mask share heads; others would be left for one that stores all scores.
        k, v = expand_heads(k, q.size(1)), expand_heads(v, q.size(1))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, enable_gqa=q.size(1) != k.size(1)
    )


def expand_heads(x: Tensor, heads: int) -> Tensor:
    """[N, K, ...] -> [N, `heads`, ...]: each of the K heads as often as query heads share it; the same tensor if none do."""
    return x if x.size(1) == heads else x.repeat_interleave(heads // x.size(1), dim=1)


class WindowMasks(NamedTuple):
    """Masks that take the place of a window's own, as `attend` takes them."""

    first: Tensor | None  # [B, 1, w, w], of the first block; None where blocks are not used
    rest: Tensor  # [B * blocks, 1, w, 2w], of the other blocks; or of all at once, [B, 1, T, T]


def attend_window(
    q: Tensor, k: Tensor, v: Tensor, window: int, *, masks: WindowMasks | None = None, dropout: float = 0.0
) -> Tensor:
    """Causal attention of q [B, H, T, D] to k, v [B, K, T, D] in which a token sees itself and the `window` - 1 before it; with
    `masks`, of these those that they allow (the window is then below T)."""
    time = q.size(2)
    if window >= time:
        return attend(q, k, v, dropout=dropout)
    slots = torch.arange(time, device=q.device)
    if not is_blocked(time, window):
        mask = band(slots[:, None], slots, window) if masks is None else masks.rest
        return attend(q, k, v, mask=mask, causal=False, dropout=dropout)
    start = None if masks is None else masks.first
    near = (x[:, :, :window] for x in (q, k, v))
    first = attend(*near, mask=start, causal=start is None, dropout=dropout)  # [B, H, w, D]
    blocks = time // window - 1
    queries = _blocks(q[:, :, window:], blocks)  # [B * blocks, H, w, D]
    keys = torch.cat([_blocks(k[:, :, :-window], blocks), _blocks(k[:, :, window:], blocks)], dim=2)  # [B * blocks, K, 2w, D]
    values = torch.cat([_blocks(v[:, :, :-window], blocks), _blocks(v[:, :, window:], blocks)], dim=2)
    # [w, 2w], or for each block
    mask = band(slots[window : 2 * window, None], slots[: 2 * window], window) if masks is None else masks.rest
    rest = attend(queries, keys, values, mask=mask, causal=False, dropout=dropout)
    rest = rest.view(-1, blocks, *rest.shape[1:]).transpose(1, 2).flatten(2, 3)  # [B, H, blocks * w, D]
    return torch.cat([first, rest], dim=2)


def band(places: Tensor, slots: Tensor, window: int) -> Tensor:
    """True where a query at one of `places` sees the key in one of `slots`; the two broadcast."""
    return (slots <= places) & (slots > places - window)


def _blocks(x: Tensor, blocks: int) -> Tensor:
    """[B, H, blocks * w, D] -> [B * blocks, H, w, D]"""
    batch, heads, time, width = x.shape
    return x.view(batch, heads, blocks, time // blocks, width).transpose(1, 2).flatten(0, 1)
