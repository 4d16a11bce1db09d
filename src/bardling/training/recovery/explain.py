"""What caused a bad step: its worst sequences with the documents they came from, and the tensors with abnormal gradients.

The step's sequences are run through the model once more, forward only, and ranked by their loss: sequences with a non-finite
loss first, then those with the highest loss. The document named for a sequence is the one that contains the first token with a
non-finite loss, or else the one that contributes most to the loss. The weights are those before the bad update, which was not
applied. Gradients are the step's own where they still exist; on a GPU, where the next step has overwritten them, those of the
worst sequence.

Limits: dropout is off, so losses differ slightly from the step's. If no sequence has an abnormal loss, the event says so: the
cause is then the machine or the numerics rather than the data.
"""

import math
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from bardling.data.batches.loader import Batch, TrainSequences, shorten_context
from bardling.data.batches.order import DataOrder
from bardling.data.batches.skipped_ranges import Range
from bardling.data.tokens.documents import Document
from bardling.data.tokens.shards import TokenDataset
from bardling.distributed.context import Context
from bardling.distributed.device import Precision
from bardling.distributed.pipeline import Pipeline, Stage
from bardling.distributed.sharding import SHARD_AXES
from bardling.errors import UserError
from bardling.model.gpt import evaluation_mode
from bardling.training.objective import Forward, Objective
from bardling.training.recovery.trace import TracedSequence, Tracer
from bardling.training.state import TrainState

_SEQUENCES = 3  # named in an event
_TENSORS = 5


