"""Compute-optimal model size and number of tokens for a FLOP budget: the fits of the Chinchilla paper.

Method: Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models" (arXiv:2203.15556). With C = 6*N*D FLOPs for N
parameters and D tokens, approach 3 fits the final loss as

    L(N, D) = E + A / N**alpha + B / D**beta        (equation 10; nats per token)

whose minimum at fixed C has a closed form (equation 4). Approach 2 took the best of several models at each of nine budgets;
here a line is fitted through the published optima (table A3) in log-log space.

Limits: treat the two fits as a range; at 1e21 FLOPs they differ by a factor of 1.5 in N, and by more beyond. They are based on
44M to 16B parameters, 6e18 to 3e21 FLOPs, web text and a vocabulary of 32,000; anything else, including byte or character
tokens, is an extrapolation. N counts a tied token embedding once and excludes position embeddings.
"""

import math
from dataclasses import dataclass
from functools import cache

FITTED_FLOPS = (6e18, 3e21)  # the budgets of the paper's runs (its section 3.2)


# Constants of approach 3.
E, A, B, ALPHA, BETA = 1.69, 406.4, 410.7, 0.34, 0.28

# Compute-optimal parameters and tokens by approach 2 (the paper's table A3).
APPROACH_2_POINTS = (
    (400e6, 7.7e9),
    (1e9, 20.0e9),
    (10e9, 219.5e9),
    (67e9, 1.7e12),
    (175e9, 4.3e12),
    (280e9, 7.1e12),
    (520e9, 13.4e12),
    (1e12, 26.5e12),
    (10e12, 292.0e12),
)


@cache
def approach_2_line() -> tuple[float, float]:
    """Slope and intercept of log10(tokens) over log10(parameters): least squares over the nine published optima."""
    xs = [math.log10(n) for n, _ in APPROACH_2_POINTS]
    ys = [math.log10(d) for _, d in APPROACH_2_POINTS]
    mean_x, mean_y = math.fsum(xs) / len(xs), math.fsum(ys) / len(ys)
    slope = math.fsum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    slope /= math.fsum((x - mean_x) ** 2 for x in xs)
    return slope, mean_y - slope * mean_x


def approach_2_tokens(n: float) -> float:
    """Compute-optimal number of tokens for a model of `n` parameters by approach 2."""
    slope, intercept = approach_2_line()
    return math.pow(10, slope * math.log10(n) + intercept)


def approach_3_loss(n: float, d: float) -> float:
    """Final loss (nats per token) of `n` parameters after `d` tokens, predicted by approach 3."""
    return E + A / math.pow(n, ALPHA) + B / math.pow(d, BETA)


def approach_3_tokens(n: float) -> float:
    """Compute-optimal number of tokens for a model of `n` parameters by approach 3.

    At the optimum, alpha * A / N**alpha = beta * B / D**beta.
    """
    return math.pow(BETA * B * math.pow(n, ALPHA) / (ALPHA * A), 1 / BETA)


@dataclass(frozen=True)
class Optimum:
    """The compute-optimal model for a budget according to one fit."""

    fit: str  # its name
    parameters: float  # N, excluding position embeddings
    tokens: float  # D, tokens trained on, without repetition
    loss: float  # predicted by approach 3 (nats per token)


def chinchilla_optimal(flops: float) -> tuple[Optimum, Optimum]:
    """Return the compute-optimal models for a training budget of `flops` by approach 2 and by approach 3.

    Raises:
        ValueError: the budget is not a positive finite number.
    """
    if not (math.isfinite(flops) and flops > 0):
        raise ValueError(f"budget = {flops} FLOPs: must be above 0 and finite")
    slope, intercept = approach_2_line()
    # D = 10**intercept * N**slope and 6*N*D = C give N directly.
    n2 = math.pow(flops / 6 / math.pow(10, intercept), 1 / (1 + slope))
    # Equation 4 minimizes the loss subject to 6*N*D = C.
    g = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA))
    n3 = g * (flops / 6) ** (BETA / (ALPHA + BETA))
    d2, d3 = flops / 6 / n2, flops / 6 / n3
    return (
        Optimum("Chinchilla, approach 2", n2, d2, approach_3_loss(n2, d2)),
        Optimum("Chinchilla, approach 3", n3, d3, approach_3_loss(n3, d3)),
    )


@dataclass(frozen=True)
class Comparison:
    """A recipe compared with compute-optimal training."""

    parameters: int  # N, excluding position embeddings and padding
    tokens: int  # D, tokens trained on
    flops: float  # 6*N*D, or the budget if one is given
    loss: float  # predicted by approach 3 for the recipe (nats per token)
    optima: tuple[Optimum, ...]  # compute-optimal N and D for `flops`, by each fit
    optimal_tokens: tuple[float, float]  # compute-optimal number of tokens for the recipe's N, by each fit
    steps_in_budget: int | None  # number of steps of this recipe within the budget; None without a budget

    @property
    def verdict(self) -> str:
        """How the recipe's number of tokens compares with the compute-optimal one, as the rest of a sentence."""
        low, high = sorted(self.tokens / tokens for tokens in self.optimal_tokens)
        if low > 1.5:
            judgement = "a larger model would use the same compute better (but a small one is cheaper to run)"
        elif high < 1 / 1.5:
            judgement = "a smaller model on more tokens would use the same compute better"
        else:
            judgement = "model and data are in balance"
        scale, unit = (1, "x") if high >= 2 else (100, "% of")
        ratios = [f"{scale * ratio:,.0f}" if scale * ratio >= 9.5 else f"{scale * ratio:.2g}" for ratio in (low, high)]
        return f"trains on {'-'.join(dict.fromkeys(ratios))}{unit} the compute-optimal number of tokens: {judgement}"


def compare(n: int, tokens: int, flops_per_step: float, budget: float | None) -> Comparison:
    """Compare training `n` parameters on `tokens` with the optimum for as many FLOPs, or for the FLOPs in `budget`."""
    flops = 6.0 * n * tokens if budget is None else budget
    return Comparison(
        parameters=n,
        tokens=tokens,
        flops=flops,
        loss=approach_3_loss(n, tokens),
        optima=chinchilla_optimal(flops),
        optimal_tokens=(approach_2_tokens(n), approach_3_tokens(n)),
        steps_in_budget=None if budget is None else int(budget // flops_per_step),
    )
