"""One piece of work at a time in a thread of its own, whose failure is kept until somebody asks for it."""

import threading
from collections.abc import Callable


class Background:
    """Runs jobs one after the other, each in the background; a failed job never disturbs who started it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def start(self, job: Callable[[], object]) -> None:
        """Begin `job` once the one before it is done. Take the latter's failure first: it is forgotten otherwise."""
        self.wait()
        self._failure = None
        # Not a daemon: Python waits for it at its own end, whatever ended the main thread.
        self._thread = threading.Thread(target=self._run, args=(job,), name=self._name)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a job is going on."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Return when no job is going on."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def take_failure(self) -> BaseException | None:
        """The failure of the last job, once, when it is over."""
        if self.busy:
            return None
        failure, self._failure = self._failure, None
        return failure

    def _run(self, job: Callable[[], object]) -> None:
        try:
            job()
        except BaseException as error:  # noqa: BLE001  kept for who asks: a thread has nobody above it
            self._failure = error