@dataclass
class Explainer:
    """Explains bad steps of one run. All processes must call it alike, because it runs forward passes."""

    dataset: TokenDataset
    order: DataOrder  # before anything is skipped
    objective: Objective
    context: Context
    precision: Precision
    micro_batch: int  # sequences in a forward pass
    document_start: int | None = None  # token that opens a document, if documents are kept apart

    def __post_init__(self) -> None:
        self._source = TrainSequences(self.dataset.split("train"), self.order, self.document_start)
        self._tracer = Tracer(self.dataset, self.order)

    def worst_sequences(self, state: TrainState, ranges: list[Range], context: int) -> list[dict[str, Any]]:
        """Describe the worst sequences of `ranges` of the data order, worst first.

        Args:
            context: tokens of the pieces into which the step cut its sequences.
        """
        found: list[tuple[float, int, Tensor]] = []
        with evaluation_mode(state.model):
            for first, count in ranges:
                for begin in range(first, first + count, self.micro_batch):
                    size = min(self.micro_batch, first + count - begin)
                    with torch.no_grad(), self.precision.autocast():
                        losses = self.objective.per_token(cast(Forward, state.model), self._batch(begin, size, context))
                    rows = losses.reshape(size, -1).float().cpu()  # [size, block_size]
                    for sample, row in enumerate(rows, begin):
                        mean = row.mean().item()
                        found.append((mean if math.isfinite(mean) else math.inf, sample, row))
        found.sort(key=lambda item: (-item[0], item[1]))
        return [self._describe(sample, row) for _, sample, row in found[:_SEQUENCES]]

    def _batch(self, first: int, count: int, context: int) -> Batch:
        return shorten_context(self._source.batch(first, count).to(self.context.device), context)

    def _describe(self, sample: int, losses: Tensor) -> dict[str, Any]:
        """Describe a sequence with the given loss of each target [block_size]."""
        entry: dict[str, Any] = {"sample": sample, "loss": losses.mean().item()}
        try:
            (sequence,) = self._tracer.sequences([(sample, 1)])
        except UserError as error:
            return {**entry, "note": str(error)}
        nonfinite = ~torch.isfinite(losses)
        if nonfinite.any():  # the cause is among the tokens up to the first such target
            token = sequence.start + int(nonfinite.int().argmax())
            document = next((each for each in sequence.documents if token < each.end), sequence.documents[-1])
        else:
            document = _largest_contribution(sequence, losses)
        named = {} if document.number is None else {"number": document.number, "name": document.name}
        return {
            **entry,
            **({"source": sequence.source} if sequence.source else {}),
            "start": sequence.start,
            "file": sequence.file,
            "place": sequence.offset,
            "document": {"begin": document.begin, "end": document.end, **named},
            "documents": len(sequence.documents),
        }

    def largest_gradients(self, state: TrainState, sample: int | None, context: int) -> list[dict[str, Any]]:
        """Describe the tensors with the largest gradients; those with non-finite entries first, in the model's order.

        Args:
            sample: take the gradient of this sequence; None for the existing gradients.
        """
        parameters = state.parameters
        gradients = [parameter.grad for parameter in parameters.values()]
        if sample is not None:
            gradients = self._gradients_of(state, sample, context)
        entries = []
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
            weight = parameter.detach()
            known = [*_sums(weight.new_zeros(1) if gradient is None else gradient), *_sums(weight)]
            sums = torch.stack([*known, torch.full_like(known[0], weight.numel())])
            if state.shards is not None and not state.shards.counts(name):
                sums = torch.zeros_like(sums)  # not multiplied, since there may be NaN
            norm, nonfinite, weights, weights_nonfinite, size = self.context.sum(sums, SHARD_AXES).tolist()
            entry: dict[str, Any] = {
                "name": name,
                "grad_norm": math.sqrt(norm),
                "nonfinite": int(nonfinite),
                "weight_rms": math.sqrt(weights / size),
            }
            if weights_nonfinite:
                entry["weight_nonfinite"] = int(weights_nonfinite)
            entries.append(entry)
        if state.shards is not None:
            entries = state.shards.merged({"entries": entries})["entries"]
        entries.sort(key=lambda entry: (not entry["nonfinite"], 0.0 if entry["nonfinite"] else -entry["grad_norm"]))
        return entries[:_TENSORS]

    def _gradients_of(self, state: TrainState, sample: int, context: int) -> list[Tensor | None]:
        """The gradients of one sequence, the same in all processes."""
        batch = self._batch(sample, 1, context)
        if state.shards is None:  # not `backward`, which would start DDP's gradient exchange
            loss = self._mean_loss(cast(Forward, state.model), batch)
            return list(torch.autograd.grad(loss, list(state.parameters.values()), allow_unused=True))
        state.zero_gradients()
        if isinstance(state.model, Stage):
            Pipeline(state.model, "gpipe").run([batch], self._mean_loss, self.precision.autocast)
        else:
            self._mean_loss(cast(Forward, state.model), batch).backward()  # type: ignore[no-untyped-call]
        state.shards.collect_gradients()
        return [parameter.grad for parameter in state.parameters.values()]

    def _mean_loss(self, forward: Forward, batch: Batch) -> Tensor:
        with self.precision.autocast():
            return self.objective(forward, batch).loss / self.order.block_size


def _sums(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of squares of a tensor, and its number of NaN and infinite entries."""
    wide = torch.float32 if tensor.device.type == "mps" else torch.float64  # Apple GPUs have no float64
    return tensor.to(wide).square().sum(), (~torch.isfinite(tensor)).sum().to(wide)


def _largest_contribution(sequence: TracedSequence, losses: Tensor) -> Document:
    """The document whose tokens exceed the sequence's mean loss most."""
    excess = np.concatenate([[0.0], (losses - losses.mean()).double().numpy()])  # [length]: the first token is no target
    totals = [
        float(excess[max(0, document.begin - sequence.start) : document.end - sequence.start].sum())
        for document in sequence.documents
    ]
    return sequence.documents[int(np.argmax(totals))]


def describe_sequence(entry: dict[str, Any]) -> str:
    """One of an event's sequences in words."""
    text = f"sample {entry['sample']:,}, loss {float(entry['loss']):.4g}"  # in a file, the loss may be the string "NaN"
    if "start" not in entry:
        return f"{text} ({entry.get('note', 'position unknown')})"
    document = Document(**entry["document"])
    source = f"source {entry['source']}, " if entry.get("source") else ""
    return f"{text}, {source}{entry['file']} from token {entry['place']:,}; in it {document}"
