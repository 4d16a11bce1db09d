"""Loss, perplexity and bits per byte on a fixed set of sequences, divided among the processes.

Sums are float64, so that the result does not depend on how the sequences were divided. Bits per byte divides the loss by the
bytes of the text rather than by its tokens, which makes models with different tokenizers comparable. It leaves out the loss of
tokens without bytes, which mark where documents begin and end: a compressor of the same text does not store that either.

Every process makes the same number of forward passes: one that has no sequences left evaluates the first one with all targets
ignored.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bardling.data.batches import IGNORE
from bardling.data.batches.loader import Batch, SequenceSet
from bardling.distributed.context import SINGLE, Context
from bardling.distributed.device import Precision
from bardling.model.gpt import GPT, evaluation_mode


@dataclass(frozen=True)
class LossResult:
    """How well a model predicts a text."""

    loss: float  # mean over the target tokens (nats)
    bits_per_byte: float | None  # None if the tokenizer, and so the bytes of each token, is unknown
    tokens: int
    bytes: int | None
    sources: Mapping[str, "LossResult"] = field(default_factory=dict)  # of a mixture

    @property
    def perplexity(self) -> float:
        """exp(loss), or infinity where that exceeds a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def weighted_mean(results: Sequence[LossResult], weights: Sequence[float], names: Sequence[str]) -> LossResult:
    """The result on a mixture whose tokens come from the sources in proportion to `weights`, which add up to 1."""
    if len(results) == 1:
        return results[0]
    parts = list(zip(results, weights, strict=True))
    bits_per_byte = None
    if all(result.bits_per_byte is not None for result in results):
        # Bits and bytes for each token of the mixture.
        sizes = [weight * (result.bytes or 0) / result.tokens for result, weight in parts]
        bits = sum(size * (result.bits_per_byte or 0.0) for size, result in zip(sizes, results, strict=True) if size)
        bits_per_byte = bits / sum(sizes) if sum(sizes) else None
    return LossResult(
        sum(weight * result.loss for result, weight in parts if weight),  # a source without weight may have an infinite loss
        bits_per_byte,
        sum(result.tokens for result in results),
        sum(result.bytes or 0 for result in results) or None,
        dict(zip(names, results, strict=True)),
    )


class Interrupted(Exception):  # noqa: N818  not an error: the caller asked for it
    """The evaluation was asked to stop before it finished."""


def evaluate_loss(
    model: GPT,
    sequences: SequenceSet,
    *,
    batch_size: int,
    precision: Precision,
    context: Context = SINGLE,
    bytes_per_token: Tensor | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] | None = None,
) -> LossResult:
    """Measure `model` on all `sequences`; leave the model's mode (training or not) unchanged.

    Args:
        batch_size: sequences per forward pass of one process.
        bytes_per_token: [vocab] UTF-8 bytes of each token, on the device.
        stop_requested: called before each batch. progress: called with (sequences done, sequences in all).

    Raises:
        Interrupted: `stop_requested` returned true in any process.
    """
    # Apple GPUs have no float64, so the sums are in host memory there.
    totals = torch.zeros(4, dtype=torch.float64, device="cpu" if context.device.type == "mps" else context.device)
    stride = batch_size * context.data_size
    with evaluation_mode(model):
        for first in range(0, sequences.n, stride):
            if context.any(stop_requested()):
                raise Interrupted
            batch = _own_batch(sequences, first + context.data_rank * batch_size, batch_size).to(context.device)
            with torch.no_grad(), precision.autocast():
                losses = model(batch.inputs, batch.targets, reduction="none", documents=batch.documents)
            counted = batch.targets != IGNORE
            totals[0] += _wide_sum(losses).to(totals.device)
            totals[1] += counted.sum().to(totals.device)
            if bytes_per_token is not None:
                sizes = bytes_per_token[batch.targets.clamp(min=0)] * counted
                totals[2] += sizes.sum().to(totals.device)
                totals[3] += _wide_sum(torch.where(sizes > 0, losses, 0)).to(totals.device)
            if progress is not None:
                progress(min(first + stride, sequences.n), sequences.n)
    loss_sum, tokens, size_in_bytes, text_loss = context.sum(totals).tolist()
    bits_per_byte = text_loss / math.log(2) / size_in_bytes if size_in_bytes else None
    return LossResult(loss_sum / tokens, bits_per_byte, int(tokens), int(size_in_bytes) or None)


def _wide_sum(losses: Tensor) -> Tensor:
    return losses.double().sum() if losses.device.type != "mps" else losses.sum().cpu().double()


def _own_batch(sequences: SequenceSet, start: int, batch_size: int) -> Batch:
    """Up to `batch_size` sequences from `start` on; past the end, one without targets."""
    if start < sequences.n:
        return sequences.batch(start, min(batch_size, sequences.n - start))
    padding = sequences.batch(0, 1)
    return padding._replace(targets=torch.full_like(padding.targets, IGNORE))
