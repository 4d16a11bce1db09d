"""What is logged: one typed record per optimizer step, validation, task, event and set of samples; sinks get plain dicts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

BITS_PER_BYTE_VERSION = 2
"""Of the metric in records. 1 (not recorded): the loss of all tokens, also those that end documents. 2: of those with bytes."""


@dataclass(frozen=True)
class Record:
    kind: ClassVar[str]
    step: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values including the record's kind and those of `sources`; unknown values (None) are left out."""
        values = {"kind": self.kind, **{name: value for name, value in vars(self).items() if value is not None}}
        values |= values.pop("sources", {})
        return values | ({"bits_per_byte_version": BITS_PER_BYTE_VERSION} if "bits_per_byte" in values else {})


def scope(record: Mapping[str, object]) -> str:
    """The name under which services group the metrics of a record: its kind, and its task, since a step may have several."""
    return f"task/{record['task']}" if record["kind"] == "task" else str(record["kind"])


@dataclass(frozen=True)
class TrainRecord(Record):
    """One optimizer step. The first group of fields is reproducible; the second is measured and varies between runs."""

    kind: ClassVar[str] = "train"
    loss: float  # mean over the step's target tokens (nats)
    bits_per_byte: float | None
    lr: float
    grad_norm: float  # before clipping
    epoch: float | None  # passes over the training split; None if its length is unknown
    tokens: int  # seen since the run began

    tokens_per_second: float  # over the steps since the last record, without validation, samples and saving
    mfu: float | None  # achieved FLOP/s as a fraction of the device's peak; None if the peak is unknown
    memory_bytes: int | None  # peak; None where the system does not tell
    seconds_left: float  # at this speed
    time: float  # Unix time (seconds)

    sources: Mapping[str, float] = field(default_factory=dict)  # epoch/NAME of each source of a mixture
    order_digest: str | None = None  # of the samples seen, 16 hexadecimal digits: reproducible, and equal for equal data order


@dataclass(frozen=True)
class ValRecord(Record):
    kind: ClassVar[str] = "val"
    loss: float  # mean over the validation sequences (nats)
    bits_per_byte: float | None
    perplexity: float
    best: bool  # the lowest loss so far
    tokens: int | None = None  # seen since the run began
    sources: Mapping[str, float] = field(default_factory=dict)  # loss/NAME of each source of a mixture


@dataclass(frozen=True)
class TaskRecord(Record):
    kind: ClassVar[str] = "task"
    task: str
    metrics: Mapping[str, float]  # fields of the record, by the names that the kind of task gives them
    items: int

    def as_dict(self) -> dict[str, Any]:
        """Of a multiple-choice task, the metrics are `accuracy` (the fraction of items whose most likely ending is the correct
        one), `accuracy_norm` (the same with each ending's loss divided by its number of tokens) and the latter's `stderr`."""
        return {"kind": self.kind, "step": self.step, "task": self.task, **self.metrics, "items": self.items}


@dataclass(frozen=True)
class EventRecord(Record):
    """A bad step and how the run reacted."""

    kind: ClassVar[str] = "event"
    action: str  # skip: no update; rollback: back to a checkpoint, then skip the step's sequences; stop: the run ended
    reason: str
    loss: float  # (nats)
    grad_norm: float
    samples: list[list[int]]  # the step's sequences: ranges (first, count) in the data order
    windows: list[dict[str, Any]]  # the worst sequences: sample, start (token), file, place in it, loss, document
    tensors: list[dict[str, Any]]  # those with the largest gradients: name, grad_norm, nonfinite (entries), weight_rms


@dataclass(frozen=True)
class SampleRecord(Record):
    kind: ClassVar[str] = "sample"
    prompt: str
    texts: list[str]


# Fields that differ between two otherwise identical runs. Tests and benchmarks that compare metrics ignore them.
TIMING_FIELDS = frozenset({"tokens_per_second", "mfu", "memory_bytes", "seconds_left", "time"})
