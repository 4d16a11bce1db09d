"""Runs the server, and stops it gracefully.

After the first SIGTERM or Ctrl-C, running requests finish, within a time limit, while new ones get 503. A second signal ends
the process at once.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import FrameType

import uvicorn

from bardling.errors import UserError
from bardling.files.atomic import os_reason
from bardling.serve.app import Api
from bardling.serve.catalog import Catalog
from bardling.serve.errors import ApiError
from bardling.serve.guard import Guard
from bardling.serve.metrics import Metrics
from bardling.serve.models import Models
from bardling.serve.protocol import Protocol
from bardling.serve.settings import Settings

_CLOSING_SECONDS = 5  # for connections to close after the last response
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Running:
    """A server that accepts requests."""

    url: str
    models: Models
    stop: Callable[[], object]  # as the first signal does; from any thread


def serve(specs: Sequence[str], settings: Settings, *, ready: Callable[[Running], None], note: Callable[[str], None]) -> None:
    """Serve models until a signal arrives, if this is the main thread, or `Running.stop` is called.

    Args:
        specs: models, as `bardling.load_model` takes them; the first one is loaded before the server listens.
        ready: called once it accepts requests.
        note: called with what happens while it stops.

    Raises:
        UserError: a setting or the address cannot be used, or a model cannot be read.
    """
    settings.check()
    with contextlib.closing(_bind(settings.host, settings.port)) as listener:
        catalog = Catalog(specs, best=settings.best)
        asyncio.run(_serve(catalog, settings, listener, ready, note))


class _Server(uvicorn.Server):
    """uvicorn without its own handling of signals; `ready` is called once it accepts connections."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()


async def _serve(
    catalog: Catalog,
    settings: Settings,
    listener: socket.socket,
    ready: Callable[[Running], None],
    note: Callable[[str], None],
) -> None:
    metrics = Metrics()
    models = Models(catalog, settings, metrics)
    try:
        async with models.using(None):  # errors appear now, not at the first request
            pass
    except ApiError as error:
        raise UserError(str(error)) from None
    guard = Guard(Api(models, settings, metrics).application(), settings, metrics)
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # not a line for each malformed request
    config = uvicorn.Config(
        guard,
        http=Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=1_024,
        timeout_graceful_shutdown=_CLOSING_SECONDS,
    )
    loop, tasks = asyncio.get_running_loop(), set[asyncio.Task[None]]()

    def drain() -> None:
        tasks.add(loop.create_task(_drain(server, guard, models, settings.drain, note)))

    running = Running(url, models, partial(loop.call_soon_threadsafe, drain))
    server = _Server(config, partial(ready, running))
    with _signals(running.stop):
        await server.serve(sockets=[listener])
        await models.close()


async def _drain(server: uvicorn.Server, guard: Guard, models: Models, limit: float, note: Callable[[str], None]) -> None:
    """Let running requests finish, then stop the server."""
    guard.draining = True
    if guard.active:
        note(f"finishing {_requests(guard.active)} (up to {limit:g} s); press Ctrl-C again to stop at once")
    if not await guard.wait_idle(limit):
        note(f"ending {_requests(guard.active)}: not finished after {limit:g} s")
        for loaded in models.loaded.values():
            loaded.worker.end_all(ApiError(503, "the server is shutting down", code="shutting_down"))
        await guard.wait_idle(_CLOSING_SECONDS)
    server.should_exit = True


def _requests(count: int) -> str:
    return f"{count} running request{'' if count == 1 else 's'}"


@contextlib.contextmanager
def _signals(stop: Callable[[], object]) -> Iterator[None]:
    """Call `stop` at the first signal, and end the process at the second."""
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            os._exit(128 + number)
        stop()

    if threading.current_thread() is not threading.main_thread():  # others cannot receive signals
        yield
        return
    previous = {number: signal.signal(number, receive) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _bind(host: str, port: int) -> socket.socket:
    """A socket at this address; it does not accept connections yet."""
    where = f"--host {host} --port {port}"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        family, kind, protocol, _, address = found
        listener = socket.socket(family, kind, protocol)  # without the protocol, asyncio leaves out TCP_NODELAY
    except (OSError, UnicodeError) as error:
        raise UserError(f"{where}: cannot be used ({error}): choose an address of this machine") from None
    try:
        if os.name == "posix":  # elsewhere it would take over another program's port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        advice = f"choose another one, such as --port {port + 1 if port < 65_535 else port - 1}"
        raise UserError(f"{where}: {os_reason(error).lower()}: {advice}") from None
    return listener
