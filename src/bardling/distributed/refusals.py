"""One voice for all processes of a job: a refusal that all of them come to is printed once.

Every process counts its refusal, by its text, at the place where the processes of the job meet; the one that counts first
prints it. A process that cannot count in a few seconds prints, too: a refusal may be printed twice, but never not at all.

A process that has counted waits a little for the others, because a launcher ends all processes as soon as one has ended.
"""

import contextlib
import hashlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

PATIENCE = 5.0
"""Seconds that a process waits for the store, and then for the other processes."""


@contextlib.contextmanager
def one_voice(message: str) -> Iterator[bool]:
    """A context that yields whether this process is the one to print the refusal `message`.

    SIGTERM and SIGINT have no effect in it: a launcher sends one as soon as the first process has ended, and it must not end
    the process that prints.
    """
    with _undisturbed():
        with contextlib.suppress(ImportError):
            import bardling.distributed.rendezvous  # noqa: F401  takes seconds, in which the others import it, too
        count = _Count(message)
        thread = threading.Thread(target=count.run, name="refusal", daemon=True)
        thread.start()
        count.known.wait(2.5 * PATIENCE)
        try:
            yield count.number <= 1
        finally:
            count.printed.set()
            thread.join(PATIENCE)


class _Count:
    """Counts a refusal in a thread, because the address and the store may not answer."""

    def __init__(self, message: str) -> None:
        self.number = 0  # how many processes have come to this refusal, with this one; 0: unknown
        self.known, self.printed = threading.Event(), threading.Event()
        self._key = hashlib.sha256(message.encode("utf-8", "surrogatepass")).hexdigest()

    def run(self) -> None:
        with contextlib.suppress(Exception):  # the refusal itself matters more
            self._run()
        self.known.set()

    def _run(self) -> None:
        from bardling.distributed.rendezvous import Place, environment_number

        world_size = environment_number("WORLD_SIZE", 1, 1, 2**31)
        rank, place = environment_number("RANK", 0, 0, world_size), Place.from_environment()
        place.resolve()
        guest = rank > 0 and not place.hosted  # of rank 0, which prints if it comes to this refusal, too
        if (rank > 0 or place.hosted) and not _within(PATIENCE, place.listens):
            return
        store = place.store(rank, world_size, timedelta(seconds=PATIENCE))
        key = f"bardling/{place.attempt}/refusals/{self._key}"
        if guest:
            _within(PATIENCE, lambda: store.add(key, 0) > 0)
        self.number = store.add(key, 1)
        self.known.set()
        self.printed.wait(PATIENCE)
        if not guest:  # whom the store of rank 0 would leave in the middle of an answer
            _within(PATIENCE, lambda: store.add(key, 0) >= world_size)


def _within(seconds: float, condition: Callable[[], bool]) -> bool:
    """Wait until the condition holds; whether it does."""
    end = time.monotonic() + seconds
    while not (holds := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return holds


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Ignore SIGTERM and SIGINT."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
