"""The routes of the server."""

import asyncio
import base64
import contextlib
import hashlib
import re
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from sse_starlette.sse import EventSourceResponse, SendTimeoutError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from bardling.data.text.fields import valid_text
from bardling.serve.answers import Answer, encode_prompt, encode_prompts, engine_requests
from bardling.serve.catalog import Model
from bardling.serve.errors import ApiError, JsonResponse
from bardling.serve.metrics import Metrics
from bardling.serve.models import Models
from bardling.serve.requests import Fields, Generation, parse_chat, parse_completion, parse_json, refuse
from bardling.serve.responses import token_text
from bardling.serve.settings import Settings

Handler = Callable[[Request, AsyncExitStack], Awaitable[Response]]
T = TypeVar("T")

_BODY_SECONDS = 30.0  # in which a body must arrive
_STUCK_SECONDS = 60.0  # after which a client that reads nothing is disconnected
_MAX_IDS = 1 << 20
_PAGE = Path(__file__).with_name("page.html")


class Endpoint:
    """A handler as an ASGI application: what it enters on its stack lasts until its response has been sent."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with AsyncExitStack() as stack:
            response = await self._handler(Request(scope, receive, send), stack)
            with contextlib.suppress(SendTimeoutError):
                await response(scope, receive, send)


class Api:
    """The handlers of all routes."""

    def __init__(self, models: Models, settings: Settings, metrics: Metrics) -> None:
        self._models, self._settings, self._metrics = models, settings, metrics
        self._page, self._policy = page()

    def application(self) -> Starlette:
        generate = {"/v1/completions": parse_completion, "/v1/chat/completions": parse_chat}
        posts: dict[str, Handler] = {path: partial(self._generate, parse) for path, parse in generate.items()}
        posts |= {"/tokenize": self._tokenize, "/detokenize": self._detokenize}
        gets: dict[str, Handler] = {"/": self._show_page, "/metrics": self._show_metrics}
        gets |= {"/v1/models": self._list_models, "/v1/models/{id:path}": self._show_model}
        routes = [Route(path, Endpoint(handler), methods=["POST"]) for path, handler in posts.items()]
        routes += [Route(path, Endpoint(handler), methods=["GET"]) for path, handler in gets.items()]
        handlers = {ApiError: _api_error, HTTPException: _http_error, ClientDisconnect: _client_gone, Exception: _bug}
        return Starlette(routes=routes, exception_handlers=handlers)  # type: ignore[arg-type]

    async def _generate(
        self, parse: Callable[[dict[str, Any]], Generation], request: Request, stack: AsyncExitStack
    ) -> Response:
        deadline = asyncio.get_running_loop().time() + self._settings.timeout
        generation = parse(await self._body(request))
        try:
            async with asyncio.timeout_at(deadline):
                loaded = await stack.enter_async_context(self._models.using(generation.model))
                prompts = await encode_prompts(generation, loaded)
        except TimeoutError:
            raise ApiError(504, "the model could not be loaded in time", code="timeout") from None
        requests = engine_requests(generation, prompts, loaded, self._settings.max_tokens)
        job = stack.enter_context(loaded.worker.job(requests))
        self._metrics.prompt_tokens += sum(len(prompt.ids) for prompt in prompts)
        answer = Answer(generation, prompts, loaded, job, deadline)
        if generation.stream:
            return EventSourceResponse(answer.events(), sep="\n", send_timeout=_STUCK_SECONDS)
        return JsonResponse(await _while_connected(request, answer.whole()))

    async def _tokenize(self, request: Request, _: AsyncExitStack) -> Response:
        fields = Fields(await self._body(request))
        text, name = fields.text("prompt", self._settings.max_body), fields.text("model", self._settings.max_body)
        special = fields.boolean("add_special_tokens", default=True)
        fields.refuse_rest()
        if text is None:
            refuse("prompt", None, "must be a string")
        model = await self._models.find(name)
        tokenizer = await self._models.tokenizer(model)
        ids = (await asyncio.to_thread(encode_prompt, valid_text(text), tokenizer, special)).ids
        texts, config = [token_text(tokenizer, token) for token in ids], model.source.config
        context = None if config is None else config.block_size
        return JsonResponse({"tokens": ids, "texts": texts, "count": len(ids), "context": context})

    async def _detokenize(self, request: Request, _: AsyncExitStack) -> Response:
        fields = Fields(await self._body(request))
        ids, name = fields.take("tokens"), fields.text("model", self._settings.max_body)
        fields.refuse_rest()
        tokenizer = await self._models.tokenizer(await self._models.find(name))
        valid = isinstance(ids, list) and all(type(token) is int and 0 <= token < tokenizer.vocab_size for token in ids)
        if not valid:
            refuse("tokens", ids, f"must be a list of token ids below {tokenizer.vocab_size:,}")
        text = await asyncio.to_thread(tokenizer.decode, ids)
        return JsonResponse({"prompt": text, "texts": [token_text(tokenizer, token) for token in ids]})

    async def _list_models(self, request: Request, _: AsyncExitStack) -> Response:
        models = await asyncio.to_thread(self._models.catalog.models)
        return JsonResponse({"object": "list", "data": [await self._described(model) for model in models]})

    async def _show_model(self, request: Request, _: AsyncExitStack) -> Response:
        return JsonResponse(await self._described(await self._models.find(request.path_params["id"])))

    async def _described(self, model: Model) -> dict[str, Any]:
        loaded = str(model.path) in self._models.loaded
        return await asyncio.to_thread(self._models.catalog.describe, model, loaded=loaded)

    async def _show_page(self, request: Request, _: AsyncExitStack) -> Response:
        return HTMLResponse(self._page, headers={"Content-Security-Policy": self._policy, "Cache-Control": "no-cache"})

    async def _show_metrics(self, request: Request, _: AsyncExitStack) -> Response:
        loaded = list(self._models.loaded.values())
        gauges = {
            "completions_running": ("Completions being generated", [(_label(m.name), m.worker.running) for m in loaded]),
            "completions_waiting": ("Completions waiting", [(_label(m.name), m.worker.waiting) for m in loaded]),
            "models_loaded": ("Models in memory", [("", len(loaded))]),
            "models_bytes": ("Memory of the models", [("", self._models.size)]),
        }
        return PlainTextResponse(self._metrics.text(gauges), media_type="text/plain; version=0.0.4")

    async def _body(self, request: Request) -> dict[str, Any]:
        """The JSON object in a request's body."""
        limit, data = self._settings.max_body, bytearray()
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for chunk in request.stream():
                    data += chunk
                    if len(data) > limit:
                        raise ApiError(413, f"the body is larger than {limit:,} bytes", code="body_too_large")
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive in {_BODY_SECONDS:g} seconds", code="timeout") from None
        return parse_json(bytes(data))


def page() -> tuple[str, str]:
    """The page at /, and its Content-Security-Policy, which allows nothing but the page's own script and style."""
    text = _PAGE.read_text(encoding="utf-8")

    def hashes(element: str) -> str:
        contents = re.findall(rf"<{element}\b[^>]*>(.*?)</{element}>", text, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() for content in contents)
        return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"

    own = f"script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; img-src data:"
    return text, f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


async def _while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, unless the client disconnects first."""

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.create_task(leave())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


def _label(model: str) -> str:
    escaped = model.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return f'{{model="{escaped}"}}'


async def _api_error(request: Request, error: ApiError) -> Response:
    return error.response()


async def _http_error(request: Request, error: HTTPException) -> Response:
    path, method = request.url.path[:200], request.method
    message = f"{method} is not allowed for {path!r}" if error.status_code == 405 else f"there is nothing at {path!r}"
    return ApiError(error.status_code, message, code="not_found" if error.status_code == 404 else None).response(error.headers)


async def _client_gone(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)  # nobody reads it; it is counted


async def _bug(request: Request, error: Exception) -> Response:
    return ApiError(500, "internal error; see the server's log", code="internal_error").response()
