"""Linear layers with int8 weights and bfloat16 activations, for inference: half the memory traffic of bfloat16.

Weights have one scale per output channel and no offset. A few input channels carry activations tens of times as large as the
others, and rounding errors matter most there. Their weights are enlarged before rounding, by the fourth root of how large the
activations are, which are divided by as much (Lin et al. 2023, "AWQ", arXiv:2306.00978). Rounding activations to int8 as well
would cost several percent of perplexity.

For few rows, a kernel of PyTorch converts the weights as it reads them and sums in float32; a row's result does not depend on
its neighbours. Many rows are multiplied faster by a matrix that is converted first.

Limits: no gradients. Shapes: M rows of activations, I input channels, O output channels.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bardling.model.kernels.select import int8_kernel

_LEVELS = 127
_SMALLEST = 1e-4  # magnitude, relative to the usual one, below which channels are alike
_TINY = torch.finfo(torch.float32).tiny


class Int8Weight(NamedTuple):
    """A matrix [O, I], rounded."""

    values: Tensor  # int8 [O, I]
    scale: Tensor  # bfloat16 [O]
    factors: Tensor  # bfloat16 [I], by which activations are multiplied


def quantize(weight: Tensor, magnitudes: Tensor) -> Int8Weight:
    """Round a matrix [O, I] whose input channels have these typical magnitudes [I]."""
    usual = magnitudes.square().mean().sqrt().clamp_min(_TINY)
    factors = (magnitudes / usual).clamp_min(_SMALLEST).pow(-0.25).bfloat16()
    weight = weight.detach().float() / factors
    scale = weight.abs().amax(dim=1).div_(_LEVELS).clamp_min_(_TINY).bfloat16()
    return Int8Weight((weight / scale[:, None]).round_().to(torch.int8), scale, factors)


def int8_linear(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """x [..., I] @ weight.T + bias [O] -> bfloat16 [..., O]."""
    x = x.bfloat16()
    if int8_kernel(x) == "dequantized":
        return reference_int8_linear(x, weight, bias)
    rows = (x.contiguous() * weight.factors).view(-1, x.size(-1))  # [M, I]
    y = torch._weight_int8pack_mm(rows, weight.values, weight.scale)  # [M, O]
    return (y if bias is None else y.add_(bias)).view(*x.shape[:-1], -1)


def reference_int8_linear(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """The same with weights converted to the dtype of x first, and a result in that dtype."""
    matrix = weight.values.to(x.dtype).mul_(weight.scale[:, None])
    return F.linear(x * weight.factors.to(x.dtype), matrix, None if bias is None else bias.to(x.dtype))
