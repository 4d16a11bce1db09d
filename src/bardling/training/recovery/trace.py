"""Which sequences, files and documents a step saw.

A run counts samples. `environment.json` records at which step and sample each start began, and how many samples a step took;
the seed and `skips.json` determine which sequence of the data order each sample is; the dataset knows where that sequence is
stored and which documents it contains. Everything is recomputed; training logs nothing for it.

Limits: runs started by versions that did not record samples are taken to have had `train.batch_size` samples in every step. The
answer is about the steps that led to the latest state, not about those that a rollback undid.
"""

import itertools
from dataclasses import dataclass
from typing import Any

from bardling.checkpoint.run_folder import RunFolder
from bardling.config import DataConfig, RunConfig, TrainConfig
from bardling.data.batches.assemble import data_order
from bardling.data.batches.order import DataOrder
from bardling.data.batches.skipped_ranges import Range, SkippingOrder, skip_ranges
from bardling.data.tokens.corpus import locate, parts_of, reopen_corpus
from bardling.data.tokens.dataset import open_data
from bardling.data.tokens.documents import Document, Documents
from bardling.data.tokens.shards import TokenDataset
from bardling.errors import UserError
from bardling.planning.schedules import Ramp
from bardling.training.environment import recorded_starts
from bardling.training.recovery.rollback_log import Rollback, read_rollbacks

_MAX_SEQUENCES = 1 << 13  # of a step
_LAST_SAMPLE = 1 << 60


@dataclass(frozen=True)
class TracedSequence:
    sample: int  # its number in the data order
    start: int  # position of its first token in the split of its source
    length: int  # tokens, including the last target
    source: str  # name, in a mixture
    file: str
    offset: int  # of its first token in the file
    documents: tuple[Document, ...]


@dataclass(frozen=True)
class TracedStep:
    step: int
    dataset: TokenDataset
    order: DataOrder  # of which `TracedSequence.sample` is a number
    named: bool  # whether documents have names
    sequences: tuple[TracedSequence, ...]
    rollbacks: tuple[Rollback, ...]  # caused by this step before it succeeded

    def text(self, sequence: TracedSequence, tokens: int) -> str | None:
        """The first tokens of a sequence as text; None without a tokenizer."""
        if self.dataset.tokenizer is None:
            return None
        split = dict(self.dataset.splits("train"))[sequence.source]
        ids = split.read(sequence.start, min(tokens, sequence.length))
        return self.dataset.tokenizer.decode(ids.tolist())


class Tracer:
    """Finds sequences and their documents in the training split."""

    def __init__(self, dataset: TokenDataset, order: DataOrder) -> None:
        parts = parts_of(dataset, "train")
        self._order, self._splits = order, dataset.splits("train")
        self._documents = [Documents(part.dataset, "train") for part in parts]
        self._bounds = list(itertools.accumulate((len(split) for _, split in self._splits), initial=0))
        self.named = all(documents.named for documents in self._documents)

    def sequences(self, ranges: list[Range]) -> list[TracedSequence]:
        found, length = [], self._order.block_size + 1
        for first, count in ranges:
            for sample, start in enumerate(self._order.starts(first, count).tolist(), first):
                number, local = locate(self._bounds, start)
                source, split = self._splits[number]
                documents = tuple(self._documents[number].at(local, length))
                found.append(TracedSequence(sample, local, length, source, *split.place(local), documents))
        return found


def trace_step(folder: RunFolder, step: int) -> TracedStep:
    """What step `step` (counted from 1) of a run saw, or will see.

    Raises:
        UserError: there is no such step, or the run's data is missing or has changed.
    """
    config, trained = folder.config(), folder.trained_config()
    if not 1 <= step <= config.train.steps:
        raise UserError(f"--step {step}: {folder.path} has steps 1 to {config.train.steps:,}; choose one of these")
    dataset = _open_dataset(folder)
    order = data_order(dataset, trained.data, trained.seed, trained.model.block_size)
    rollbacks = read_rollbacks(folder)
    first, count = _samples(folder, config, step)
    if count > _MAX_SEQUENCES or first > _LAST_SAMPLE:
        raise UserError(
            f"{folder.environment_file}: step {step} has {count:,} samples from sample {first:,} on, but at most "
            f"{_MAX_SEQUENCES:,} can be traced, up to sample {_LAST_SAMPLE:,}; if these numbers are wrong, restore the file"
        )
    tracer = Tracer(dataset, order)
    sequences = tracer.sequences(order_after(order, rollbacks).places(first, count))
    caused = tuple(rollback for rollback in rollbacks if rollback.event.step == step)
    return TracedStep(step, dataset, order, tracer.named, tuple(sequences), caused)


def order_after(order: DataOrder, rollbacks: tuple[Rollback, ...]) -> SkippingOrder:
    """The data order without the sequences that rollbacks skip."""
    return skip_ranges(order, [part for rollback in rollbacks for part in rollback.ranges])


def _open_dataset(folder: RunFolder) -> TokenDataset:
    record, trained = folder.dataset_record(), folder.trained_config()
    if trained.data.sources or trained.data.val_source:
        return reopen_corpus(trained.data, record, folder.path, context=trained.model.block_size)
    try:
        dataset = open_data(DataConfig(source=str(record.get("path"))))
    except UserError as error:
        raise UserError(f"{folder.dataset_file}: the dataset cannot be opened: {error}") from error
    if dataset.fingerprint != record.get("fingerprint"):
        raise UserError(f"{dataset.path}: has changed since {folder.path} was trained on it: restore it")
    return dataset


def sample_position(config: TrainConfig, first_sample: int) -> dict[str, Any]:
    """What each start of a run records, so that `trace_step` can tell which samples a step saw."""
    facts: dict[str, Any] = {"first_sample": first_sample, "samples_per_step": config.batch_size}
    if config.batch_doublings:
        facts["batch_ramp"] = {"doublings": config.batch_doublings, "part": config.ramp, "steps": config.steps}
    return facts


def _samples(folder: RunFolder, config: RunConfig, step: int) -> tuple[int, int]:
    """First sample of a step and their number, according to the last start before it."""
    for start in reversed(recorded_starts(folder)):
        facts = [start.get(name) for name in ("first_step", "first_sample", "samples_per_step")]
        numbers = [fact for fact in facts if type(fact) is int and fact >= 0]
        if len(numbers) == len(facts) and numbers[0] < step:
            first_step, first_sample, batch_size = numbers
            ramp, steps = _recorded_ramp(start.get("batch_ramp"), batch_size, folder)
            before, already = (ramp.total_before(n, steps, batch_size) for n in (step - 1, first_step))
            return first_sample + before - already, ramp.size_at(step - 1, steps, batch_size)
    return (step - 1) * config.train.batch_size, config.train.batch_size


def _recorded_ramp(recorded: Any, batch_size: int, folder: RunFolder) -> tuple[Ramp, int]:
    """The ramp of the batch size as recorded by `sample_position`, and the number of steps it refers to."""
    if recorded is None:
        return Ramp(), 1
    doublings, part, steps = (
        recorded.get(name) if isinstance(recorded, dict) else None for name in ("doublings", "part", "steps")
    )
    if (
        not (type(doublings) is int and 0 <= doublings <= 60 and type(steps) is int and 1 <= steps < 1 << 60)
        or not (isinstance(part, int | float) and 0 <= part <= 1)
        or batch_size % (1 << doublings)
    ):
        raise UserError(f"{folder.environment_file}: batch_ramp = {str(recorded)[:80]}: is damaged; restore it from a copy")
    return Ramp(doublings, part), steps
