"""Small parts that the model is put together from: linear layers, embeddings and norms.

Linear layers and embeddings leave their memory as it is when they are made: `init_weights` draws every parameter, and drawing
twice costs seconds on large models.

RMSNorm: Zhang and Sennrich 2019, arXiv:1910.07467: x / sqrt(mean(x^2) + eps) * weight. PyTorch's own is one kernel on CUDA and,
compiled, everywhere; uncompiled on a CPU it is a chain of a dozen passes over memory, six times as slow as a layer norm.
There it is written out here: three passes forward, four backward.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bardling.architecture import Architecture
from bardling.model.arithmetic import CAST_AGAIN_ENTRIES
from bardling.model.fp8 import MULTIPLE, fp8_linear


class Linear(nn.Linear):
    fp8 = False  # whether passes that make gradients are computed in float8: `model/fp8.py`

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""

    def forward(self, x: Tensor) -> Tensor:
        if self.fp8 and torch.is_grad_enabled():
            return fp8_linear(x, self.weight, self.bias)
        if is_few(x):
            return few_rows(x, self.weight, self.bias)
        if self.weight.numel() < CAST_AGAIN_ENTRIES or not _casts_on_cpu(x) or torch.compiler.is_compiling():
            return F.linear(x, self.weight, self.bias)
        dtype = torch.get_autocast_dtype("cpu")
        product: Tensor = _LeanLinear.apply(x, self.weight, self.bias, dtype)  # type: ignore[no-untyped-call]
        return product


def _casts_on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype != torch.float64 and torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()


class _LeanLinear(torch.autograd.Function):
    """`F.linear` as autocast computes it, less the narrow copy of the matrix that autocast keeps for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.dtypes = x.dtype, None if bias is None else bias.dtype
        x = x.to(dtype)
        ctx.save_for_backward(x, weight)
        with torch.autocast("cpu", enabled=False):
            return F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (x_dtype, bias_dtype) = ctx.saved_tensors, ctx.dtypes
        grad = above[0]
        rows = grad.flatten(0, -2)  # [N, out]
        dx = (grad @ weight.to(grad.dtype)).to(x_dtype) if ctx.needs_input_grad[0] else None
        dw = (rows.t() @ x.flatten(0, -2)).to(weight.dtype) if ctx.needs_input_grad[1] else None
        db = rows.sum(0).to(bias_dtype) if bias_dtype is not None and ctx.needs_input_grad[2] else None
        return dx, dw, db, None


def use_fp8(blocks: nn.Module, wanted: bool = True) -> None:
    """Have the linear layers within `blocks` compute in float8, where that is wanted and their sizes allow it."""
    for module in blocks.modules():
        if isinstance(module, Linear):
            module.fp8 = wanted and not (module.in_features % MULTIPLE or module.out_features % MULTIPLE)


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Leave the memory as it is."""


def tie(table: Tensor) -> tuple[Tensor, Tensor]:
    """`table` for lookups, whose gradient may be sparse, and `table` for a head. Their gradients are added in place: autograd's
    own sum of the two would be a third tensor of the table's size, beside a gradient of the lookups that is mostly zeros."""
    tied: tuple[Tensor, Tensor] = _Tie.apply(table)  # type: ignore[no-untyped-call]
    return tied


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return table.view_as(table), table.view_as(table)

    @staticmethod
    def backward(ctx: Any, *above: Tensor | None) -> Tensor | None:
        lookups, head = above
        if lookups is None or head is None:
            return head if lookups is None else lookups.to_dense()
        if lookups.is_sparse:
            return head.index_add_(0, lookups._indices()[0], lookups._values())
        return head.add_(lookups)


def is_few(x: Tensor) -> bool:
    """Whether `x` is one token of each of 7 to 32 rows in inference on a CPU, where `few_rows` is faster."""
    return not torch.is_grad_enabled() and x.dim() == 3 and x.size(1) == 1 and 7 <= x.size(0) <= 32 and _is_cpu_float32(x)


