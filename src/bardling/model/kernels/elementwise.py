"""RMSNorm, SwiGLU and squared ReLU in few passes over memory, next to their plain references.

RMSNorm: Zhang and Sennrich 2019, arXiv:1910.07467: x / sqrt(mean(x^2) + eps) * weight. PyTorch's own is one kernel on CUDA and
in compiled code. Eager on a CPU it is a chain of a dozen passes, six times as slow as a layer norm; the version here takes
three passes forward and four backward. SwiGLU: Shazeer 2020, arXiv:2002.05202. Squared ReLU: So et al. 2021, arXiv:2109.08668.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bardling.model.kernels.select import is_eager_cpu, product_dtype


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm of x [..., C] over C, with a weight [C], or [R, C] for x [..., R, C].

    The result has the dtype of `x`, or eager on a CPU autocast's, to which the next product would round it anyway.
    """
    if not is_eager_cpu(x):
        return plain_rms_norm(x, weight, eps)
    return _RMSNorm.apply(x, weight, eps, product_dtype(x))  # type: ignore[no-untyped-call,no-any-return]


def plain_rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The reference: PyTorch's RMSNorm."""
    with torch.autocast(x.device.type, enabled=False):  # autocast would widen the result
        if weight is None or weight.dim() == 1:
            return F.rms_norm(x, (x.size(-1),), None if weight is None else weight.to(x.dtype), eps)
        return F.rms_norm(x, (x.size(-1),), None, eps) * weight.to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # converted once: each operator below would convert it again
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)  # [..., 1]
        scale = norm.square_().div_(x.size(-1)).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        # Products are in float32 and rounded once.
        if weight is None:
            return torch.mul(wide, scale, out=x.new_empty(x.shape, dtype=dtype))
        scaled = wide * scale if wide is x else wide.mul_(scale)
        return torch.mul(scaled, weight, out=x.new_empty(x.shape, dtype=dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # With y = x s w and s = (mean(x^2) + eps)^(-1/2), the gradient of w is sum(g x s) over all rows, and that of x is
        # s (g w - x s^2 mean(g x w)). Both need g x, which is computed once; the sums are matrix products.
        x, weight, scale = ctx.saved_tensors
        width, rows = x.size(-1), 1 if weight is None or weight.dim() == 1 else weight.size(0)
        grad, wide = grads[0].to(scale.dtype), x.to(scale.dtype)
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
    """silu(gate) * up, where the halves of x [..., 2 F] are gate and up."""
    if is_eager_cpu(x):
        return _SwiGLU.apply(x)  # type: ignore[no-untyped-call,no-any-return]
    return plain_swiglu(x)


def plain_swiglu(x: Tensor) -> Tensor:
    """The reference."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    """Saves only its input, and writes both halves of the gradient in place instead of concatenating them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,), (dy,) = ctx.saved_tensors, grads
        gate, up = x.chunk(2, dim=-1)
        dx = torch.empty_like(x)
        dgate, dup = dx.chunk(2, dim=-1)
        torch.mul(F.silu(gate), dy, out=dup)
        torch.ops.aten.silu_backward.grad_input(dy * up, gate, grad_input=dgate)
        return dx


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2."""
    return _SquaredReLU.apply(x)  # type: ignore[no-untyped-call,no-any-return]


def plain_squared_relu(x: Tensor) -> Tensor:
    """The reference."""
    return F.relu(x).square()


class _SquaredReLU(torch.autograd.Function):
    """The slope, 2 max(x, 0), needs no mask: one pass instead of the several that autograd takes through a power."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = F.relu(x)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (positive,), (dy,) = ctx.saved_tensors, grads
        return (dy * positive).mul_(2)  # type: ignore[no-any-return]
