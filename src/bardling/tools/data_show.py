"""Sequences exactly as the model sees them: read by the loader that training uses, and cut where something changes.

A sequence becomes spans. Within one, all tokens belong to the same document, attend to the same tokens before them, and are
either all targets or none. The first token of a sequence is no target, since nothing comes before it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from bardling.data.batches import IGNORE
from bardling.data.batches.loader import TrainSequences
from bardling.data.batches.order import DataOrder
from bardling.data.batches.packing import document_start
from bardling.data.tokens.documents import Document
from bardling.data.tokens.shards import TokenDataset
from bardling.data.tokens.tokenizer import Ids
from bardling.training.recovery.trace import Tracer


@dataclass(frozen=True)
class Span:
    """Consecutive tokens that are treated alike."""

    ids: Ids  # [tokens]
    learned: bool  # whether they are targets
    document: Document | None  # if one begins with these tokens, or the sequence does
    anew: bool  # whether attention does not reach the tokens before


@dataclass(frozen=True)
class ShownSequence:
    sample: int  # its number in the data order
    start: int  # position of its first token in the training split of its source
    place: str  # file, and position in it
    spans: tuple[Span, ...]

    @property
    def learned(self) -> int:
        """Tokens that are targets."""
        return sum(len(span.ids) for span in self.spans if span.learned)


def show_samples(dataset: TokenDataset, order: DataOrder, samples: list[int], *, masked: bool) -> Iterator[ShownSequence]:
    """Samples of the data order; `masked` tells that attention does not cross documents (`data.document_mask`)."""
    split, tracer = dataset.split("train"), Tracer(dataset, order)
    source = TrainSequences(split, order, document_start(masked, dataset, dataset.tokenizer))
    for sample in samples:
        batch = source.batch(sample, 1)
        (traced,) = tracer.sequences([(sample, 1)])
        ids = split.read(int(order.starts(sample, 1)[0]), order.block_size + 1)
        learned = np.concatenate([[False], batch.targets[0].numpy() != IGNORE])
        bounds = [] if batch.documents is None else batch.documents.tolist()
        begun = {place for place in bounds if 0 < place < order.block_size}  # the last token is only a target
        names = {max(found.begin - traced.start, 0): found for found in traced.documents}
        changes = {0, *names, *begun, *(np.flatnonzero(np.diff(learned)) + 1).tolist()}
        cuts = [*sorted(changes), len(ids)]
        spans = tuple(
            Span(ids[begin:end], bool(learned[begin]), names.get(begin), begin in begun) for begin, end in pairwise(cuts)
        )
        place = f"{traced.file} from token {traced.offset:,}{' of ' * bool(traced.source)}{traced.source}"
        yield ShownSequence(sample, traced.start, place, spans)
