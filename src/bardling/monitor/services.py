"""External logging services: opened together, and never able to stop the run.

`check_services` finds user errors (a missing package, no API key) before anything is written or trained. A service that fails
later is reported once and dropped; the run folder's own files still have every metric. To add a service, add a class like
`TensorBoardSink` to `SERVICES`; installed extensions add sinks through `extensions.SINKS`.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import ClassVar, Protocol

from bardling.config.monitor import MonitorConfig
from bardling.errors import UserError
from bardling.extensions import SINKS
from bardling.monitor import RunInfo, Sink
from bardling.monitor.tensorboard import TensorBoardSink
from bardling.monitor.wandb import WandbSink, check_api_key, one_line


class Service(Sink, Protocol):
    """A sink that a setting turns on; its class opens it: `cls(run)`."""

    title: ClassVar[str]
    package: ClassVar[str]  # also the names of the setting and of the extra

    def __init__(self, run: RunInfo) -> None: ...


SERVICES: tuple[type[Service], ...] = (TensorBoardSink, WandbSink)


def enabled(config: MonitorConfig) -> list[type[Service]]:
    on = {"tensorboard": config.tensorboard, "wandb": config.wandb != "off"}
    return [service for service in SERVICES if on[service.package]]


def check_services(config: MonitorConfig) -> None:
    """Raise a `UserError` if an enabled service lacks its package, which must be importable, or its API key."""
    for service in enabled(config):
        _check(service, config)
    for name in config.sinks:
        SINKS.get("monitor.sinks", name)


def _check(service: type[Service], config: MonitorConfig) -> None:
    name = service.package
    if importlib.util.find_spec(name) is None:
        needs = f"needs the package {name}: pip install 'bardling[{name}]'"
        raise UserError(f"monitor.{name} = {getattr(config, name)!r}: {needs}")
    if service is WandbSink and config.wandb == "online":
        check_api_key()


class Services:
    """All enabled services, as one sink; one that cannot be opened is reported and left out.

    Args:
        resumed: the run has started before. It is not ended by a package or a key that is missing now, nor by a damaged
            wandb.json, which are a `UserError` otherwise. For a new run, `check_services` has been called before.
    """

    def __init__(self, run: RunInfo, *, resumed: bool = False) -> None:
        self._report = run.report
        self._open: dict[str, Sink] = {}  # by title

        def opened(service: type[Service]) -> Sink:
            if resumed:
                _check(service, run.config)
            return service(run)

        def extension(name: str) -> Sink:
            sink: Sink = SINKS.get("monitor.sinks", name)(run)
            return sink

        makers: dict[str, Callable[[], Sink]] = {one.title: partial(opened, one) for one in enabled(run.config)}
        for name in run.config.sinks:
            makers[f"the sink {name!r}"] = partial(extension, name)
        for title, make in makers.items():
            try:
                self._open[title] = make()
            except Exception as error:
                if isinstance(error, UserError) and not resumed:
                    raise
                self._give_up(title, error)  # whatever a service's library raises, the run matters more

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
        reason = one_line(error) or type(error).__name__
        self._report(
            f"{title} failed; it receives no more metrics until the run is resumed (the run folder has all of them): {reason}"
        )
