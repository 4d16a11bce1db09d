"""Linear layers with int8 weights, for inference: half the memory traffic of bfloat16, a quarter of that of float32.

Weights: one scale per output channel, no offset. A row's rounding errors are alike in all input channels, but a few channels
carry activations tens of times as large as the others (Dettmers et al. 2022, "LLM.int8()", arXiv:2208.07339), and there errors
matter most. The columns of the largest sixteenth are therefore stored twice: rounded, and what rounding left in steps that are
254 times as fine.

Activations: rounding them to int8 costs several percent of perplexity. Each row is split in the same way into a coarse and a
fine int8 number, 15 bits together, and oneDNN multiplies both with the same weights by the int8 instructions of the CPU.
Reading the weights takes most of the time, so the second product is almost free.

Limits: no gradients. Shapes: M rows of activations, I input channels, K of which are stored twice, O output channels.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bardling.model.kernels.select import int8_kernel

_LEVELS = 127
_FINE = 2 * _LEVELS  # fine steps in a coarse one; a remainder is at most half a coarse step
_STEPS = torch.tensor([[[_LEVELS]], [[_LEVELS * _FINE]]], dtype=torch.float32)  # of the coarse and the fine number
_TWICE = 16  # one column in so many is stored twice
_TINY = torch.finfo(torch.float32).tiny


class Int8Weight(NamedTuple):
    """A matrix [O, I], rounded."""

    values: Tensor  # int8 [O, I + K]: coarse values, then fine ones; in oneDNN's own layout if `zeros` is given
    scale: Tensor  # float32 [O], of the coarse values
    twice: Tensor  # int64 [K], the columns that have fine values
    zeros: Tensor | None  # int64 [O], offsets of the values, for oneDNN


def quantize(weight: Tensor, magnitudes: Tensor) -> Int8Weight:
    """Round a matrix [O, I] whose input channels have these typical magnitudes [I], for the kernel that `select.py` chooses."""
    weight = weight.detach().float()
    scale = weight.abs().amax(dim=1).div_(_LEVELS).clamp_min_(_TINY)
    exact = weight / scale[:, None]
    coarse = exact.round()
    twice = magnitudes.topk(len(magnitudes) // _TWICE).indices.sort().values
    fine = (exact - coarse)[:, twice].mul_(_FINE).round_()
    values = torch.cat([coarse, fine], dim=1).to(torch.int8)
    if int8_kernel(values) == "dequantized":
        return Int8Weight(values, scale, twice, None)
    return Int8Weight(torch.ops.onednn.qlinear_prepack(values, None), scale, twice, torch.zeros_like(scale, dtype=torch.int64))


def int8_linear(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """x [..., I] @ weight.T + bias [O] -> [..., O], in the dtype of x."""
    if weight.zeros is None:
        return reference_int8_linear(x, weight, bias)
    rows = x.reshape(-1, x.size(-1)).float()  # [M, I]
    rows = torch.cat([rows, rows.index_select(1, weight.twice).mul_(1 / _FINE)], dim=1)  # [M, I + K]
    largest = torch.linalg.vector_norm(rows, torch.inf, dim=-1, keepdim=True).clamp_min_(_TINY)  # [M, 1]
    pair = (rows / largest * _STEPS).round_()  # [2, M, I + K]
    pair[1].sub_(pair[0], alpha=_FINE)  # what the coarse number leaves
    activations = pair.to(torch.int8).flatten(0, 1)
    unscaled, output = (1.0, 0), (None, 1.0, 0, torch.float32, "none", (), "")
    y = torch.ops.onednn.qlinear_pointwise(activations, *unscaled, weight.values, weight.scale, weight.zeros, *output)
    coarse, fine = y.chunk(2)
    y = torch.add(coarse, fine, alpha=1 / _FINE).mul_(largest / _LEVELS)  # [M, O]
    if bias is not None:
        y += bias
    return y.view(*x.shape[:-1], -1).to(x.dtype)


def reference_int8_linear(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """The same with dequantized weights: for values [O, I] in the usual layout."""
    columns = weight.values[:, : x.size(-1)].float()
    columns[:, weight.twice] += weight.values[:, x.size(-1) :] / _FINE
    dequantized = (columns * weight.scale[:, None]).to(x.dtype)
    return F.linear(x, dequantized, None if bias is None else bias.to(x.dtype))
