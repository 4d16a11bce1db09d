"""What is logged: one typed record for a step, a validation, a set of samples. Sinks get them as plain dictionaries."""

import dataclasses
from typing import Any, ClassVar


@dataclasses.dataclass(frozen=True)
class Record:
    """A figure or text of one step."""

    kind: ClassVar[str]
    step: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values with the record's kind; what is unknown (None) is left out."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return {"kind": self.kind, **{name: value for name, value in values.items() if value is not None}}


@dataclasses.dataclass(frozen=True)
class TrainRecord(Record):
    """One optimizer step. The first group is the same in every repetition of the run; the second is measured."""

    kind: ClassVar[str] = "train"
    loss: float  # mean over the step's target tokens (nats)
    bits_per_byte: float | None
    lr: float
    grad_norm: float  # before clipping
    epoch: float | None  # passes over the training split, where its length is known
    tokens: int  # seen since the run began

    tokens_per_second: float  # over the steps since the last record, without validation, samples and saving
    mfu: float | None  # achieved FLOP/s as a part of the device's peak; None when the peak is unknown
    memory_bytes: int  # peak
    seconds_left: float  # at this speed
    time: float  # of day (seconds since 1970)


@dataclasses.dataclass(frozen=True)
class ValRecord(Record):
    """One validation."""

    kind: ClassVar[str] = "val"
    loss: float  # mean over the held-out windows (nats)
    bits_per_byte: float | None
    perplexity: float
    best: bool  # the lowest loss so far


@dataclasses.dataclass(frozen=True)
class TaskRecord(Record):
    """One multiple-choice task."""

    kind: ClassVar[str] = "task"
    task: str
    accuracy: float  # part of the items whose likeliest ending was the right one
    accuracy_norm: float  # the same with each ending's loss divided by its tokens
    stderr: float  # of accuracy_norm
    items: int


@dataclasses.dataclass(frozen=True)
class EventRecord(Record):
    """A bad step, and what came of it."""

    kind: ClassVar[str] = "event"
    action: str  # skip: its update was left out; rollback: the run went back and passes over its windows; stop: the run ended
    reason: str
    loss: float  # (nats)
    grad_norm: float
    samples: list[list[int]]  # the step's windows: ranges (first, count) of the data's order
    windows: list[dict[str, Any]]  # the worst of them: sample, start (token), file, place in it, loss, document
    tensors: list[dict[str, Any]]  # those with the largest gradients: name, grad_norm, nonfinite (entries), weight_rms


@dataclasses.dataclass(frozen=True)
class SampleRecord(Record):
    """Text written by the model."""

    kind: ClassVar[str] = "sample"
    prompt: str
    texts: list[str]


# Fields that differ between two otherwise identical runs: comparisons of metrics leave them out.
TIMING_FIELDS = frozenset({"tokens_per_second", "mfu", "memory_bytes", "seconds_left", "time"})
