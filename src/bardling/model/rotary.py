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
    """Cosines, and sines with the sign that each half takes: [T, 1, D], or [B, T, 1, D] where rows have positions of their
    own."""

    cos: Tensor
    sin: Tensor


def rotation(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rotation:
    """The turns of `positions` [T] or [B, T]. Angles are float32 (float64 for float64 models) whatever `dtype` is: bfloat16 has
    no room for position 300."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    steps = torch.arange(0, head_dim, 2, device=positions.device).to(wide) / head_dim  # [D/2]
    angles = positions[..., None].to(wide) * (1.0 / theta**steps)  # [..., T, D/2]
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return Rotation(torch.cat([cos, cos], dim=-1)[..., None, :], torch.cat([-sin, sin], dim=-1)[..., None, :])


def rotate(x: Tensor, turn: Rotation) -> Tensor:
    """Turn the heads of x [B, T, H, D]. Queries and keys side by side take little more time than queries alone."""
    turned: Tensor = _Rotate.apply(x, turn.cos, turn.sin)  # type: ignore[no-untyped-call]
    return turned


class _Rotate(torch.autograd.Function):
    """The gradient of a turn is the turn back, so that nothing but the tables is kept for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin)

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        grad = above[0]
        return torch.addcmul(grad * cos, grad.roll(grad.size(-1) // 2, -1), sin, value=-1), None, None
