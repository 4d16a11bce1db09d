"""Linear layers whose three matrix products run in float8: output, gradient of the input, gradient of the weight.

Activations and weights are rounded to e4m3 (4 exponent bits, 3 mantissa bits, up to 448), gradients to e5m2 (up to 57344), as
proposed by Micikevicius et al. 2022 (arXiv:2209.05433). Each tensor is scaled so that its largest entry becomes the format's
largest number. The scale is computed from the tensor at hand, so there is no state between steps, and a resumed run is exact. A
NaN or infinite entry makes the scale and all results NaN, which the guard against bad steps detects.

Weights, gradients, biases and the optimizer stay float32, and results have autocast's dtype, so checkpoints and exports are
unaffected. On CUDA the products are PyTorch's `_scaled_mm` (compute capability 8.9 and newer), whose sizes must be multiples of
16. Layers of other sizes keep the run's precision; missing rows (tokens) are padded with zeros. On other devices the same
float8 numbers are multiplied in float32: equal rounding, for tests.

Limits: the speed has not been measured. There is one scale per tensor: an outlier of x times the rest costs log2(x) bits of
range (e4m3 has about 18 binades).

Shapes: N rows (tokens), I in, O out.
"""

from typing import Any

import torch
from torch import Tensor

from bardling.model.kernels.select import has_wide_products, product_dtype
from bardling.planning.costs import FP8_MULTIPLE

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
_TINY = 1e-12  # replaces a largest entry of zero


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round `x` to float8; return the float8 tensor and a float32 scalar whose product approximates `x`."""
    limit = torch.finfo(dtype).max
    scale = x.abs().amax().float().clamp(min=_TINY) / limit
    # An infinite entry makes the scale infinite, itself NaN and finite entries zero, so overflow is never silent.
    return (x.float() / scale).clamp(-limit, limit).to(dtype).contiguous(), scale


def product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: torch.dtype, *, fast: bool = False) -> Tensor:
    """[M, K] @ [N, K].T of float8 matrices, times both scales: [M, N] in `out`. With `fast`, CUDA accumulates in fewer bits, as
    is usual for outputs, where errors do not add up from layer to layer."""
    if has_wide_products(a):
        return torch._scaled_mm(a, b.t(), scale_a=a_scale, scale_b=b_scale, out_dtype=out, use_fast_accum=fast)
    with torch.autocast(a.device.type, enabled=False):
        return ((a.float() @ b.float().t()) * (a_scale * b_scale)).to(out)


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear(x, weight, bias)` in float8: x [..., I], weight [O, I], bias [O] or None -> [..., O] in the dtype that
    `F.linear` would return."""
    dtype = product_dtype(x)
    flat = x.reshape(-1, x.size(-1))  # [N, I]
    missing = -flat.size(0) % FP8_MULTIPLE
    if missing:
        flat = torch.cat([flat, flat.new_zeros(missing, flat.size(1))])
    y: Tensor = _Linear.apply(flat, weight, dtype)  # type: ignore[no-untyped-call]
    y = (y[:-missing] if missing else y).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias.to(dtype)


class _Linear(torch.autograd.Function):
    """Saves the float8 copies for the backward pass: one byte per number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        x8, x_scale = quantize(x, E4M3)  # [N, I]
        w8, w_scale = quantize(weight, E4M3)  # [O, I]
        ctx.save_for_backward(x8, x_scale, w8, w_scale)
        ctx.dtypes = x.dtype, weight.dtype
        return product(x8, x_scale, w8, w_scale, dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x8, x_scale, w8, w_scale = ctx.saved_tensors
        g8, g_scale = quantize(grads[0], E5M2)  # [N, O]
        # Both operands of a product must be contiguous along the dimension that is summed over.
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = product(g8, g_scale, w8.t().contiguous(), w_scale, ctx.dtypes[0])  # [N, O] @ [I, O].T
        if ctx.needs_input_grad[1]:
            dw = product(g8.t().contiguous(), g_scale, x8.t().contiguous(), x_scale, ctx.dtypes[1])  # [O, N] @ [I, N].T
        return dx, dw, None
