"""Rotary positions: queries and keys are rotated by angles proportional to their position, so scores depend on the distance.

Su et al. 2021, arXiv:2104.09864. Channel i of a head's first half and channel i of its second half are the two coordinates that
are rotated, by position * theta^(-2i/D), as in Llama and `transformers`.

Cosines and sines are computed once per forward pass for all layers. That costs less than a layer norm, and there is no buffer
that could be wrong after a model was created on the meta device, moved or cropped.

Shapes: B batch, T time, H heads, D channels of a head.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """Cosines, and sines with the sign of each half: [T, 1, D], or [B, T, 1, D] where rows have different positions."""

    cos: Tensor
    sin: Tensor


def rotation(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rotation:
    """The rotation for `positions` [T] or [B, T]. Angles are float32 (float64 for float64 models) whatever `dtype` is: bfloat16
    cannot represent position 300."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    steps = torch.arange(0, head_dim, 2, device=positions.device).to(wide) / head_dim  # [D/2]
    angles = positions[..., None].to(wide) * (1.0 / theta**steps)  # [..., T, D/2]
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return Rotation(torch.cat([cos, cos], dim=-1)[..., None, :], torch.cat([-sin, sin], dim=-1)[..., None, :])


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the heads of x [B, T, H, D]. Queries and keys together take little more time than queries alone."""
    return _Rotate.apply(x, rotation.cos, rotation.sin)  # type: ignore[no-untyped-call,no-any-return]


class _Rotate(torch.autograd.Function):
    """The gradient of a rotation is the inverse rotation, so only the tables are saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (cos, sin), (grad,) = ctx.saved_tensors, grads
        return torch.addcmul(grad * cos, grad.roll(grad.size(-1) // 2, -1), sin, value=-1), None, None
