"""Access control, applied before anything else reads a request.

- A server that listens on this machine only accepts this machine's names in `Host`, which defeats DNS rebinding.
- Requests from web pages of other origins (`Origin`) are refused, unless the origin is allowed.
- With a key, everything except the page and `/healthz` requires it. Keys are compared in constant time.
- During shutdown, everything except `/healthz` and `/metrics` gets 503.

It also counts requests, and adds the headers common to all responses.
"""

import asyncio
import contextlib
import hmac
import time
from collections.abc import Iterator

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bardling.serve.errors import ApiError, JsonResponse
from bardling.serve.metrics import Metrics
from bardling.serve.settings import Settings

_OPEN = ("/", "/healthz")  # without a key
_ALWAYS = ("/healthz", "/metrics")  # also while shutting down


class Guard:
    """Wraps the application.

    Attributes:
        draining: whether the server shuts down.
        active: requests being answered.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self.draining = False
        self.active = 0
        self._idle = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)  # start and end of the application
            return
        headers = Headers(scope=scope)
        added = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", **self._cors(headers)}
        status = 500

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(added)
            await send(message)

        started = time.monotonic()
        with self._counted(scope["path"]):
            try:
                response = self._answer(scope, headers)
                await (self._app if response is None else response)(scope, receive, send_with_headers)
            finally:
                self._metrics.request_ended(scope["path"], status, time.monotonic() - started)

    async def wait_idle(self, timeout: float) -> bool:
        """Wait until no request is being answered; False if that takes longer than `timeout` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while self.active:
                    self._idle.clear()
                    await self._idle.wait()
        return self.active == 0

    @contextlib.contextmanager
    def _counted(self, path: str) -> Iterator[None]:
        counts = path not in _ALWAYS
        self.active += counts
        try:
            yield
        finally:
            self.active -= counts
            self._idle.set()

    def _answer(self, scope: Scope, headers: Headers) -> Response | None:
        """The response to a request that goes no further; None for others."""
        try:
            self._check_origin(headers)
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                return Response(status_code=204)
            if scope["path"] == "/healthz":
                return JsonResponse({"status": "draining" if self.draining else "ok"}, 503 if self.draining else 200)
            if self.draining and scope["path"] not in _ALWAYS:
                raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after=10)
            if scope["path"] not in _OPEN:
                self._check_key(headers)
        except ApiError as error:
            return error.response({"WWW-Authenticate": "Bearer"} if error.status == 401 else None)
        return None

    def _check_origin(self, headers: Headers) -> None:
        host = headers.get("host", "")
        known = self._settings.local_hosts
        if known is not None and _host_name(host) not in known:
            raise ApiError(403, f"Host: {host[:100]!r} is not a name of this server; use {sorted(known)[0]}", code="wrong_host")
        origin = headers.get("origin")
        if origin not in (None, f"http://{host}", f"https://{host}", self._settings.allow_origin or None):
            message = f"pages of {str(origin)[:100]!r} may not use this server; --allow_origin allows one origin"
            raise ApiError(403, message, code="wrong_origin")

    def _check_key(self, headers: Headers) -> None:
        if not self._settings.api_key:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip().encode("latin-1", "replace")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given, self._settings.api_key.encode()):
            message = "this server needs an API key: send the header 'Authorization: Bearer KEY'"
            raise ApiError(401, message, code="invalid_api_key")

    def _cors(self, headers: Headers) -> dict[str, str]:
        allowed = self._settings.allow_origin
        if not allowed or headers.get("origin") != allowed:
            return {}
        return {
            "Access-Control-Allow-Origin": allowed,
            "Access-Control-Allow-Methods": "GET, POST",
            "Access-Control-Allow-Headers": "Authorization, Content-Type",
            "Access-Control-Max-Age": "600",
            "Vary": "Origin",
        }


def _host_name(host: str) -> str:
    """The name in a Host header, without port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()
