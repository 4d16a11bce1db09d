"""Causal scaled dot-product attention: full, in a sliding window or within documents, over heads that may share keys and
values.

Grouped-query attention: Ainslie et al. 2023, arXiv:2305.13245. Sliding windows: Beltagy et al. 2020, arXiv:2004.05150. Where
the length T is a multiple of the window w, each block of w queries is computed with two blocks of keys, itself and the one
before: w * w + (T - w) * 2w scores per head instead of T * T. Other lengths compute all scores and mask them.

Documents: with masks built by `model/document_masks.py` or, on CUDA in 16-bit precision, by FlashAttention's kernel for
sequences of varying lengths (Dao 2023, arXiv:2307.08691), which computes no scores between documents.

Shapes: B batch, H query heads, K key and value heads, T queries, S keys, D channels of a head, w window, N documents.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bardling.model.kernels.cpu_attention import explicit_attention, explicit_attention_compiled
from bardling.model.kernels.select import attention_kernel, shares_heads
from bardling.planning.costs import is_blocked

_VARLEN_SHARES_HEADS = torch.__version__ >= "2.12"  # whether `varlen_attn` takes fewer key and value heads than query heads


class WindowMasks(NamedTuple):
    """Additive masks of a sliding window within documents."""

    first: Tensor | None  # [B, 1, w, w], of the first block; None where attention is not computed in blocks
    rest: Tensor  # [B * blocks, 1, w, 2w], of the other blocks; without blocks, [B, 1, T, T]


class Documents(NamedTuple):
    """The documents of a batch. Masks, absent for the varlen kernel, are 0 where a query sees a key, else minus infinity."""

    bounds: Tensor  # int32 [N + 1], cumulative lengths over all B * T tokens
    positions: Tensor  # int64 [B, T], of each token in its document
    full: Tensor | None  # [B, 1, T, T], for layers without a window
    window: WindowMasks | None  # for layers with one


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = True,
    window: int | None = None,
    documents: Documents | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of q [B, H, T, D] to k, v [B, K, S, D], where H / K neighbouring query heads share a key head: [B, H, T, D].

    A token sees itself and those before it, only the last `window` of these with a window, only those of its own document with
    documents. A mask [B or 1, 1, T, S], true where a query sees a key, or added to the scores if it has the dtype of q,
    replaces all three.
    """
    if documents is not None and documents.full is None and documents.window is None:
        return _varlen_attention(q, k, v, documents.bounds, window)
    if window is not None and window < q.size(2):
        return _window_attention(q, k, v, window, None if documents is None else documents.window, dropout)
    return _full_attention(q, k, v, mask if documents is None else documents.full, causal, dropout)


def reference_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over the keys where `visible` [B or 1, 1, T, S] is true: the reference of `attention`."""
    keys, values = expand_heads(k, q.size(1)), expand_heads(v, q.size(1))
    scores = (q @ keys.mT / math.sqrt(q.size(-1))).masked_fill(~visible, -torch.inf)  # [B, H, T, S]
    return scores.softmax(-1) @ values


def expand_heads(x: Tensor, heads: int) -> Tensor:
    """[N, K, ...] -> [N, `heads`, ...]: each of the K heads repeated for the query heads that share it."""
    return x if x.size(1) == heads else x.repeat_interleave(heads // x.size(1), dim=1)


def within_window(queries: Tensor, keys: Tensor, window: int) -> Tensor:
    """True where the query at a position sees the key at a position; the two broadcast."""
    return (keys <= queries) & (keys > queries - window)


def _full_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout: float) -> Tensor:
    kernel = attention_kernel(q, k, mask, causal and mask is None)
    if kernel == "explicit":
        return explicit_attention(q, k, v, mask, dropout)
    if kernel == "explicit compiled":
        return explicit_attention_compiled(q, k, v, mask, dropout)
    if not shares_heads(q, mask):
        k, v = expand_heads(k, q.size(1)), expand_heads(v, q.size(1))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal and mask is None, enable_gqa=q.size(1) != k.size(1)
    )


def _window_attention(q: Tensor, k: Tensor, v: Tensor, window: int, masks: WindowMasks | None, dropout: float) -> Tensor:
    time = q.size(2)
    positions = torch.arange(time, device=q.device)
    if not is_blocked(time, window):
        mask = within_window(positions[:, None], positions, window) if masks is None else masks.rest
        return _full_attention(q, k, v, mask, False, dropout)
    start = slice(window)
    first = _full_attention(
        q[:, :, start], k[:, :, start], v[:, :, start], masks and masks.first, True, dropout
    )  # [B, H, w, D]
    blocks = time // window - 1
    queries = _split_blocks(q[:, :, window:], blocks)  # [B * blocks, H, w, D]
    keys, values = (  # [B * blocks, K, 2w, D]
        torch.cat([_split_blocks(x[:, :, :-window], blocks), _split_blocks(x[:, :, window:], blocks)], dim=2) for x in (k, v)
    )
    # [w, 2w], or per block
    mask = within_window(positions[window : 2 * window, None], positions[: 2 * window], window) if masks is None else masks.rest
    rest = _full_attention(queries, keys, values, mask, False, dropout)
    rest = rest.view(-1, blocks, *rest.shape[1:]).transpose(1, 2).flatten(2, 3)  # [B, H, blocks * w, D]
    return torch.cat([first, rest], dim=2)


def _split_blocks(x: Tensor, blocks: int) -> Tensor:
    """[B, H, blocks * w, D] -> [B * blocks, H, w, D]"""
    batch, heads, time, width = x.shape
    return x.view(batch, heads, blocks, time // blocks, width).transpose(1, 2).flatten(0, 1)


def _varlen_attention(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, window: int | None) -> Tensor:
    """Attention within documents by the kernel for varying lengths, which sees the batch as one row of documents."""
    from torch.nn.attention.varlen import varlen_attn

    batch, heads, time, width = q.shape
    queries, keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [B * T, H or K, D], no copies
    window_size = (-1 if window is None else window - 1, 0)  # tokens before a token, without itself, and after it
    if not _VARLEN_SHARES_HEADS:
        keys, values = expand_heads(keys, heads), expand_heads(values, heads)
    # Older versions do not have the argument `enable_gqa`.
    kernel = varlen_attn if keys.size(1) == heads else partial(varlen_attn, enable_gqa=True)
    y = kernel(queries, keys, values, bounds, bounds, time, time, window_size=window_size)  # no document is longer than T
    assert isinstance(y, Tensor)
    return y.view(batch, time, heads, width).transpose(1, 2)
