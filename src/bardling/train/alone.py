"""One job at a time trains a run: two would replace each other's figures and checkpoints."""

import contextlib
from collections.abc import Iterator

from bardling.checkpoint.runfolder import RunFolder
from bardling.distributed.context import Context
from bardling.errors import UserError
from bardling.lock import locked

PATIENCE = 5.0
"""Seconds to wait for another job: one that was just killed may take a moment to be gone."""


@contextlib.contextmanager
def alone(folder: RunFolder, context: Context) -> Iterator[None]:
    """Hold the run, for all processes of this job.

    Raises:
        UserError: another job does.
    """
    with contextlib.ExitStack() as held:
        refusal = None
        if context.is_primary:
            taken = f"{folder.path}: another process is training this run: let it end, or stop it first"
            try:
                held.enter_context(locked(folder.lock_file, patience=PATIENCE, taken=taken))
            except UserError as error:
                refusal = str(error)
        refusal = context.broadcast(refusal)
        if refusal is not None:
            raise UserError(refusal)
        try:
            yield
        finally:
            if context.is_primary:
                with contextlib.suppress(OSError):  # left behind it is in nobody's way
                    folder.lock_file.unlink(missing_ok=True)
