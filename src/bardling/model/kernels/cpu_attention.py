"""Attention with explicit scores, for bfloat16 on a CPU and contexts of a few hundred tokens.

The backward pass of PyTorch's fused kernel computes the scores again, which is slow with bfloat16 on a CPU: forward and
backward together take 1.5 to 4 times as long. The functions here store the attention weights (the softmax of the scores), 2
bytes per pair of query and key. Eager code takes queries in blocks, each with the keys up to its end. That skips most scores of
later keys, and keeps tensors small enough for memory that the C library reuses (`backend` in `distributed/device.py`); whole
ones took twice as long at 512 tokens. Compiled code computes all scores at once and derives the backward pass itself.

Shapes: B batch, H query heads, K key and value heads, G = H / K query heads per key head, T tokens, D channels of a head; a
block has n queries, which see S keys.
"""

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bardling.planning.costs import EXPLICIT_BLOCK


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Attention of q [B, H, T, D] to k and v [B, K, T, D]: causal, or with a mask [B or 1, 1, T, T] that is added to the
    scores."""
    return _BlockAttention.apply(q, k, v, mask, dropout)  # type: ignore[no-untyped-call,no-any-return]


def explicit_attention_compiled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """As `explicit_attention`, written for `torch.compile`."""
    batch, heads, time, width = q.shape
    shared = heads // k.size(1)
    # Query heads that share keys are stacked, so that each group is one matrix product.
    queries = q.reshape(-1, shared * time, width)  # [B * K, G * T, D]
    keys, values = k.reshape(-1, time, width), v.reshape(-1, time, width)  # [B * K, T, D]
    bias = _causal_bias(time, time, 0, shared, q.dtype) if mask is None else _stacked(mask, slice(0, time), q, k)
    scores = torch.baddbmm(bias, queries, keys.transpose(1, 2), alpha=width**-0.5)
    # Autocast would make the softmax read and write float32, although its kernel computes in float32 anyway.
    with torch.autocast("cpu", enabled=False):
        weights = torch.softmax(scores, dim=-1)  # [B * K, G * T, T]
        weights = F.dropout(weights, dropout) if dropout else weights
        return torch.bmm(weights, values).view(batch, heads, time, width)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        batch, heads, time, width = q.shape
        queries = q.reshape(batch * k.size(1), -1, time, width)  # [B * K, G, T, D]
        keys, values = k.reshape(-1, time, width), v.reshape(-1, time, width)  # [B * K, T, D]
        saved, parts = [], []
        with torch.autocast("cpu", enabled=False):
            for block in _blocks(time):
                if mask is None:
                    seen = slice(0, block.stop)
                    bias = _cached_causal_bias(block.stop - block.start, block.stop, block.start, heads // k.size(1), q.dtype)
                else:
                    seen, bias = slice(0, time), _stacked(mask, block, q, k)
                scores = torch.baddbmm(bias, _rows(queries, block), keys[:, seen].transpose(1, 2), alpha=width**-0.5)
                weights = torch.softmax(scores, dim=-1)  # [B * K, G * n, S]
                saved.append(weights)
                if dropout:
                    saved.append(torch.empty_like(weights).bernoulli_(1 - dropout).div_(1 - dropout))
                    weights = weights * saved[-1]
                y = torch.bmm(weights, values[:, seen])  # [B * K, G * n, D]
                parts.append(y.view(*queries.shape[:2], -1, width))  # [B * K, G, n, D]
        ctx.save_for_backward(queries, keys, values, *saved)
        ctx.heads, ctx.masked, ctx.dropout = (heads, k.size(1)), mask is not None, dropout
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)).view(q.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, *saved = ctx.saved_tensors
        (heads, kv_heads), time, scale = ctx.heads, keys.size(1), keys.size(2) ** -0.5
        grad = grads[0].reshape(queries.shape)
        saved_per_block = 2 if ctx.dropout else 1
        parts: list[Tensor] = []
        # The last block comes first: it sees all keys, so the others add to its gradients.
        for number, block in reversed(list(enumerate(_blocks(time)))):
            seen = slice(0, time if ctx.masked else block.stop)
            weights, *dropped = saved[saved_per_block * number : saved_per_block * (number + 1)]
            rows, dy = _rows(queries, block), _rows(grad, block)  # [B * K, G * n, D]
            used = weights * dropped[0] if dropped else weights
            dweights = torch.bmm(dy, values[:, seen].transpose(1, 2))
            if dropped:
                dweights.mul_(dropped[0])
            dscores = torch.ops.aten._softmax_backward_data(dweights, weights, -1, weights.dtype)
            if not parts:
                dv = torch.bmm(used.transpose(1, 2), dy)
                dk = torch.baddbmm(keys, dscores.transpose(1, 2), rows, beta=0, alpha=scale)
            else:
                dv[:, seen].baddbmm_(used.transpose(1, 2), dy)
                dk[:, seen].baddbmm_(dscores.transpose(1, 2), rows, alpha=scale)
            drows = torch.baddbmm(rows, dscores, keys[:, seen], beta=0, alpha=scale)
            parts.append(drows.view(*queries.shape[:2], -1, queries.size(3)))
        dq = parts[0] if len(parts) == 1 else torch.cat(parts[::-1], dim=2)
        shapes = ((-1, count, time, keys.size(2)) for count in (heads, kv_heads, kv_heads))
        return *(d.view(shape) for d, shape in zip((dq, dk, dv), shapes, strict=True)), None, None


def _blocks(time: int) -> list[slice]:
    return [slice(start, min(start + EXPLICIT_BLOCK, time)) for start in range(0, time, EXPLICIT_BLOCK)]


def _rows(x: Tensor, block: slice) -> Tensor:
    """A block's rows of x [N, G, T, D], with the heads that share keys stacked: [N, G * n, D]."""
    return x[:, :, block].flatten(1, 2)


def _stacked(mask: Tensor, block: slice, q: Tensor, k: Tensor) -> Tensor:
    """A block's rows of a mask [B or 1, 1, T, T], repeated for each head: [B * K, G * n, T]."""
    shared = q.size(1) // k.size(1)
    rows = mask[:, None, :, block]  # [B or 1, 1, 1, n, T]
    return rows.expand(q.size(0), k.size(1), shared, -1, -1).reshape(-1, shared * rows.size(3), mask.size(3))


def _causal_bias(rows: int, keys: int, first: int, shared: int, dtype: torch.dtype) -> Tensor:
    """Minus infinity where a key comes after a query, the first of which is at position `first`: [G * n, S]."""
    return torch.full((rows, keys), -torch.inf, dtype=dtype).triu(first + 1).repeat(shared, 1)


# Computed once for all layers and steps, and usable in training even if first computed in inference mode.
_cached_causal_bias = lru_cache(maxsize=16)(torch.inference_mode(False)(_causal_bias))
