"""Reads an iterable in a thread, some items ahead of the consumer, so that reading overlaps with other work.

Limits: on leaving, the thread is not waited for, because it may be waiting for a slow disk or server; it ends after its item.
"""

import queue
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
_CHECK = 0.5  # seconds after which a thread that waits to hand over an item looks whether anyone still wants it


@contextmanager
def read_ahead(items: Iterable[T], count: int) -> Iterator[Iterator[T]]:
    """The items in order, of which up to `count` wait in memory. An exception of the iterable comes in its place."""
    waiting: queue.Queue[tuple[list[T], BaseException | None]] = queue.Queue(count)
    left = threading.Event()

    def hand_over(entry: tuple[list[T], BaseException | None]) -> None:
        while not left.is_set():
            try:
                waiting.put(entry, timeout=_CHECK)
            except queue.Full:
                continue
            return

    def read() -> None:
        end: BaseException | None = None
        try:
            for item in items:
                hand_over(([item], None))
                if left.is_set():
                    return
        except BaseException as error:  # noqa: BLE001  it is raised in the consumer
            end = error
        hand_over(([], end))

    def consume() -> Iterator[T]:
        while True:
            found, error = waiting.get()
            yield from found
            if error is not None:
                raise error
            if not found:
                return

    threading.Thread(target=read, name="read-ahead", daemon=True).start()
    try:
        yield consume()
    finally:
        left.set()
