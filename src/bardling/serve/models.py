"""Models in memory: loaded at first use; idle ones are unloaded when another needs the memory, least recently used first.

Method: a model's memory is that of its weights, plus the KV cache of all slots and of the texts kept after they have finished,
at full length. Models are loaded one at a time, in a thread.

Limits: while a model loads, its float32 weights briefly exist twice.
"""

import asyncio
import contextlib
import gc
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import partial

import torch

from bardling.checkpoint.load import load
from bardling.config import ModelConfig
from bardling.data.tokens.chat_template import ChatTemplate
from bardling.data.tokens.tokenizer import Tokenizer
from bardling.distributed.device import choose_device, free_memory
from bardling.errors import UserError, out_of_memory
from bardling.generation.engine import Engine
from bardling.generation.weights import convert_weights
from bardling.model.gpt import GPT
from bardling.monitor.format import size_bytes
from bardling.planning.costs import weight_bytes
from bardling.serve.catalog import Catalog, Model
from bardling.serve.errors import ApiError
from bardling.serve.metrics import Metrics
from bardling.serve.settings import Settings
from bardling.serve.worker import Worker

_RETAINED = 4  # finished texts whose keys and values are kept, for conversations that go on
_FRACTION_OF_FREE = 0.7  # of the memory that is free at the start; the rest is for activations and other programs


@dataclass
class Loaded:
    """A model in memory."""

    name: str
    config: ModelConfig
    tokenizer: Tokenizer
    template: ChatTemplate | None  # of chats; None: the model has none
    worker: Worker
    size: int  # bytes
    users: int = 0  # requests that use it now
    used: float = field(default_factory=time.monotonic)  # when a request last began or ended


class Models:
    """The models of a server. Use it in one event loop.

    Raises:
        UserError: a model that was given does not exist, or cannot be read.
    """

    def __init__(self, catalog: Catalog, settings: Settings, metrics: Metrics) -> None:
        self.catalog = catalog
        self._settings, self._metrics = settings, metrics
        self.device = choose_device(settings.device)
        free = free_memory(self.device)
        automatic = None if free is None else int(_FRACTION_OF_FREE * free)
        self.limit = automatic if settings.memory_gb is None else int(settings.memory_gb * 1e9)
        self.loaded: dict[str, Loaded] = {}  # by what `load` opened
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._one_at_a_time = asyncio.Lock()

    async def find(self, name: str | None) -> Model:
        """The model of a name; None: the first. An `ApiError` if there is none."""
        try:
            return await asyncio.to_thread(self.catalog.find, name)
        except UserError as error:
            raise ApiError(500, str(error), param="model", code="model_unavailable") from None

    @contextlib.asynccontextmanager
    async def using(self, name: str | None) -> AsyncIterator[Loaded]:
        """The model of a name, loaded; it stays until the context ends.

        Raises:
            ApiError: 404 if there is none, 503 if it does not fit beside those in use, 500 if it cannot be read.
        """
        model = await self.find(name)
        key = str(model.path)
        while (found := self.loaded.get(key)) is None or found.worker.failed:
            if key not in self._tasks:
                self._tasks[key] = asyncio.create_task(self._load(model, key))
                self._tasks[key].add_done_callback(partial(self._loading_ended, key))
            await asyncio.shield(self._tasks[key])  # it goes on for others if this request is cancelled
        found.users += 1
        try:
            yield found
        finally:
            found.users -= 1
            found.used = time.monotonic()

    async def tokenizer(self, model: Model) -> Tokenizer:
        """The tokenizer of a model, which need not be loaded for that, if it has one beside it."""
        if model.source.tokenizer is not None:
            return model.source.tokenizer
        async with self.using(model.id) as loaded:
            return loaded.tokenizer

    async def close(self) -> None:
        """Stop all workers."""
        for key in list(self.loaded):
            await self._unload(key)

    @property
    def size(self) -> int:
        """Bytes of all loaded models."""
        return sum(each.size for each in self.loaded.values())

    def _loading_ended(self, key: str, task: asyncio.Task[None]) -> None:
        del self._tasks[key]
        if not task.cancelled():
            task.exception()  # those who wait for it raise it; without them, asyncio would complain

    async def _load(self, model: Model, key: str) -> None:
        async with self._one_at_a_time:
            if key in self.loaded:  # its worker has failed
                await self._unload(key)
            if model.source.config is not None:
                await self._make_room(model.id, self._needed(model.source.config))
            try:
                network, tokenizer, size = await asyncio.to_thread(self._open, model)
            except (UserError, OSError, MemoryError, RuntimeError) as error:
                if out_of_memory(error):
                    raise ApiError(503, f"{model.id}: memory ran out", param="model", code="out_of_memory") from None
                if isinstance(error, RuntimeError):
                    raise
                raise ApiError(500, str(error), param="model", code="model_unavailable") from None
            await self._make_room(model.id, size)
            engine = Engine(network, tokenizer, slots=self._settings.slots, retained=_RETAINED)
            slots, waiting = self._settings.slots, self._settings.queue
            worker = Worker(engine, slots=slots, waiting=waiting, metrics=self._metrics, name=model.id)
            template = None if tokenizer.interface.chat_template is None else ChatTemplate(tokenizer.interface)
            self.loaded[key] = Loaded(model.id, network.config, tokenizer, template, worker, size)
            self._metrics.loads += 1

    def _open(self, model: Model) -> tuple[GPT, Tokenizer, int]:
        """Read a model (in a thread)."""
        run = model.source.run
        if run is not None and (problems := run.store().verify(model.path)):
            raise UserError(f"{model.path}: is damaged: {problems[0]}")
        found = load(model.path)
        tokenizer = found.needed_tokenizer()
        network = convert_weights(found.build().to(self.device), self._settings.weights)
        tensors = [*network.parameters(), *network.buffers()]
        weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        model.source.config, model.source.tokenizer = found.config, tokenizer
        return network, tokenizer, weights + self._cache_bytes(found.config)

    def _needed(self, config: ModelConfig) -> int:
        """At most the bytes of a model, from its configuration."""
        width = 2 if self._settings.weights in ("bfloat16", "int8") else 4
        return weight_bytes(config) * width // torch.float32.itemsize + self._cache_bytes(config)

    def _cache_bytes(self, config: ModelConfig) -> int:
        tokens = (self._settings.slots + _RETAINED) * config.block_size
        return 2 * config.n_layer * config.architecture.kv_width * tokens * torch.float32.itemsize

    async def _make_room(self, name: str, needed: int) -> None:
        """Unload idle models until `needed` more bytes fit."""
        while self.limit is not None and self.size + needed > self.limit:
            idle = [key for key, each in self.loaded.items() if each.users == 0]
            if not idle:
                advice = "raise --memory_gb, or lower --slots" if not self.loaded else "try again when other models are idle"
                message = f"{name} needs {size_bytes(needed)}; {size_bytes(self.limit)} are allowed"
                beside = f", of which other models use {size_bytes(self.size)}" if self.loaded else ""
                raise ApiError(503, f"{message}{beside}: {advice}", param="model", code="out_of_memory", retry_after=5)
            await self._unload(min(idle, key=lambda key: self.loaded[key].used))
            gc.collect()  # a model's parts may refer to each other
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    async def _unload(self, key: str) -> None:
        loaded = self.loaded.pop(key)
        await loaded.worker.stop()
        if loaded.template is not None:
            await asyncio.to_thread(loaded.template.close)
