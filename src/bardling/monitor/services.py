"""External logging services: opened together, and never able to stop the run.

`check_services` finds user errors (a missing package, no API key) before anything is written or trained. A service that fails
later is reported once and dropped; the run folder's own files still have every metric. To add a service, add a class like
`TensorBoardSink` to `SERVICES`; installed extensions add sinks through `extensions.SINKS`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Protocol

from bardling.config.monitor import MonitorConfig
from bardling.errors import UserError
from bardling.extensions import SINKS
from bardling.monitor import RunInfo, Sink
from bardling.monitor.tensorboard import TensorBoardSink
from bardling.monitor.wandb import WandbSink


class Service(Sink, Protocol):
    """A sink that the configuration can turn on; its class opens it: `cls(run)`."""

    title: ClassVar[str]

    def __init__(self, run: RunInfo) -> None: ...

    @staticmethod
    def enabled(config: MonitorConfig) -> bool:
        """Whether the configuration asks for this service."""

    @staticmethod
    def check(config: MonitorConfig) -> None:
        """Raise `UserError` if the service cannot be used: a missing package, say."""


SERVICES: tuple[type[Service], ...] = (TensorBoardSink, WandbSink)


def check_services(config: MonitorConfig) -> None:
    """Check that every enabled service can be used.

    Raises:
        UserError: a package is not installed or cannot be imported, or Weights & Biases has no API key.
    """
    for service in SERVICES:
        if service.enabled(config):
            service.check(config)
    for name in config.sinks:
        SINKS.get("monitor.sinks", name)


class Services:
    """All enabled services, as one sink. `check_services` has been called before.

    Raises:
        UserError: wandb.json is damaged.
    """

    def __init__(self, run: RunInfo) -> None:
        self._report = run.report
        self._open: dict[str, Sink] = {}  # by title
        makers: dict[str, Callable[[RunInfo], Sink]] = {one.title: one for one in SERVICES if one.enabled(run.config)}
        makers |= {f"the sink {name!r}": SINKS.get("monitor.sinks", name) for name in run.config.sinks}
        for title, make in makers.items():
            try:
                self._open[title] = make(run)
            except UserError:
                raise
            except Exception as error:  # noqa: BLE001  whatever a service's library raises, the run matters more
                self._give_up(title, error)

    def log(self, record: Mapping[str, object]) -> None:
        self._each(lambda sink: sink.log(record))

    def sample(self, step: int, prompt: str, texts: Sequence[str]) -> None:
        self._each(lambda sink: sink.sample(step, prompt, texts))

    def flush(self) -> None:
        self._each(lambda sink: sink.flush())

    def close(self) -> None:
        """Close every service; closing twice is not an error."""
        self._each(lambda sink: sink.close())
        self._open = {}

    def _each(self, action: Callable[[Sink], None]) -> None:
        for title, sink in list(self._open.items()):
            try:
                action(sink)
            except Exception as error:  # noqa: BLE001  as above
                del self._open[title]
                self._give_up(title, error)

    def _give_up(self, title: str, error: Exception) -> None:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        self._report(
            f"{title} failed; it receives no more metrics until the run is resumed (the run folder has all of them): {reason}"
        )
