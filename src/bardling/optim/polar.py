"""Polar factors of a batch of matrices, computed with matmuls only.

The polar factor of X = U S V^T is U V^T: the same singular vectors with all singular values 1. An odd polynomial
p(X) = a X + b (X X^T) X + c (X X^T)^2 X changes only the singular values, and a few such steps bring all of them close to 1
(Newton-Schulz; in an optimizer: Jordan et al. 2024, "Muon", https://kellerjordan.github.io/posts/muon/).

The coefficients follow the Polar Express (Amsel et al. 2025, arXiv:2505.16932): each step uses the odd quintic with the
smallest maximum distance from 1 on the interval of singular values that the previous steps leave. No other sequence of as many
quintics has a smaller worst-case error, after any number of steps. They are computed here with the Remez exchange algorithm.

Limits: designed for singular values of at least 0.001 of the Frobenius norm; smaller ones end up below 1. The maximum distance
from 1 is 0.14 after 5 steps (Muon's default), 0.002 after 6 and 1e-9 after 8; bfloat16 adds about 0.01. Not for float16, which
has too few exponent bits.
"""

import functools

import numpy as np
import torch
from torch import Tensor

LOWER = 1e-3
"""Smallest singular value, as a fraction of the Frobenius norm, that the coefficients are designed for."""

SAFETY = 1.02
"""Each step allows for singular values that exceed the expected maximum by this factor because of rounding."""


def quintic(low: float, high: float) -> tuple[float, float, float]:
    """Coefficients (a, b, c) of the odd quintic a x + b x^3 + c x^5 closest to 1 on [low, high], 0 < low < high.

    Its error has equal magnitude and alternating signs at low, the two extrema in between, and high. The Remez exchange solves
    for the polynomial at estimates of these points and moves them to its extrema until they converge.
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
def coefficients(steps: int) -> tuple[tuple[float, float, float], ...]:
    """Coefficients of each step for singular values in [LOWER, 1], rounded so that they are identical on all machines."""
    chosen = []
    low, high = LOWER, 1.0
    for _ in range(steps):
        a, b, c = (round(value, 6) for value in quintic(low, SAFETY * high))
        chosen.append((a, b, c))
        low = a * low + b * low**3 + c * low**5
        high = 2 - low  # the error at the upper end is that at the lower end with opposite sign
    return tuple(chosen)


def newton_schulz(x: Tensor, steps: tuple[tuple[float, float, float], ...]) -> Tensor:
    """Approximate polar factors of the matrices in `x`, of the same dtype; a zero matrix stays zero.

    Args:
        x: [k, m, n], float32 or bfloat16 (float64 in tests); not modified.
        steps: the `coefficients` of each step; as an argument, so that this compiles without graph breaks.
    """
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float32 if x.dtype == torch.bfloat16 else None)
    x = x * (1 / norm.clamp(min=1e-20)).to(x.dtype)
    tall = x.size(-2) > x.size(-1)
    for a, b, c in steps:
        gram = x.mT @ x if tall else x @ x.mT  # [k, s, s] with s = min(m, n)
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b G + c G^2
        x = torch.baddbmm(x, x, factor, beta=a) if tall else torch.baddbmm(x, factor, x, beta=a)  # [k, m, n]
    return x
