"""Where a run's figures go: files, the terminal, and services that people look at."""

from collections.abc import Mapping, Sequence
from typing import Protocol


class Sink(Protocol):
    """Takes a run's figures. Only the primary process has sinks.

    A record is a flat mapping with at least `kind` ('train', 'val', ...) and `step`; what is unknown is left out.
    """

    def log(self, record: Mapping[str, object]) -> None:
        """Take the figures of one step."""

    def sample(self, step: int, texts: Sequence[str]) -> None:
        """Take texts that the model wrote at `step`."""

    def flush(self) -> None:
        """Make everything taken so far durable, as far as the place allows."""

    def close(self) -> None:
        """Flush and let go; nothing is taken afterwards."""
