"""Linear layers: `linear` selects an implementation of `F.linear`, which is the reference for all of them.

- few rows: inference of a few rows with one token each on a CPU, also with a matrix packed for them in advance;
- recast: large matrices under autocast on a CPU, without keeping their 16-bit copy for the backward pass;
- float8: see `fp8.py`.

A tied embedding is two views of one matrix whose gradients are added in place (`tied_views`).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bardling.model.kernels.fp8 import fp8_linear
from bardling.model.kernels.select import few_rows_kernel, is_eager_cpu, linear_kernel, product_dtype


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, fp8: bool = False) -> Tensor:
    """`F.linear`: x [..., in] @ weight [out, in].T + bias [out] -> [..., out]; with `fp8`, passes with gradients use float8."""
    kernel = linear_kernel(x, weight, fp8)
    if kernel == "fp8":
        return fp8_linear(x, weight, bias)
    if kernel == "recast":
        return recast_linear(x, weight, bias)
    if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        weight = weight.to(x.dtype)  # the fixed weights of LoRA may be bfloat16
    return few_rows_linear(x, weight, bias) if kernel == "few rows" else F.linear(x, weight, bias)


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` of x [B, 1, in], computed as (weight @ x.T).T: with few rows this is 1.2 to 2 times as fast on a CPU, because
    the large operand is read in memory order."""
    rows = x[:, 0]  # [B, in]
    onednn = few_rows_kernel(x) == "onednn"
    y = torch.ops.mkldnn._linear_pointwise(weight, rows, None, "none", [], "") if onednn else weight @ rows.t()  # [out, B]
    y = y.t().contiguous()  # the layout that fused attention needs
    return (y if bias is None else y.add_(bias))[:, None]  # [B, 1, out]


def pack(weight: Tensor, rows: int) -> Tensor:
    """A float32 matrix [out, in] on a CPU in the layout that oneDNN reads fastest for products with `rows` rows."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
    return packed


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` of float32 x [..., in] with a matrix made by `pack`; any number of rows."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return y


def recast_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` as autocast computes it, except that the backward pass casts the weight again instead of keeping a copy."""
    return _RecastLinear.apply(x, weight, bias, product_dtype(x))  # type: ignore[no-untyped-call,no-any-return]


class _RecastLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.dtypes = x.dtype, None if bias is None else bias.dtype
        x = x.to(dtype)
        ctx.save_for_backward(x, weight)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (x_dtype, bias_dtype) = ctx.saved_tensors, ctx.dtypes
        (dy,) = grads
        rows = dy.flatten(0, -2)  # [N, out]
        dx = (dy @ weight.to(dy.dtype)).to(x_dtype) if ctx.needs_input_grad[0] else None
        dw = (rows.t() @ x.flatten(0, -2)).to(weight.dtype) if ctx.needs_input_grad[1] else None
        db = rows.sum(0).to(bias_dtype) if bias_dtype is not None and ctx.needs_input_grad[2] else None
        return dx, dw, db, None


def tied_views(weight: Tensor) -> tuple[Tensor | None, Tensor]:
    """The matrix to look tokens up in, or None for the embedding's own, and the matrix of the head, for a tied `weight`.

    Autograd would add the two gradients in a third tensor of the same size, although the lookups' gradient is mostly zero. On a
    CPU these are views whose gradients are added in place; lookups in the first one may then have sparse gradients.
    """
    if not (is_eager_cpu(weight) and torch.is_grad_enabled() and weight.requires_grad):  # compiled code adds them itself
        return None, weight
    return _Tie.apply(weight)  # type: ignore[no-untyped-call,no-any-return]


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return weight.view_as(weight), weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Tensor | None:
        lookups, head = grads
        if lookups is None or head is None:
            return head if lookups is None else lookups.to_dense()
        if lookups.is_sparse:
            return head.index_add_(0, lookups._indices()[0], lookups._values())
        return head.add_(lookups)
