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


@dataclass(frozen=True)
class LossFit:
    """Constants of L(N, D) = E + A / N**alpha + B / D**beta (nats per token)."""

    e: float
    a: float
    b: float
    alpha: float
    beta: float

    def loss(self, n: float, d: float) -> float:
        """Predicted final loss (nats per token) of `n` parameters after `d` tokens."""
        return self.e + self.a / math.pow(n, self.alpha) + self.b / math.pow(d, self.beta)

    def tokens_for(self, n: float) -> float:
        """Compute-optimal number of tokens for a model of `n` parameters.

        At the optimum, alpha * A / N**alpha = beta * B / D**beta.
        """
        return math.pow(self.beta * self.b * math.pow(n, self.alpha) / (self.alpha * self.a), 1 / self.beta)

    def optimum(self, flops: float) -> tuple[float, float]:
        """Parameters and tokens that minimize the loss subject to 6*N*D = `flops` (the paper's equation 4)."""
        _require_budget(flops)
        g = (self.alpha * self.a / (self.beta * self.b)) ** (1 / (self.alpha + self.beta))
        n = g * (flops / 6) ** (self.beta / (self.alpha + self.beta))
        return n, flops / 6 / n


APPROACH_3 = LossFit(e=1.69, a=406.4, b=410.7, alpha=0.34, beta=0.28)

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


@dataclass(frozen=True)
class Optimum:
    """The compute-optimal model for a budget according to one fit."""

    fit: str
    """Name of the fit."""
    parameters: float
    """N, excluding position embeddings."""
    tokens: float
    """D, tokens trained on, without repetition."""
    loss: float
    """Loss that approach 3 predicts for this N and D (nats per token)."""


def chinchilla_optimal(flops: float) -> tuple[Optimum, Optimum]:
    """Return the compute-optimal models for a training budget of `flops` by approach 2 and by approach 3.

    Raises:
        ValueError: the budget is not a positive finite number.
    """
    _require_budget(flops)
    slope, intercept = approach_2_line()
    # D = 10**intercept * N**slope and 6*N*D = C give N directly.
    n2 = math.pow(flops / 6 / math.pow(10, intercept), 1 / (1 + slope))
    d2 = flops / 6 / n2
    n3, d3 = APPROACH_3.optimum(flops)
    return (
        Optimum("Chinchilla, approach 2", n2, d2, APPROACH_3.loss(n2, d2)),
        Optimum("Chinchilla, approach 3", n3, d3, APPROACH_3.loss(n3, d3)),
    )


@dataclass(frozen=True)
class Comparison:
    """A recipe compared with compute-optimal training."""

    parameters: int
    """N, excluding position embeddings and padding."""
    tokens: int
    """D, tokens trained on."""
    flops: float
    """6*N*D, or the budget if one is given."""
    loss: float
    """Loss that approach 3 predicts for the recipe (nats per token)."""
    optima: tuple[Optimum, ...]
    """Compute-optimal N and D for `flops`, by each fit."""
    optimal_tokens: tuple[float, float]
    """Compute-optimal number of tokens for the recipe's N, by approach 2 and by approach 3."""
    steps_in_budget: int | None
    """Number of steps of this recipe within the budget; None without a budget."""

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
        loss=APPROACH_3.loss(n, tokens),
        optima=chinchilla_optimal(flops),
        optimal_tokens=(approach_2_tokens(n), APPROACH_3.tokens_for(n)),
        steps_in_budget=None if budget is None else int(budget // flops_per_step),
    )


def _require_budget(flops: float) -> None:
    if not (math.isfinite(flops) and flops > 0):
        raise ValueError(f"budget = {flops} FLOPs: must be above 0 and finite")
