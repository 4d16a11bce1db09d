"""Several processes write one checkpoint: the first creates the folder and completes it once all have written their part.

The background threads of the processes talk through the store of the job, because collectives belong to the main threads,
which train meanwhile. A process that fails reports why, and the first one then gives up the checkpoint for all.

Limits: the folder of the run must be the same for all processes, as on a shared file system.
"""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from bardling.distributed.context import Context
from bardling.errors import JobLost, UserError
from bardling.files.atomic import os_reason

_PATIENCE = timedelta(minutes=30)


class JointWrite:
    """The meetings of the processes that write checkpoints together.

    Args:
        writer: number of this process among the `writers`; the first one is 0.
    """

    def __init__(self, context: Context, writer: int, writers: int) -> None:
        store: Any = context.store
        self._store = store.clone()
        self.writer, self._writers = writer, writers
        self._number = 0  # of the save, which all processes count alike

    def lead(self, save: Callable[[Callable[[Path], None]], object], write: Callable[[Path], None]) -> None:
        """In the first process: `save` creates a folder, passes it to the function that it gets, and completes it.

        Raises:
            UserError: a part could not be written.
        """
        self._number += 1
        opened = False

        def write_all(folder: Path) -> None:
            nonlocal opened
            opened = True
            self._store.set(self._key("folder"), str(folder))
            write(folder)
            problems = [self._answer(f"part {other}") for other in range(1, self._writers)]
            if found := next(filter(None, problems), None):
                raise UserError(found)

        try:
            save(write_all)
        finally:
            if not opened:
                self._store.set(self._key("folder"), "")

    def follow(self, write: Callable[[Path], None]) -> None:
        """In the others: write this process's part into the folder, once it exists."""
        self._number += 1
        problem = f"rank {self.writer} failed to write its part"
        try:
            if folder := self._answer("folder"):
                write(Path(folder))
            problem = ""
        except OSError as error:
            place = error.filename or folder
            problem = f"{place}: rank {self.writer} cannot write its part ({os_reason(error)}); is the folder shared?"
        finally:
            self._store.set(self._key(f"part {self.writer}"), problem)

    def _key(self, name: str) -> str:
        return f"checkpoint {self._number}/{name}"

    def _answer(self, name: str) -> str:
        """The value of a key that another process sets."""
        try:
            self._store.wait([self._key(name)], _PATIENCE)
        except RuntimeError as error:
            raise JobLost(f"a process did not write its part of a checkpoint: {str(error).splitlines()[0]}") from None
        return str(self._store.get(self._key(name)).decode())
