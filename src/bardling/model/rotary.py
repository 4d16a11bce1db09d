"""Rotary positions: queries and keys are turned by angles that grow with their place, so that a score depends on the distance.

Su et al. 2021, arXiv:2104.09864. Channel i of a head's first half and channel i of its second half are the two coordinates that
turn, by position * theta^(-2i/D), as Llama and `transformers` lay them out.

The tables of cosines and sines are computed once in each forward pass, from the positions at hand, and shared by all layers:
that costs less than a layer norm, and no buffer can be wrong after a model was made on the meta device, moved or cropped.

Shapes: B batch, T time, H heads, D channels of a head.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """Cosines and sines, [T, 1, D/2], or [B, T, 1, D/2] where rows have positions of their own."""

    cos: Tensor
    sin: Tensor


def rotation(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rotation:
    """The turns of `positions` [T] or [B, T]. Angles are float32 (float64 for float64 models) whatever `dtype` is: bfloat16 has
    no room for position 300."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    steps = torch.arange(0, head_dim, 2, device=positions.device).to(wide) / head_dim  # [D/2]
    angles = positions[..., None].to(wide) * (1.0 / theta**steps)  # [..., T, D/2]
    return Rotation(angles.cos().to(dtype)[..., None, :], angles.sin().to(dtype)[..., None, :])


def rotate(x: Tensor, turn: Rotation) -> Tensor:
    """Turn the heads of x [B, T, H, D]."""
    turned: Tensor = _Rotate.apply(x, turn.cos, turn.sin)  # type: ignore[no-untyped-call]
    return turned


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)  # [B, T, H, D/2]
    return torch.cat([torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)], dim=-1)


class _Rotate(torch.autograd.Function):
    """The gradient of a turn is the turn back, so that nothing but the tables is kept for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turn(above[0], cos, -sin), None, None