def _is_cpu_float32(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


def few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` for x [B, 1, in] as the transpose of weight @ x.T: with few rows about 1.5 times as fast on a CPU, because
    the large operand is then read in the order in which it lies."""
    columns = x[:, 0].t()  # [in, B]
    product = weight @ columns if bias is None else torch.addmm(bias[:, None], weight, columns)  # [out, B]
    return product.t()[:, None]  # [B, 1, out]


class RMSNorm(nn.Module):
    """RMSNorm over the last `width` channels, with a learned weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def make_norm(made: Architecture) -> nn.Module:
    """The norm of the residual stream."""
    if made.norm == "rmsnorm":
        return RMSNorm(made.n_embd, made.norm_eps)
    return nn.LayerNorm(made.n_embd, eps=made.norm_eps, bias=made.bias)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x [..., C] over the root of its mean square along C, times `weight`: [C], or [R, C] for x [..., R, C].

    Its dtype is that of x; on a CPU under autocast, whose matrix products would round it to theirs at once, that.
    """
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        casts = torch.is_autocast_enabled("cpu") and x.dtype != torch.float64
        dtype = torch.get_autocast_dtype("cpu") if casts else x.dtype
        normed: Tensor = _RMSNorm.apply(x, weight, eps, dtype)  # type: ignore[no-untyped-call]
        return normed
    with torch.autocast("cuda", enabled=False):  # it would widen the result
        if weight is None or weight.dim() == 1:
            return F.rms_norm(x, (x.size(-1),), None if weight is None else weight.to(x.dtype), eps)
        return F.rms_norm(x, (x.size(-1),), None, eps) * weight.to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """RMSNorm in few passes over memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # once: every operator would do it again
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)  # [..., 1]
        scale = norm.square_().div_(x.size(-1)).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        # Products are wide, and rounded once.
        if weight is None:
            return torch.mul(wide, scale, out=x.new_empty(x.shape, dtype=dtype))
        scaled = wide * scale if wide is x else wide.mul_(scale)
        return torch.mul(scaled, weight, out=x.new_empty(x.shape, dtype=dtype))

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        # With y = x s w and s = (mean(x^2) + eps)^(-1/2), the gradients are sum(g x s) for w, over all rows, and for x
        # s (g w - x s^2 mean(g x w)). What both need of the rows, g x, is computed once; the sums are matrix products.
        x, weight, scale = ctx.saved_tensors
        width, rows = x.size(-1), 1 if weight is None or weight.dim() == 1 else weight.size(0)
        grad, wide = above[0].to(scale.dtype), x.to(scale.dtype)
        shared = (grad * wide).view(-1, rows, width).transpose(0, 1)  # [R, N, C]
        gain = x.new_ones(width, dtype=scale.dtype) if weight is None else weight.to(scale.dtype)
        dw = dx = None
        if weight is not None and ctx.needs_input_grad[1]:
            dw = (scale.view(-1, rows).t().unsqueeze(1) @ shared).view(weight.shape).to(weight.dtype)  # [R, 1, N] @ [R, N, C]
        if ctx.needs_input_grad[0]:
            sums = (shared @ gain.expand(rows, width).unsqueeze(-1)).transpose(0, 1).reshape(scale.shape)  # [..., 1]
            sums.mul_(scale).mul_(scale).div_(-width)
            dx = torch.addcmul(grad * gain, wide, sums).mul_(scale).to(x.dtype)
        return dx, dw, None, None


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up of x [..., 2 F], whose halves are gate and up: Shazeer 2020, arXiv:2002.05202."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        gated: Tensor = _SwiGLU.apply(x)  # type: ignore[no-untyped-call]
        return gated
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    """Keeps its input only, and writes the gradients of both halves where they belong, instead of joining them later."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        dx = torch.empty_like(x)
        dgate, dup = dx.chunk(2, dim=-1)
        torch.mul(F.silu(gate), above[0], out=dup)
        torch.ops.aten.silu_backward.grad_input(above[0] * up, gate, grad_input=dgate)
        return dx


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2: So et al. 2021, arXiv:2109.08668."""
    squared: Tensor = _SquaredReLU.apply(x)  # type: ignore[no-untyped-call]
    return squared


class _SquaredReLU(torch.autograd.Function):
    """Its slope, 2 max(x, 0), needs no mask: one pass where autograd, through a power, takes several."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = F.relu(x)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        slope: Tensor = (above[0] * positive).mul_(2)
        return slope
