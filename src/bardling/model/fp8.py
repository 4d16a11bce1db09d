"""Linear layers whose three matrix products are computed in float8: output, gradient of the input, gradient of the weight.

Activations and weights become e4m3 (4 bits of exponent, 3 of mantissa, up to 448), gradients e5m2 (up to 57344), as
Micikevicius et al. 2022 (arXiv:2209.05433) propose. Each tensor is scaled before, by what takes its largest entry to the
format's largest number, measured at that moment: nothing has to be remembered from step to step, so that a resumed run goes on
to the bit. A number that is none, or infinite, makes scale and results NaN, which the guard against bad steps sees.

Weights, their gradients, biases and the optimizer stay float32, results have the dtype that autocast asks for: names,
checkpoints and exports know nothing of this. Only passes that make gradients are computed so. Validation and samples are not:
their figures are those of the weights as everybody will use them.

On CUDA the products are PyTorch's `_scaled_mm` (compute capability 8.9 and newer), whose sizes must be multiples of 16. Layers
of other sizes keep the run's precision; missing rows (tokens) are filled up with zeros. Elsewhere products of the same float8
numbers are computed in float32: the same rounding, for tests. (PyTorch's own kernel takes seconds for each on a CPU.)

Limits: not measured on a GPU. One scale for a whole tensor: an outlier of x times the rest costs log2(x) bits of range (e4m3
has about 18 binades).

Shapes: N rows (tokens), I in, O out.
"""

from typing import Any

import torch
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16
"""Sizes of the products must be multiples of this."""
_TINY = 1e-12  # taken for a largest entry of zero


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`x` as (float8 numbers in its shape, a float32 scalar); their product is `x`, rounded."""
    limit = torch.finfo(dtype).max
    scale = x.abs().amax().float().clamp(min=_TINY) / limit
    # Infinite entries make the scale infinite and themselves NaN, finite ones zero: nothing is cut off silently.
    return (x.float() / scale).clamp(-limit, limit).to(dtype).contiguous(), scale


def product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: torch.dtype, *, fast: bool = False) -> Tensor:
    """[M, K] @ [N, K].T of float8 matrices, times both scales: [M, N] in `out`.

    Args:
        fast: let CUDA keep sums in fewer bits, as is usual for outputs, where errors do not add up from layer to layer.
    """
    if a.is_cuda:
        found: Tensor = torch._scaled_mm(a, b.t(), scale_a=a_scale, scale_b=b_scale, out_dtype=out, use_fast_accum=fast)
        return found
    with torch.autocast(a.device.type, enabled=False):
        return ((a.float() @ b.float().t()) * (a_scale * b_scale)).to(out)


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear(x, weight, bias)` in float8: x [..., I], weight [O, I], bias [O] or None -> [..., O].

    The result has autocast's dtype; without autocast that of `x`.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    flat = x.reshape(-1, x.size(-1))  # [N, I]
    missing = -flat.size(0) % MULTIPLE
    if missing:
        flat = torch.cat([flat, flat.new_zeros(missing, flat.size(1))])
    y: Tensor = _Linear.apply(flat, weight, dtype)  # type: ignore[no-untyped-call]
    y = (y[:-missing] if missing else y).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias.to(dtype)


class _Linear(torch.autograd.Function):
    """Keeps the float8 copies for the backward pass: a byte for each number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        x8, x_scale = quantize(x, E4M3)  # [N, I]
        w8, w_scale = quantize(weight, E4M3)  # [O, I]
        ctx.save_for_backward(x8, x_scale, w8, w_scale)
        ctx.dtypes = x.dtype, weight.dtype
        return product(x8, x_scale, w8, w_scale, dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        x8, x_scale, w8, w_scale = ctx.saved_tensors
        g8, g_scale = quantize(above[0], E5M2)  # [N, O]
        # Both operands of a product must lie along the dimension that is summed over.
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = product(g8, g_scale, w8.t().contiguous(), w_scale, ctx.dtypes[0])  # [N, O] @ [I, O].T
        if ctx.needs_input_grad[1]:
            dw = product(g8.t().contiguous(), g_scale, x8.t().contiguous(), x_scale, ctx.dtypes[1])  # [O, N] @ [I, N].T
        return dx, dw, None
