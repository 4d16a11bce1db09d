"""How a completion is sampled: its settings, and the choice of a token from logits.

The order is that of `transformers`: the repetition penalty and the bias change logits; then come temperature, top_k, top_p (of
what top_k left) and min_p. A token is drawn by inverse transform sampling from a single number, in float64.

`pick` also tells which choices are close: another one would have been made if the logits had been rounded a little
differently. The engine decides those by logits that do not depend on the batch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from bardling.errors import UserError

_MAX_SEED = 2**63


@dataclass(frozen=True)
class Sampling:
    """How one completion is generated."""

    max_new_tokens: int = 256
    """Maximum length (tokens)."""
    temperature: float = 1.0
    """Divides the logits; 0 always takes the most likely token."""
    top_k: int | None = None
    """Sample only from the k most likely tokens (all, if k exceeds the vocabulary)."""
    top_p: float | None = None
    """Sample only from the fewest most likely tokens whose probabilities sum to at least p."""
    min_p: float | None = None
    """Sample only from tokens with at least this fraction of the most likely token's probability."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens that occur in the text so far, and multiplies negative ones (Keskar et al. 2019,
    arXiv:1909.05858)."""
    seed: int = 0
    """Seeds the draws, together with the number of the completion."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these strings."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of tokens, by id."""
    logprobs: int | None = None
    """Report log-probabilities, with those of this many most likely tokens; 0: of the chosen token only; None: none."""

    def __post_init__(self) -> None:
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 0, "must be at least 0"),
            "temperature": (0 <= self.temperature < math.inf, "must be at least 0 and finite (0: greedy)"),
            "top_k": (self.top_k is None or self.top_k >= 1, "must be at least 1"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "must be above 0, at most 1"),
            "min_p": (self.min_p is None or 0 <= self.min_p <= 1, "must be between 0 and 1"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "must be above 0 and finite (1: none)"),
            "seed": (-_MAX_SEED <= self.seed < 2 * _MAX_SEED, "must fit in 64 bits"),
            "stop": (all(self.stop), "must not contain an empty string"),
            "logprobs": (self.logprobs is None or self.logprobs >= 0, "must be at least 0"),
        }
        for name, (is_valid, rule) in checks.items():
            if not is_valid:
                raise UserError(f"{name} = {getattr(self, name)!r}: {rule}")
        for token, bias in self.logit_bias.items():
            if not math.isfinite(bias):
                raise UserError(f"logit_bias of token {token} = {bias}: must be finite (-100 excludes a token)")

    @property
    def filters(self) -> tuple[float, int | None, float | None, float | None]:
        """What rows must have in common to be sampled together."""
        return self.temperature, self.top_k, self.top_p, self.min_p

    @property
    def changes_logits(self) -> bool:
        return self.repetition_penalty != 1 or bool(self.logit_bias)


class Choice(NamedTuple):
    """The chosen tokens of a batch."""

    tokens: list[int]
    close: list[bool]  # whether logits that differ by the tolerance might have led to another token


def adjust(logits: Tensor, sampling: Sampling, seen: Sequence[int]) -> Tensor:
    """Apply repetition penalty and bias to the logits [V] of a text with the tokens `seen`; return a copy."""
    logits = logits.clone()
    if sampling.repetition_penalty != 1:
        ids = torch.tensor(sorted({token for token in seen if token < len(logits)}))
        chosen, penalty = logits[ids], sampling.repetition_penalty
        logits[ids] = torch.where(chosen > 0, chosen / penalty, chosen * penalty)
    for token, bias in sampling.logit_bias.items():
        logits[token] += bias
    return logits


def pick(
    logits: Tensor,
    draws: Sequence[float] | None,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    tolerance: float = 0.0,
) -> Choice:
    """Pick a token of each row of `logits` [B, V], in host memory; settings as in `Sampling`.

    Args:
        draws: one number in [0, 1) per row, which selects by inverse transform sampling; None takes the likeliest token.
        tolerance: largest error of a logit, for `Choice.close`; with 0, no choice is close.

    Raises:
        UserError: the logits of a row are NaN or all infinite.
    """
    if not bool(torch.isfinite(logits.max(dim=-1).values).all()):  # the maximum propagates NaN
        raise UserError("the model's logits are NaN or infinite: its weights are corrupt, or its precision is too low")
    if draws is None or temperature == 0:
        return _likeliest(logits, tolerance)
    ids, dropped = None, None
    top_p = None if top_p == 1 else top_p
    if top_k is not None and top_k < logits.size(-1):
        logits, ids = logits.topk(top_k + 1, dim=-1)  # sorted, likeliest first
        logits, dropped = logits[:, :top_k], logits[:, top_k]
    elif top_p is not None:
        logits, ids = logits.sort(dim=-1, descending=True, stable=True)
    # Subtracting the largest logit first keeps a tiny temperature from computing infinity minus infinity.
    scaled = (logits.double() - logits.max(dim=-1, keepdim=True).values) / temperature
    probabilities = scaled.softmax(dim=-1)
    before = None
    if top_p is not None:
        before = probabilities.cumsum(dim=-1) - probabilities  # of the likelier tokens
        probabilities = probabilities * (before < top_p)
    if min_p:
        probabilities = probabilities * (scaled >= math.log(min_p))
    sums = probabilities.cumsum(dim=-1)  # [B, V or top_k]
    totals = sums[:, -1:]
    points = torch.minimum(totals * torch.tensor(draws, dtype=torch.float64)[:, None], totals.nextafter(torch.zeros(())))
    found = torch.searchsorted(sums, points, right=True)  # the first whose sum exceeds the point, so never one of probability 0
    tokens = (found if ids is None else ids.gather(1, found))[:, 0].tolist()
    if not tolerance:
        return Choice(tokens, [False] * len(tokens))
    close = _close_to_border(points / totals, found, probabilities / totals, sums / totals, min(1.0, tolerance / temperature))
    if ids is not None:  # two tokens of almost equal probability may change places
        neighbours = functional.pad(logits.double(), (1, 1), value=-math.inf).unfold(1, 3, 1)  # [B, V or top_k, 3]
        near = neighbours[torch.arange(len(logits)), found[:, 0]]
        close |= ((near[:, ::2] - near[:, 1:2]).abs() <= tolerance).any(dim=-1)
    if dropped is not None:
        close |= logits[:, -1] - dropped <= tolerance
    if before is not None and top_p is not None:
        close |= ((before - top_p).abs() <= _shift(before, tolerance / temperature)).any(dim=-1)
    if min_p:
        close |= ((scaled - math.log(min_p)).abs() <= tolerance / temperature).any(dim=-1)
    return Choice(tokens, close.tolist())


def _likeliest(logits: Tensor, tolerance: float) -> Choice:
    best, ids = logits.max(dim=-1, keepdim=True)  # the first of equal ones, as elsewhere
    tokens = ids[:, 0].tolist()
    if not tolerance or logits.size(-1) < 2:
        return Choice(tokens, [False] * len(tokens))
    others = logits.scatter(1, ids, -math.inf).amax(dim=-1)  # faster than topk
    return Choice(tokens, (best[:, 0] - others <= tolerance).tolist())


def _close_to_border(points: Tensor, found: Tensor, probabilities: Tensor, sums: Tensor, error: float) -> Tensor:
    """Whether points [B, 1] lie so close to a border of the found tokens [B, 1] that an error of the scaled logits matters."""
    upper = sums.gather(1, found)
    lower = upper - probabilities.gather(1, found)
    close = (points - lower <= _shift(lower, error)) & (lower > 0)
    return (close | ((upper - points <= _shift(upper, error)) & (upper < 1)))[:, 0]


def _shift(border: Tensor, error: float) -> Tensor:
    """How far errors of the scaled logits move a border F between cumulative probabilities: by at most 2 F (1 - F) error if all
    are as unfavourable as possible, but they are independent; measured, less than a quarter of that."""
    return border * (1 - border) * error / 2
