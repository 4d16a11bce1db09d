"""Work that may fail without ending the run: samples and tasks.

All processes do such work together, so one whose part fails must not leave the others waiting in a collective. Before every
collective of this work, the processes therefore tell each other whether one of them has failed, and then all give up together.

Limits: a forward pass that is itself collective (sharded weights) cannot be given up by one process alone; the heartbeat ends
the job in that case.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import torch

from bardling.distributed.context import SINGLE, Context
from bardling.distributed.heartbeat import lost_connection
from bardling.errors import JobLost
from bardling.evaluate.loss import Interrupted
from bardling.planning.layout import DATA_AXES
from bardling.training.recovery.signals import Stopped

T = TypeVar("T")


class PeerFailed(Exception):  # noqa: N818  the failure is another process's
    """Another process has given up the work that all do together."""


@dataclass(frozen=True)
class WatchfulContext(Context):
    """A context whose collectives raise `PeerFailed` in all processes that still work, once one has failed."""

    inner: Context = SINGLE

    @classmethod
    def of(cls, context: Context) -> "WatchfulContext":
        return cls(**{item.name: getattr(context, item.name) for item in fields(Context)}, inner=context)

    def agree(self, *, failed: bool) -> None:
        """Tell the other processes whether this one has failed, and learn whether another has. Collective."""
        if self.inner.any(failed) and not failed:
            raise PeerFailed("another process failed; its message has the reason")

    def sum(self, tensor: torch.Tensor, axes: Sequence[str] = DATA_AXES) -> torch.Tensor:
        self.agree(failed=False)
        return self.inner.sum(tensor, axes)

    def largest(self, value: int) -> int:
        self.agree(failed=False)
        return self.inner.largest(value)

    def any(self, flag: bool) -> bool:
        self.agree(failed=False)
        return self.inner.any(flag)

    def broadcast(self, value: T) -> T:
        self.agree(failed=False)
        return self.inner.broadcast(value)


def attempt(work: Callable[[], None], context: WatchfulContext) -> BaseException | None:
    """Do `work`, whose collectives all use `context`; returns the error if it fails in any process. Collective.

    Requests to stop and lost processes are raised as usual.
    """
    try:
        work()
    except (Interrupted, Stopped, JobLost):  # in all processes alike
        raise
    except PeerFailed as error:
        return error
    except BaseException as error:
        if not is_failure(error) or lost_connection(error):
            raise
        context.agree(failed=True)
        return error
    try:
        context.agree(failed=False)
    except PeerFailed as error:
        return error
    return None


def is_failure(error: BaseException) -> bool:
    """Whether an error is a failure and not a request to end; panics of Rust libraries do not derive from `Exception`."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"
