"""What a training step minimises.

An objective turns a batch into a loss sum. It provides the denominator of that sum in advance: because the denominator of a
step is known before the first forward pass, gradients are exact for every split into processes and forward passes.

A new objective is one file: subclass `Objective` and register a factory (see `extensions.py`).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from bardling.config import TrainConfig
from bardling.data.batches import IGNORE
from bardling.data.batches.loader import Batch
from bardling.data.tokens.tokenizer import Tokenizer
from bardling.extensions import OBJECTIVES


class Forward(Protocol):
    """`GPT.forward`, or its compiled or distributed wrapper."""

    def __call__(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        reduction: Literal["sum", "none"] = "sum",
        documents: Tensor | None = None,
        output: Literal["loss", "logits", "hidden"] | None = None,
        tally: Tensor | None = None,
    ) -> Tensor:
        """Loss of `targets`, logits, or final hidden states of `tokens` [B, T]."""


@dataclass(frozen=True)
class Sums:
    """What one forward pass adds to a step's totals; all are scalars on the device."""

    loss: Tensor  # differentiable
    others: Mapping[str, Tensor] = field(default_factory=dict)  # further sums by name, without gradients


class Objective(ABC):
    """A loss over batches, and what to divide it by."""

    @abstractmethod
    def denominator(self, batch: Batch) -> Tensor:
        """What the loss sum of `batch` is divided by, an int64 scalar on its device; called before any forward pass."""

    @abstractmethod
    def __call__(self, forward: Forward, batch: Batch) -> Sums:
        """Run `forward` on `batch` and return its sums; every batch returns the same names."""

    def per_token(self, forward: Forward, batch: Batch) -> Tensor:
        """Loss [B, T] of each token, which explains bad steps; next-token loss (nats) unless overridden."""
        return forward(batch.inputs, batch.targets, reduction="none", documents=batch.documents)


class NextToken(Objective):
    """Cross-entropy of the next token (nats), summed over all targets; for bits per byte, `text_loss` sums those with bytes.

    Args:
        bytes_per_token: [vocab] UTF-8 bytes of each token, on the device, to report bits per byte; None without a tokenizer.
    """

    def __init__(self, bytes_per_token: Tensor | None = None) -> None:
        self._bytes_per_token = bytes_per_token
        self._text = None if bytes_per_token is None else bytes_per_token > 0

    def denominator(self, batch: Batch) -> Tensor:
        return (batch.targets != IGNORE).sum()

    def __call__(self, forward: Forward, batch: Batch) -> Sums:
        if self._bytes_per_token is None:
            return Sums(forward(batch.inputs, batch.targets, reduction="sum", documents=batch.documents))
        losses = forward(batch.inputs, batch.targets, reduction="sum", documents=batch.documents, tally=self._text)
        size = (self._bytes_per_token[batch.targets.clamp(min=0)] * (batch.targets != IGNORE)).sum()
        return Sums(losses[0], {"bytes": size, "text_loss": losses[1].detach()})


def build_objective(train: TrainConfig, tokenizer: Tokenizer | None, device: torch.device) -> Objective:
    objective: Objective = OBJECTIVES.get("train.objective", train.objective)(tokenizer, device)
    return objective


def next_token(tokenizer: Tokenizer | None, device: torch.device) -> Objective:
    return NextToken(bytes_per_token(tokenizer, device))


def bytes_per_token(tokenizer: Tokenizer | None, device: torch.device) -> Tensor | None:
    """UTF-8 bytes of each token [vocab]; None without a tokenizer."""
    return None if tokenizer is None else torch.from_numpy(tokenizer.bytes_per_token()).to(device)
