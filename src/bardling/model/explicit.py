"""Attention by way of its scores, for bfloat16 on a CPU and contexts of a few hundred tokens.

PyTorch's fused kernel keeps no scores, and its backward pass, which computes them anew, is slow with bfloat16 on a CPU: in all
it takes 1.5 to 4 times as long. Here the weights, the softmax of the scores, are kept: 2 bytes for each pair of query and key.

Queries are taken in blocks, each with the keys up to its end. That leaves out most scores of later keys, and pieces stay small
enough to lie in memory that the C library hands out again (`prepare_backend`); whole ones took twice as long at 512 tokens.

Compiled code computes all scores at once, and derives the backward pass itself.

Shapes: B batch, H query heads, K key and value heads, G = H / K heads that share keys, T tokens, D channels of a head; a block
has n queries, which see S keys.
"""

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bardling.model.arithmetic import EXPLICIT_BLOCK, EXPLICIT_LENGTH

_COMPILED_LENGTH = 256
"""Compiled code, which does not take blocks, leaves longer contexts to the fused kernel."""


def is_explicit(time: int) -> bool:
    """Whether scores are computed for a context of this many tokens (of bfloat16 on a CPU)."""
    return time <= (_COMPILED_LENGTH if torch.compiler.is_compiling() else EXPLICIT_LENGTH)


def attend_explicitly(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Attention of q [B, H, T, D] to k and v [B, K, T, D]: causal, or with a mask [B or 1, 1, T, T] that is added to scores."""
    if torch.compiler.is_compiling():
        return _all_at_once(q, k, v, mask, dropout)
    y: Tensor = _InBlocks.apply(q, k, v, mask, dropout)  # type: ignore[no-untyped-call]
    return y


def _all_at_once(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    batch, heads, time, width = q.shape
    shared = heads // k.size(1)
    # Query heads that share keys stand one below the other, so that each group is one matrix product.
    queries = q.reshape(-1, shared * time, width)  # [B * K, G * T, D]
    keys, values = k.reshape(-1, time, width), v.reshape(-1, time, width)  # [B * K, T, D]
    scores = torch.baddbmm(_bias(mask, slice(0, time), time, q, k), queries, keys.transpose(1, 2), alpha=width**-0.5)
    # Autocast would have the softmax read and write float32, though its kernel computes in it anyway.
    with torch.autocast("cpu", enabled=False):
        weights = torch.softmax(scores, dim=-1)  # [B * K, G * T, T]
        weights = F.dropout(weights, dropout) if dropout else weights
        return torch.bmm(weights, values).view(batch, heads, time, width)


class _InBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        batch, heads, time, width = q.shape
        queries = q.reshape(batch * k.size(1), -1, time, width)  # [B * K, G, T, D]
        keys, values = k.reshape(-1, time, width), v.reshape(-1, time, width)  # [B * K, T, D]
        kept, parts = [], []
        with torch.autocast("cpu", enabled=False):
            for block in _blocks(time):
                seen = slice(0, block.stop if mask is None else time)
                bias = _bias(mask, block, seen.stop, q, k)
                scores = torch.baddbmm(bias, _rows(queries, block), keys[:, seen].transpose(1, 2), alpha=width**-0.5)
                weights = torch.softmax(scores, dim=-1)  # [B * K, G * n, S]
                kept.append(weights)
                if dropout:
                    kept.append(torch.empty_like(weights).bernoulli_(1 - dropout).div_(1 - dropout))
                    weights = weights * kept[-1]
                parts.append(
                    torch.bmm(weights, values[:, seen]).view(*queries.shape[:2], -1, queries.size(3))
                )  # [B * K, G, n, D]
        ctx.save_for_backward(queries, keys, values, *kept)
        ctx.heads, ctx.masked, ctx.dropout = (heads, k.size(1)), mask is not None, dropout
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)).view(q.shape)

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, *kept = ctx.saved_tensors
        (heads, kv), time, scale = ctx.heads, keys.size(1), keys.size(2) ** -0.5
        grad = above[0].reshape(queries.shape)
        each = 2 if ctx.dropout else 1
        parts: list[Tensor] = []
        # From the last block on: it sees all keys, so that its share is what the others add to.
        for number, block in reversed(list(enumerate(_blocks(time)))):
            seen = slice(0, time if ctx.masked else block.stop)
            weights, *masks = kept[each * number : each * (number + 1)]
            rows, dy = _rows(queries, block), _rows(grad, block)  # [B * K, G * n, D]
            used = weights * masks[0] if masks else weights
            dweights = torch.bmm(dy, values[:, seen].transpose(1, 2))
            if masks:
                dweights.mul_(masks[0])
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
        shapes = ((-1, count, time, keys.size(2)) for count in (heads, kv, kv))
        return *(d.view(shape) for d, shape in zip((dq, dk, dv), shapes, strict=True)), None, None


def _blocks(time: int) -> list[slice]:
    return [slice(start, min(start + EXPLICIT_BLOCK, time)) for start in range(0, time, EXPLICIT_BLOCK)]


def _rows(x: Tensor, block: slice) -> Tensor:
    """The block's rows of x [N, G, T, D], of heads that share keys one below the other: [N, G * n, D]."""
    return x[:, :, block].flatten(1, 2)


def _bias(mask: Tensor | None, block: slice, seen: int, q: Tensor, k: Tensor) -> Tensor:
    """What is added to the scores of a block's queries and the first `seen` keys: [G * n, S], or [B * K, G * n, S]."""
    rows, kv = block.stop - block.start, k.size(1)
    shared = q.size(1) // kv
    if mask is None:
        make = _future if torch.compiler.is_compiling() else _kept_future
        return make(rows, seen, block.start, shared, q.dtype)
    near = mask[:, None, :, block, :seen]  # [B or 1, 1, 1, n, S]
    return near.expand(q.size(0), kv, shared, -1, -1).reshape(-1, shared * rows, seen)


def _future(rows: int, seen: int, first: int, shared: int, dtype: torch.dtype) -> Tensor:
    """Minus infinity where a key comes after a query, the first of which is number `first`: [G * n, S]."""
    return torch.full((rows, seen), -torch.inf, dtype=dtype).triu(first + 1).repeat(shared, 1)


@lru_cache(maxsize=16)
def _kept_future(rows: int, seen: int, first: int, shared: int, dtype: torch.dtype) -> Tensor:
    """The same, made once for all layers and steps."""
    with torch.inference_mode(False):  # so that training may use what a sample has made
        return _future(rows, seen, first, shared, dtype)
