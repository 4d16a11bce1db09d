"""The services that show a run's figures besides its own files: opened together, and never able to end the run.

What the user can put right (a missing package, no key) is found by `check_services` before anything is written or trained. A
service that fails later is named once and left out from then on; the run folder's own files have every figure anyway.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from bardling.config import MonitorConfig, RunConfig
from bardling.errors import UserError
from bardling.monitor.tensorboard import TensorBoardSink, check_tensorboard
from bardling.monitor.wandb import WandbSink, check_wandb


class Service(Protocol):
    """One place that takes figures."""

    name: str

    def log(self, values: Mapping[str, object]) -> None:
        """Take the figures of one record: `kind`, `step` and its numbers."""

    def sample(self, step: int, prompt: str, texts: Sequence[str]) -> None:
        """Take texts that the model wrote at `step`."""

    def flush(self) -> None:
        """Make what was taken so far durable, as far as the service allows."""

    def close(self) -> None:
        """Flush and let go."""


def check_services(config: MonitorConfig) -> None:
    """Make sure that the services asked for can be used at all.

    Raises:
        UserError: a package is not installed, or Weights & Biases has no key.
    """
    if config.tensorboard:
        check_tensorboard()
    if config.wandb != "off":
        check_wandb(config.wandb)


class Services:
    """The services that a configuration names. Only the primary process has them.

    Args:
        folder: the run's folder; everything that a service keeps goes into it.
        config: the whole configuration, which the services show as hyperparameters.
        step: the step that the run starts (0) or resumes at.
        tell: says a line to the person who watches.

    Raises:
        UserError: what `check_services` finds, or a damaged wandb.json.
    """

    def __init__(self, folder: Path, config: RunConfig, step: int, tell: Callable[[str], None] | None = None) -> None:
        self._tell = tell or _to_stderr
        self._open: list[Service] = []
        check_services(config.monitor)
        if config.monitor.tensorboard:
            self._start("TensorBoard", lambda: TensorBoardSink(folder / "tensorboard", config, step))
        if config.monitor.wandb != "off":
            self._start("Weights & Biases", lambda: WandbSink(folder, config, self._tell))

    def log(self, values: Mapping[str, object]) -> None:
        """Give one record (`record.as_dict()`) to every service."""
        self._each(lambda service: service.log(values))

    def sample(self, step: int, prompt: str, texts: Sequence[str]) -> None:
        """Give the samples of one step to every service."""
        self._each(lambda service: service.sample(step, prompt, texts))

    def flush(self) -> None:
        """Make what was taken so far durable."""
        self._each(lambda service: service.flush())

    def close(self) -> None:
        """Let every service go; closing twice is no error."""
        self._each(lambda service: service.close())
        self._open = []

    def _start(self, name: str, make: Callable[[], Service]) -> None:
        try:
            self._open.append(make())
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001  whatever a service's library raises, the run matters more
            self._give_up(name, error)

    def _each(self, action: Callable[[Service], None]) -> None:
        for service in list(self._open):
            try:
                action(service)
            except Exception as error:  # noqa: BLE001  as above
                self._open.remove(service)
                self._give_up(service.name, error)

    def _give_up(self, name: str, error: Exception) -> None:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        self._tell(f"{name} failed and gets no more figures until the run is resumed (the run folder has them all): {reason}")


def _to_stderr(text: str) -> None:
    print(f"bardling: {text}", file=sys.stderr)
