"""What a run reads, from its dataset and its settings: the order of its samples, and the sequences of its validation."""

from dataclasses import dataclass

from bardling.config import DataConfig
from bardling.data.batches.loader import EvalSequences, SequenceSet
from bardling.data.batches.mixture import MixtureStage, mixed_order
from bardling.data.batches.order import DataOrder
from bardling.data.tokens.shards import TokenDataset
from bardling.errors import UserError


@dataclass(frozen=True)
class ValidationSet:
    """The validation sequences of one source."""

    name: str  # empty if there is only one
    weight: float  # in the loss of all
    sequences: SequenceSet


def data_order(dataset: TokenDataset, config: DataConfig, seed: int, block_size: int) -> DataOrder:
    """The order of the samples of a run with this `seed`; `data.stages` of a mixture must be numbers of samples."""
    found, starts = dataset.splits("train"), [0, *map(int, config.stages)]
    columns = zip(*(source.weights(len(starts)) for source in config.sources), strict=True) if config.sources else [(1.0,)]
    stages = [MixtureStage(first, weights) for first, weights in zip(starts, columns, strict=True)]
    for name, split in found if len(found) > 1 else ():
        if len(split) < block_size + 1:
            need = f"one sequence needs model.block_size + 1 = {block_size + 1:,}"
            raise UserError(f"data.sources: {name} has {len(split):,} training tokens, but {need}: add text, or remove it")
    return mixed_order(seed, [len(split) for _, split in found], block_size, found[0][1].row, stages)


def source_epochs(dataset: TokenDataset, order: DataOrder, samples: int) -> dict[str, float]:
    """How often each source of a mixture has been visited after this number of samples, by name."""
    names = [name for name, _ in dataset.splits("train")]
    return dict(zip(names, order.epochs(samples), strict=True)) if len(names) > 1 else {}


def validation_sets(
    dataset: TokenDataset,
    config: DataConfig,
    block_size: int,
    windows: int | None,
    document_start: int | None = None,
    remedy: str = "use a longer text",
) -> list[ValidationSet]:
    """The validation sequences of each source, with the weights of the last stage of a mixture.

    `windows` sequences (None: all) are divided among them; `document_start` is as in `TrainSequences`.
    """
    found = dataset.splits("val")
    weights = [1.0] * len(found)
    if len(found) == len(config.sources) and not config.val_source:
        weights = [source.weights(len(config.stages) + 1)[-1] for source in config.sources]
    share = None if windows is None else -(-windows // len(found))
    sets = []
    for (name, split), weight in zip(found, weights, strict=True):
        try:
            sequences = EvalSequences(split, block_size, share, document_start, remedy=remedy)
        except UserError as error:
            raise UserError(f"{name}: {error}" if name else str(error)) from error
        sets.append(ValidationSet(name, weight / sum(weights), sequences))
    return sets
