"""How large a model, and how many tokens, for a budget of arithmetic: the fits of the Chinchilla paper.

Method: Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models" (arXiv:2203.15556). With C = 6*N*D FLOPs for N
parameters and D tokens, approach 3 fits the final loss as

    L(N, D) = E + A / N**alpha + B / D**beta        (equation 10; nats per token)

whose minimum at fixed C has a closed form (equation 4). Approach 2 took the best of several models at each of nine budgets;
here a line is put through the optima that it published (table A3) in log-log space.

Limits: read the two fits as a range; at 1e21 FLOPs they are apart by a factor of 1.5 in N, and further beyond. They were made
on 44M to 16B parameters and 6e18 to 3e21 FLOPs, web text and a vocabulary of 32,000. Elsewhere, and for byte or character
tokens, they are extrapolation. N counts a tied token embedding once and leaves positions out.
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
        """Tokens at which a model of `n` parameters is the best use of its own budget.

        At the optimum alpha * A / N**alpha = beta * B / D**beta.
        """
        return math.pow(self.beta * self.b * math.pow(n, self.alpha) / (self.alpha * self.a), 1 / self.beta)

    def optimum(self, flops: float) -> tuple[float, float]:
        """Parameters and tokens with the least loss among all with 6*N*D = `flops` (the paper's equation 4)."""
        _require_budget(flops)
        g = (self.alpha * self.a / (self.beta * self.b)) ** (1 / (self.alpha + self.beta))
        n = g * (flops / 6) ** (self.beta / (self.alpha + self.beta))
        return n, flops / 6 / n


APPROACH_3 = LossFit(e=1.69, a=406.4, b=410.7, alpha=0.34, beta=0.28)

# Parameters and tokens that approach 2 estimates to be optimal (the paper's table A3).
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
    """Slope and intercept of log10(tokens) over log10(parameters): least squares through the nine published optima."""
    xs = [math.log10(n) for n, _ in APPROACH_2_POINTS]
    ys = [math.log10(d) for _, d in APPROACH_2_POINTS]
    mean_x, mean_y = math.fsum(xs) / len(xs), math.fsum(ys) / len(ys)
    slope = math.fsum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    slope /= math.fsum((x - mean_x) ** 2 for x in xs)
    return slope, mean_y - slope * mean_x


def approach_2_tokens(n: float) -> float:
    """Optimal tokens for a model of `n` parameters, on approach 2's line."""
    slope, intercept = approach_2_line()
    return math.pow(10, slope * math.log10(n) + intercept)


@dataclass(frozen=True)
class Optimum:
    """What one fit calls the best use of a budget."""

    fit: str
    """Name of the fit."""
    parameters: float
    """N, positions left out."""
    tokens: float
    """D, tokens seen in training, each new."""
    loss: float
    """What approach 3's fit predicts for this N and D (nats per token)."""


def chinchilla_optimal(flops: float) -> tuple[Optimum, Optimum]:
    """Return the optimum for a training budget of `flops` by approach 2 and by approach 3.

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


def _require_budget(flops: float) -> None:
    if not (math.isfinite(flops) and flops > 0):
        raise ValueError(f"a budget of {flops} FLOPs: must be above 0 and finite")


def chinchilla_parameters(*, n_layer: int, d_model: int, ffw_size: int, vocab_size: int = 32_000) -> int:
    """Parameters of a model of the paper's family (their table A9), its output layer counted and its input embedding not.

    Unlike GPT-2 these models have relative positions: a projection of width d_model and two biases in each block.
    """
    attention = 5 * d_model * d_model + 6 * d_model  # query, key, value, output (with biases), relative keys and two biases
    mlp = 2 * d_model * ffw_size + ffw_size + d_model
    norms = 4 * d_model
    return n_layer * (attention + mlp + norms) + 2 * d_model + d_model * vocab_size


def chinchilla_flops(*, n_layer: int, n_head: int, d_model: int, ffw_size: int, context: int = 2048) -> int:
    """FLOPs to train the paper's family on one sequence, as its table A4 counts them (appendix F).

    The list in appendix F also has the embedding and the logits; the figures of table A4 come out only without them.
    """
    projections = 2 * context * 4 * d_model * d_model
    attention = 2 * 2 * context * context * d_model
    softmax = 3 * n_head * context * context
    mlp = 2 * 2 * context * d_model * ffw_size
    return 3 * n_layer * (projections + attention + softmax + mlp)
