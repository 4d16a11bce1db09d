"""Drives a model's inference engine in a thread of its own, and delivers its outputs to the event loop.

The event loop sends commands (submit, cancel) through a queue, which the thread empties before each step: a request that is
cancelled frees its slot within one step. The outputs of a step return in one callback. Counts and bounds are kept in the event
loop, so that admission needs no lock.

Limits: if a step fails, all requests of the model fail, and the model must be loaded again.
"""

import asyncio
import contextlib
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from bardling.errors import UserError, out_of_memory
from bardling.generation.engine import Engine
from bardling.generation.requests import Output, Request
from bardling.serve.errors import ApiError
from bardling.serve.metrics import Metrics

_log = logging.getLogger(__name__)


class Job:
    """The completions of one HTTP request.

    Attributes:
        outputs: (number of a completion, its next output), or an error that ends all of them.
        open: completions that have not ended.
    """

    def __init__(self, count: int) -> None:
        self.outputs: asyncio.Queue[tuple[int, Output] | ApiError] = asyncio.Queue()
        self.open = count
        self.started = time.monotonic()


class Worker:
    """Runs an engine; every method is called in the event loop.

    Args:
        engine: used by this worker's thread only.
        slots: completions that it generates at the same time.
        waiting: completions that may wait for a slot.

    Attributes:
        pending: completions that run or wait.
        failed: whether a step has failed.
    """

    def __init__(self, engine: Engine, *, slots: int, waiting: int, metrics: Metrics, name: str) -> None:
        self._engine, self._slots, self._limit, self._metrics = engine, slots, slots + waiting, metrics
        self._loop = asyncio.get_running_loop()
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._owners: dict[int, tuple[Job, int]] = {}  # of the engine's requests; used by the thread only
        self._jobs: set[Job] = set()
        self._stopping = False
        self._seconds = 1.0  # of a request, a running mean
        self.pending = 0
        self.failed = False
        self._thread = threading.Thread(target=self._run, name=f"engine {name}", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        return min(self.pending, self._slots)

    @property
    def waiting(self) -> int:
        return self.pending - self.running

    @contextlib.contextmanager
    def job(self, requests: Sequence[Request]) -> Iterator[Job]:
        """Generate the completions of `requests`; what has not ended with the context is cancelled.

        Raises:
            ApiError: 429 if too many completions wait, 400 if they could never all wait, 503 if the model has failed.
        """
        if self.failed:
            raise ApiError(503, "the model has failed and is loaded again: try again", code="model_failed", retry_after=1)
        count = len(requests)
        if count > self._limit:
            raise ApiError(400, f"{count} completions of one request exceed the limit of {self._limit}", param="n")
        if self.pending + count > self._limit:
            wait = math.ceil(self._seconds * max(1, self.pending - self._slots) / self._slots)
            message = f"{self.pending} completions are running or waiting: try again later"
            raise ApiError(429, message, code="queue_full", retry_after=min(60, max(1, wait)))
        job = Job(count)
        self._jobs.add(job)
        self.pending += count
        self._commands.put(partial(self._submit, job, requests))
        try:
            yield job
        finally:
            self._jobs.discard(job)
            self.pending -= job.open
            if job.open:
                self._metrics.cancelled += job.open
                self._commands.put(partial(self._cancel, job))
            else:
                self._seconds += 0.1 * (time.monotonic() - job.started - self._seconds)
            job.open = 0

    def end_all(self, error: ApiError) -> None:
        """End every request with an error."""
        for job in self._jobs:
            job.outputs.put_nowait(error)

    async def stop(self) -> None:
        """End the thread after its current step."""
        self._commands.put(self._stop)
        await asyncio.to_thread(self._thread.join)

    # In the event loop, called by the thread:

    def _deliver(self, outputs: Sequence[tuple[Job, int, Output]]) -> None:
        for job, number, output in outputs:
            self._metrics.generated_tokens += output.token is not None
            if job in self._jobs:
                job.outputs.put_nowait((number, output))
                if output.finish is not None:
                    job.open -= 1
                    self.pending -= 1

    def _refuse(self, job: Job, error: ApiError) -> None:
        job.outputs.put_nowait(error)

    def _fail(self, error: ApiError) -> None:
        self.failed = True
        self.end_all(error)

    # In the thread:

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._obey()
                if self._owners and not self._stopping:
                    self._hand_over(self._engine.step())
        except Exception as error:  # noqa: BLE001  whatever a model raises ends its requests, not the server
            if not isinstance(error, UserError):
                _log.exception("the model failed and will be loaded again")
            reason = str(error) if isinstance(error, UserError) else "the model failed; see the server's log"
            if out_of_memory(error):
                reason = "memory ran out; use fewer --slots, or a smaller model"
            self._loop.call_soon_threadsafe(self._fail, ApiError(500, reason, code="model_failed"))

    def _obey(self) -> None:
        """Run all commands; without requests, wait for one first."""
        wait = not self._owners
        with contextlib.suppress(queue.Empty):
            while not self._stopping:
                self._commands.get(block=wait)()
                wait = False

    def _hand_over(self, outputs: Sequence[Output]) -> None:
        found = []
        for output in outputs:
            job, number = self._owners[output.request]
            if output.finish is not None:
                del self._owners[output.request]
            found.append((job, number, output))
        if found:
            self._loop.call_soon_threadsafe(self._deliver, found)

    def _submit(self, job: Job, requests: Sequence[Request]) -> None:
        try:
            for number, request in enumerate(requests):
                self._owners[self._engine.submit(request)] = job, number
        except UserError as error:
            self._cancel(job)
            self._loop.call_soon_threadsafe(self._refuse, job, ApiError(400, str(error)))

    def _cancel(self, job: Job) -> None:
        for request in [request for request, (owner, _) in self._owners.items() if owner is job]:
            self._engine.cancel(request)
            del self._owners[request]

    def _stop(self) -> None:
        self._stopping = True
