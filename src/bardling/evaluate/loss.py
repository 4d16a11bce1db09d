"""Loss, perplexity and bits per byte on a fixed set of windows, shared out over the processes.

Sums are kept in float64, so that the figure does not depend on how the windows were divided. Bits per byte divides the
loss by the bytes of the text rather than by its tokens, which makes models with different tokenizers comparable. Windows that
keep documents apart (`data.document_mask`) are measured so.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bardling.data.loader import IGNORE, Batch
from bardling.distributed.context import SINGLE, Context
from bardling.distributed.device import Precision
from bardling.model.gpt import GPT


class Windows(Protocol):
    """A fixed set of `n` windows, such as `EvalWindows`."""

    n: int

    def batch(self, first_sample: int, size: int) -> Batch:
        """Some windows: inputs and targets [size, time]."""


@dataclass(frozen=True)
class LossResult:
    """What a model makes of a text."""

    loss: float  # mean over the target tokens (nats)
    bits_per_byte: float | None  # None when the tokenizer, and so the bytes of a token, is unknown
    tokens: int
    bytes: int | None

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite when that is too large for a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


class Interrupted(Exception):  # noqa: N818  not an error: the caller asked for it
    """The evaluation was asked to stop before it was done."""


def evaluate_loss(
    model: GPT,
    windows: Windows,
    *,
    batch_size: int,
    precision: Precision,
    context: Context = SINGLE,
    bytes_per_token: Tensor | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] | None = None,
) -> LossResult:
    """Measure `model` on all `windows`; the model's mode (training or not) is left as it was.

    Args:
        batch_size: windows in a forward pass of one process.
        bytes_per_token: [vocab] UTF-8 bytes of each token, on the device.
        stop_requested: asked before each batch.
        progress: called with (windows done, windows in all).

    Raises:
        Interrupted: `stop_requested`, in any process.
    """
    was_training = model.training
    model.eval()
    # float64 does not exist on Apple GPUs; the sums are therefore kept in host memory there.
    totals = torch.zeros(3, dtype=torch.float64, device="cpu" if context.device.type == "mps" else context.device)
    stride = batch_size * context.world_size
    try:
        for first in range(0, windows.n, stride):  # every process makes the same number of turns
            if context.any(stop_requested()):
                raise Interrupted
            start = first + context.rank * batch_size
            size = min(batch_size, windows.n - start)
            if size > 0:
                batch = windows.batch(start, size).to(context.device)
                inputs, targets = batch.inputs, batch.targets
                with torch.no_grad(), precision.autocast():
                    losses = model(inputs, targets, reduction="none", **batch.known())
                counted = targets != IGNORE
                totals[0] += (
                    losses.double().sum().to(totals.device) if losses.device.type != "mps" else losses.sum().cpu().double()
                )
                totals[1] += counted.sum().to(totals.device)
                if bytes_per_token is not None:
                    totals[2] += (bytes_per_token[targets.clamp(min=0)] * counted).sum().to(totals.device)
            if progress is not None:
                progress(min(first + stride, windows.n), windows.n)
    finally:
        model.train(was_training)
    loss_sum, tokens, size_in_bytes = context.sum(totals).tolist()
    loss = loss_sum / tokens
    if bytes_per_token is None or not size_in_bytes:
        return LossResult(loss, None, int(tokens), None)
    return LossResult(loss, loss_sum / math.log(2) / size_in_bytes, int(tokens), int(size_in_bytes))
