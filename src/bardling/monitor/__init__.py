"""Where a run's metrics go: JSON Lines files, the terminal, TensorBoard, Weights & Biases; and progress bars.

A destination is a `Sink`. Everything that formats numbers or writes records belongs here. Deciding what to log and when
(`training/hooks`) and drawing finished runs (`report/`) do not.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bardling.config.monitor import MonitorConfig


class Sink(Protocol):
    """Receives a run's records. Only the primary process has sinks.

    A record is a flat mapping with at least `kind` ('train', 'val', ...) and `step`; unknown values are left out.
    """

    def log(self, record: Mapping[str, object]) -> None:
        """Log one record."""

    def sample(self, step: int, prompt: str, texts: Sequence[str]) -> None:
        """Log texts generated at `step` as continuations of `prompt`."""

    def flush(self) -> None:
        """Make everything logged so far durable, as far as the destination allows."""

    def close(self) -> None:
        """Flush and release resources; nothing is logged afterwards."""


@dataclass(frozen=True)
class RunInfo:
    """What a logging service needs to know about the run."""

    folder: Path  # the run folder; a service keeps its files inside
    step: int  # the step at which the run starts (0) or resumes
    config: MonitorConfig
    values: dict[str, Any]  # the run's whole configuration as nested plain values, shown as hyperparameters
    recipe: str  # the same as TOML
    report: Callable[[str], None]  # prints one line for the user
