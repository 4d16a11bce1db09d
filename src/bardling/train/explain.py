"""What lies behind a bad step: its worst windows with the documents that they came from, and the tensors that it upset.

The step's windows are run through the model once more, forward only, and judged by the loss of each token: a window with a
loss that is no number comes first, else the one with the highest loss; within it the document in which the first such
token lies, else the one that adds most to the loss. The weights are those before the bad update, which was left out. Gradients
are the step's own where they are still there; on a GPU, where they have been overwritten, those of the worst window.

Limits: dropout is off, so a loss is not exactly the step's. When every window is fine now, the event says so: then it was the
machine, or the split into processes, rather than the data.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bardling.data.documents import Document
from bardling.data.loader import TrainWindows, cut
from bardling.data.order import WindowOrder
from bardling.data.shards import TokenDataset
from bardling.data.skips import Range
from bardling.distributed.device import Precision
from bardling.errors import UserError
from bardling.train.state import TrainState
from bardling.train.trace import SeenWindow, Tracer

_WINDOWS = 3  # that an event names
_TENSORS = 5


class Explainer:
    """Explains bad steps of one run; only the primary process has one.

    Args:
        order: of the data, before anything is passed over.
        micro_batch: windows in a forward pass.
        document_start: token that opens a document, where documents are kept apart.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        order: WindowOrder,
        *,
        device: torch.device,
        precision: Precision,
        micro_batch: int,
        document_start: int | None = None,
    ) -> None:
        self._source, self._tracer = TrainWindows(dataset.split("train"), order, document_start), Tracer(dataset, order)
        self._device, self._precision, self._micro_batch = device, precision, micro_batch

    def windows(self, state: TrainState, ranges: list[Range], context: int | None = None) -> list[dict[str, Any]]:
        """The worst windows of `ranges` of the order, worst first, read in pieces of `context` tokens (absent: whole)."""
        found: list[tuple[float, int, Tensor]] = []
        training = state.model.training
        state.model.eval()
        with torch.no_grad():
            for first, count in ranges:
                for begin in range(first, first + count, self._micro_batch):
                    losses = self._losses(state, begin, min(self._micro_batch, first + count - begin), context).float().cpu()
                    for row, sample in zip(losses, range(begin, first + count), strict=False):
                        mean = row.mean().item()
                        found.append((mean if math.isfinite(mean) else math.inf, sample, row))
        state.model.train(training)
        found.sort(key=lambda item: (-item[0], item[1]))
        return [self._describe(sample, row) for _, sample, row in found[:_WINDOWS]]

    def _losses(self, state: TrainState, first: int, count: int, context: int | None, reduction: str = "none") -> Tensor:
        """[count, block_size], or their sum."""
        whole = self._source.batch(first, count).to(self._device)
        batch = cut(whole, context or whole.inputs.size(1))
        with self._precision.autocast():
            losses: Tensor = state.model(batch.inputs, batch.targets, reduction=reduction, **batch.known())
        return losses.reshape(whole.inputs.shape) if reduction == "none" else losses

    def _describe(self, sample: int, losses: Tensor) -> dict[str, Any]:
        """`losses`: [block_size], of the window's targets."""
        entry: dict[str, Any] = {"sample": sample, "loss": losses.mean().item()}
        try:
            (window,) = self._tracer.windows([(sample, 1)])
        except UserError as error:
            return {**entry, "note": str(error)}
        bad = ~torch.isfinite(losses)
        # What spoils a loss is among the tokens that were read up to there.
        spoiled = window.start + int(bad.int().argmax())
        document = _containing(window, spoiled) if bad.any() else _heaviest(window, losses)
        return {
            **entry,
            "start": window.start,
            "file": window.file,
            "place": window.place,
            "document": {
                "begin": document.begin,
                "end": document.end,
                **({} if document.number is None else {"number": document.number, "name": document.name}),
            },
            "documents": len(window.documents),
        }

    def tensors(self, state: TrainState, worst: int | None, context: int | None = None) -> list[dict[str, Any]]:
        """The tensors with the largest gradients; those with entries that are no numbers first, in the model's order.

        Args:
            worst: sample whose gradient is taken; None for the gradients that are there.
        """
        named = [(name, p) for name, p in state.model.named_parameters() if p.requires_grad]
        if worst is None:
            gradients = [p.grad for _, p in named]
        else:
            # Not `backward`, which would start the exchange with other processes.
            loss = self._losses(state, worst, 1, context, "sum") / self._tracer.block_size
            gradients = list(torch.autograd.grad(loss, [p for _, p in named], allow_unused=True))
        entries = []
        for (name, parameter), gradient in zip(named, gradients, strict=True):
            weight = parameter.detach().float()
            wrong = 0 if gradient is None else int((~torch.isfinite(gradient)).sum())
            entry: dict[str, Any] = {
                "name": name,
                "grad_norm": 0.0 if gradient is None else gradient.float().norm().item(),
                "nonfinite": wrong,
                "weight_rms": weight.square().mean().sqrt().item(),
            }
            if spoiled := int((~torch.isfinite(weight)).sum()):
                entry["weight_nonfinite"] = spoiled
            entries.append(entry)
        entries.sort(key=lambda entry: (not entry["nonfinite"], 0.0 if entry["nonfinite"] else -entry["grad_norm"]))
        return entries[:_TENSORS]


def _containing(window: SeenWindow, token: int) -> Document:
    return next((document for document in window.documents if token < document.end), window.documents[-1])


def _heaviest(window: SeenWindow, losses: Tensor) -> Document:
    """The document whose tokens lose most, compared with the window's mean."""
    excess = np.concatenate([[0.0], (losses - losses.mean()).double().numpy()])  # [length]: the first token is no target
    totals = [
        float(excess[max(0, document.begin - window.start) : document.end - window.start].sum())
        for document in window.documents
    ]
    return window.documents[int(np.argmax(totals))]


def told(window: dict[str, Any]) -> str:
    """One of an event's windows in words."""
    text = f"sample {window['sample']:,}, loss {float(window['loss']):.4g}"  # from a file it may be the word "NaN"
    if "start" not in window:
        return f"{text} ({window.get('note', 'place unknown')})"
    document = Document(**window["document"])
    return f"{text}, {window['file']} from token {window['place']:,}; in it {document}"
