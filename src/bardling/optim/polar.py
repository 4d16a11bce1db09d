"""The orthogonal factor of many matrices at once, by matrix products alone.

For X = U S V^T the polar factor is U V^T: the same singular vectors, every singular value 1. An odd polynomial
p(X) = a X + b (X X^T) X + c (X X^T)^2 X acts on the singular values alone, so that a few such steps bring all of them near 1
(Newton-Schulz; in an optimizer: Jordan et al. 2024, "Muon", https://kellerjordan.github.io/posts/muon/).

The coefficients follow the Polar Express (Amsel et al. 2025, arXiv:2505.16932): each step takes the odd quintic whose largest
distance from 1 is least on the interval where the steps before it leave the singular values. No other sequence of as many
quintics comes nearer to 1 in the worst case, wherever it is stopped. They are computed here, by Remez's exchange.

Limits: made for singular values from 0.001 of the Frobenius norm up; smaller ones end below the rest. The largest distance
from 1 is 0.14 after 5 steps (what Muon uses), 0.002 after 6 and 1e-9 after 8; bfloat16 adds about 0.01. Not for
float16, which has too few exponent bits.
"""

import functools

import numpy as np
import torch
from torch import Tensor

LOWER = 1e-3
"""Least singular value, as a part of the Frobenius norm, that the coefficients are made for."""

SAFETY = 1.02
"""Each step is made for singular values up to this much above the expected ones, since rounding may push one higher."""


def quintic(low: float, high: float) -> tuple[float, float, float]:
    """Coefficients (a, b, c) of the odd quintic a x + b x^3 + c x^5 that is nearest to 1 on [low, high], 0 < low < high.

    Its error has the same size and alternating signs at low, the two extrema between, and high; Remez's exchange solves for
    the polynomial at guesses of these points, and moves them to its extrema until they stay.
    """
    inner, outer = (3 * low + high) / 4, (low + 3 * high) / 4
    a = b = c = 0.0
    for _ in range(100):
        x = np.array([low, inner, outer, high])
        system = np.stack([x, x**3, x**5, np.array([1.0, -1.0, 1.0, -1.0])], axis=1)
        a, b, c, _error = np.linalg.solve(system, np.ones(4)).tolist()
        # Extrema: a + 3 b x^2 + 5 c x^4 = 0, with a, c > 0 > b.
        root = max(9 * b * b - 20 * a * c, 0.0) ** 0.5
        moved = (((-3 * b - root) / (10 * c)) ** 0.5, ((-3 * b + root) / (10 * c)) ** 0.5)
        if max(abs(moved[0] - inner), abs(moved[1] - outer)) < 1e-12 * high:
            break
        inner, outer = moved
    return a, b, c


@functools.cache
def coefficients(steps: int, low: float = LOWER, safety: float = SAFETY) -> tuple[tuple[float, float, float], ...]:
    """Coefficients of each of `steps` steps for singular values in [low, 1]; rounded, so that they are alike everywhere."""
    chosen = []
    high = 1.0
    for _ in range(steps):
        a, b, c = (round(value, 6) for value in quintic(low, safety * high))
        chosen.append((a, b, c))
        low = a * low + b * low**3 + c * low**5
        high = 2 - low  # the error's signs alternate, its size is that at the lower end
    return tuple(chosen)


def orthogonalize(x: Tensor, steps: int = 5) -> Tensor:
    """Polar factors of the matrices in `x`, approximately.

    Args:
        x: [k, m, n], float32 or bfloat16 (or float64, in tests); not changed.
        steps: Newton-Schulz steps.

    Returns:
        [k, m, n] of the same dtype; a matrix of zeros stays zeros.
    """
    return newton_schulz(x, coefficients(steps))


def newton_schulz(x: Tensor, steps: tuple[tuple[float, float, float], ...]) -> Tensor:
    """`orthogonalize` with the coefficients of each step given: tensors only, so that it can be compiled whole."""
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float32 if x.dtype == torch.bfloat16 else None)
    x = x * (1 / norm.clamp(min=1e-20)).to(x.dtype)
    tall = x.size(-2) > x.size(-1)
    for a, b, c in steps:
        gram = x.mT @ x if tall else x @ x.mT  # [k, s, s] with s = min(m, n)
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b G + c G^2
        x = torch.baddbmm(x, x, factor, beta=a) if tall else torch.baddbmm(x, factor, x, beta=a)  # [k, m, n]
    return x
