"""Which windows, files and documents a step saw.

A run counts samples; `environment.json` says of each start at which step and sample it began and how many a step took, the seed
and `skips.json` say which window of the data's order each sample was, the dataset says where that lies and from which documents
it came. All of it is computed again; nothing is logged for it while training.

Limits: of runs started by earlier versions, which did not note samples, a step is taken to have had as many as
`train.batch_size` says now. The answer is about the steps that led to the run's newest state, not
about those that a rollback undid.
"""

from dataclasses import dataclass
from typing import Any

from bardling.checkpoint.runfolder import RunFolder, read_json
from bardling.config import DataConfig, RunConfig, TrainConfig
from bardling.data.documents import Document, Documents
from bardling.data.order import WindowOrder
from bardling.data.shards import TokenDataset
from bardling.data.skips import PassingOrder, Range, passing
from bardling.errors import UserError
from bardling.interop.dataset import open_data
from bardling.optim.schedule import Ramp, batch_size_at, samples_before
from bardling.train.rollbacks import Rollback, read_rollbacks

_MOST_WINDOWS = 1 << 13  # of a step
_LAST_SAMPLE = 1 << 60


@dataclass(frozen=True)
class SeenWindow:
    """One window of tokens that a run trained on."""

    sample: int  # its number in the data's order
    start: int  # its first token in the split
    length: int  # tokens, the last target included
    file: str
    place: int  # its first token in the file
    documents: tuple[Document, ...]


@dataclass(frozen=True)
class SeenStep:
    """What one step saw."""

    step: int
    dataset: TokenDataset
    named: bool  # whether documents have names
    windows: tuple[SeenWindow, ...]
    rollbacks: tuple[Rollback, ...]  # that this step caused before it could be done

    def text(self, window: SeenWindow, tokens: int) -> str | None:
        """The first tokens of a window as text; None without a tokenizer."""
        if self.dataset.tokenizer is None:
            return None
        ids = self.dataset.split("train").read(window.start, min(tokens, window.length))
        return self.dataset.tokenizer.decode(ids.tolist())


class Tracer:
    """Finds windows and documents of the training split."""

    def __init__(self, dataset: TokenDataset, order: WindowOrder) -> None:
        self._split, self._order = dataset.split("train"), order
        self.block_size = order.block_size
        self.documents = Documents(dataset, "train")

    def windows(self, ranges: list[Range]) -> list[SeenWindow]:
        """The windows of ranges of the order."""
        found = []
        for first, count in ranges:
            for sample, start in enumerate(self._order.starts(first, count).tolist(), first):
                file, place = self._split.place(start)
                length = self._order.block_size + 1
                documents = tuple(self.documents.at(start, length))
                found.append(SeenWindow(sample, start, length, file, place, documents))
        return found


def seen_in_step(folder: RunFolder, step: int) -> SeenStep:
    """What step `step` (counted from 1) of a run saw, or will see.

    Raises:
        UserError: there is no such step, or the run's data is gone or has changed.
    """
    config = folder.config()
    if not 1 <= step <= config.train.steps:
        raise UserError(f"--step {step}: {folder.path} has the steps 1 to {config.train.steps:,}")
    dataset = _dataset(folder)
    order = WindowOrder(config.seed, len(dataset.split("train")), config.model.block_size)
    rollbacks = read_rollbacks(folder)
    first, count = _samples(folder, config, step)
    if count > _MOST_WINDOWS or first > _LAST_SAMPLE:
        raise UserError(
            f"{folder.environment_file}: says that step {step} had {count:,} samples from number {first:,} on; at most "
            f"{_MOST_WINDOWS:,} are looked up, up to number {_LAST_SAMPLE:,}"
        )
    tracer = Tracer(dataset, order)
    windows = tracer.windows(order_of(order, rollbacks).places(first, count))
    return SeenStep(
        step, dataset, tracer.documents.named, tuple(windows), tuple(entry for entry in rollbacks if entry.event.step == step)
    )


def order_of(order: WindowOrder, rollbacks: tuple[Rollback, ...]) -> PassingOrder:
    """The order without the windows that rollbacks pass over."""
    return passing(order, [part for rollback in rollbacks for part in rollback.ranges])


def _dataset(folder: RunFolder) -> TokenDataset:
    record = folder.dataset_record()
    try:
        dataset = open_data(DataConfig(source=str(record.get("path"))))
    except UserError as error:
        raise UserError(f"{folder.dataset_file}: names data that cannot be opened: {error}") from error
    if dataset.fingerprint != record.get("fingerprint"):
        raise UserError(f"{dataset.path}: is not the data that {folder.path} was trained on any more: restore it")
    return dataset


def samples_facts(config: TrainConfig, first_sample: int) -> dict[str, Any]:
    """What a start of a run notes, so that it can be told later which samples a step saw."""
    facts: dict[str, Any] = {"first_sample": first_sample, "samples_per_step": config.batch_size}
    if config.batch_doublings:
        facts["batch_ramp"] = {"doublings": config.batch_doublings, "part": config.ramp, "steps": config.steps}
    return facts


def _samples(folder: RunFolder, config: RunConfig, step: int) -> tuple[int, int]:
    """First sample of a step, and how many it has: as the last start before it began."""
    starts = read_json(folder.environment_file).get("starts") if folder.environment_file.is_file() else None
    for start in reversed(starts if isinstance(starts, list) else []):
        names = ("first_step", "first_sample", "samples_per_step")
        facts = [start.get(name) if isinstance(start, dict) else None for name in names]
        numbers = [fact for fact in facts if type(fact) is int and fact >= 0]
        if len(numbers) == len(names) and numbers[0] < step:
            ramp, steps = _ramp_of(start.get("batch_ramp"), numbers[2], folder)
            passed = samples_before(step - 1, steps, numbers[2], ramp) - samples_before(numbers[0], steps, numbers[2], ramp)
            return numbers[1] + passed, batch_size_at(step - 1, steps, numbers[2], ramp)
    return (step - 1) * config.train.batch_size, config.train.batch_size


def _ramp_of(noted: Any, batch_size: int, folder: RunFolder) -> tuple[Ramp, int]:
    """The batch's ramp as `samples_facts` noted it, and the steps that it is a part of."""
    if noted is None:
        return Ramp(), 1
    values = [noted.get(name) if isinstance(noted, dict) else None for name in ("doublings", "part", "steps")]
    doublings, part, steps = values
    if (
        not (type(doublings) is int and 0 <= doublings <= 60 and type(steps) is int and 1 <= steps < 1 << 60)
        or not (isinstance(part, int | float) and 0 <= part <= 1)
        or batch_size % (1 << doublings)
    ):
        raise UserError(f"{folder.environment_file}: batch_ramp = {str(noted)[:80]}: is damaged; restore it from a copy")
    return Ramp(doublings, part), steps
