"""One value that says who this process is among the others, passed to whatever needs it and never global.

`torchrun` describes the processes in environment variables; they are read here, once. Collectives run over gloo for
tensors in host memory and over NCCL for those on a GPU, so that small decisions (has anyone been asked to stop?) never
wait for the GPU. With a `rank_timeout` a heartbeat (`watch.py`) ends the job when a process dies or hangs.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from bardling.distributed.device import choose_device
from bardling.distributed.threads import cpu_quota, settle_threads
from bardling.distributed.watch import Watch, lost_connection
from bardling.errors import Terminated, UserError

T = TypeVar("T")

# A collective that waits longer than this for the others fails. The heartbeat notices dead and stuck processes earlier; this is
# what is left without it, so it only has to be longer than any work that one process does while the others wait.
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Context:
    """A process among `world_size`, and the device it computes on."""

    rank: int
    world_size: int
    device: torch.device
    watch: Watch | None = field(default=None, compare=False, repr=False)  # the heartbeat, where there are several processes

    @property
    def is_primary(self) -> bool:
        """Whether this process does what only one may do: log, print, save."""
        return self.rank == 0

    def doing(self, activity: str, patience: float | None = None) -> None:
        """Say what begins now, for the message should this process die or hang in it.

        Args:
            patience: seconds that it may take; unset takes `train.rank_timeout`.
        """
        if self.watch is not None:
            self.watch.doing(activity, patience)

    def moved(self) -> None:
        """Say that the activity goes on."""
        if self.watch is not None:
            self.watch.moved()

    def steady(self) -> None:
        """Say that a step has been done, with all that is slow the first time."""
        if self.watch is not None:
            self.watch.steady()

    def unsteady(self) -> None:
        """Say that the next step may be as slow as the first one: compiled for another shape, say."""
        if self.watch is not None:
            self.watch.unsteady()

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """Tell the heartbeat that this process waits for the others."""
        if self.watch is None:
            yield
            return
        self.watch.enter()
        yield  # after a failure this process still counts as waiting, which it was
        self.watch.left()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over all processes, in place; returns it."""
        if self.world_size > 1:
            with self._together():
                dist.all_reduce(tensor)
        return tensor

    def largest(self, value: int) -> int:
        """The largest `value` of all processes (each at most 2**31 - 1); all must ask."""
        if self.world_size == 1:
            return value
        votes = torch.tensor([value], dtype=torch.int32)  # in host memory: does not wait for the GPU
        with self._together():
            dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return int(votes.item())

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in at least one process; all processes must ask."""
        return bool(self.largest(int(flag)))

    def broadcast(self, value: T) -> T:
        """The primary's `value`, in all processes."""
        if self.world_size == 1:
            return value
        box: list[T] = [value]
        with self._together():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.any(False)


SINGLE = Context(rank=0, world_size=1, device=torch.device("cpu"))


@contextlib.contextmanager
def distributed(device: str, *, rank_timeout: float = 0.0) -> Iterator[Context]:
    """Join the processes that `torchrun` started (or be the only one); leaves them in order at the end. On a CPU, threads are
    from then on no more than the cores that this process may use.

    Args:
        device: as `RunConfig.device`.
        rank_timeout: seconds of silence, or without progress, after which a process counts as dead and the job is ended; 0:
            never.

    Raises:
        JobLost: another process has died; the message names it.
    """
    try:
        rank, local_rank, world_size = (int(os.environ.get(name, default)) for name, default in _VARIABLES)
    except ValueError:
        raise UserError("RANK, LOCAL_RANK and WORLD_SIZE must be whole numbers: start with torchrun, or unset them") from None
    own = choose_device(device, local_rank)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    elif own.type == "cpu":
        settle_threads(cpu_quota())
    if world_size == 1:
        yield Context(0, 1, own)
        return
    if own.type == "mps":
        raise UserError("device = 'mps' cannot be shared by several processes: start one, or use --device cpu")
    if own.type == "cuda" and device not in ("auto", "cuda"):
        raise UserError(f"device = {device!r} with {world_size} processes: use 'cuda', so that each process takes its own GPU")
    backend = "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo"
    store: Any = _store(rank, world_size)  # Any: the stubs lack `clone`
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    watch = Watch(store.clone(), rank, world_size, rank_timeout) if rank_timeout else None
    ended = "done"
    try:
        if watch is not None:
            watch.start()
        context = Context(rank, world_size, own, watch)
        yield context
        context.doing("leaving")
        context.barrier()  # no process leaves while another still needs it
    except BaseException as error:
        ended = type(error).__name__
        # torchrun answers the death of one process by asking the others to end: then, too, that death is what there is to say.
        if watch is not None and (lost_connection(error) or (isinstance(error, Terminated) and watch.missing())):
            watch.explain(error)
        raise
    finally:
        if watch is not None:
            watch.close(ended)
        dist.destroy_process_group()


def _attempt() -> str:
    """A name that no earlier attempt of the same job had.

    torchrun may keep one store over its restarts: without a name of its own, a new attempt would find the dead one's addresses.
    """
    return f"bardling/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _store(rank: int, world_size: int) -> PrefixStore:
    """The store where the processes find each other: torchrun's, or the first process's, at MASTER_ADDR:MASTER_PORT."""
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdecimal():
        raise UserError("MASTER_ADDR and MASTER_PORT must say where the first process is: start with torchrun, or set them")
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(host, int(port), world_size, is_master=rank == 0 and not hosted, timeout=TIMEOUT, multi_tenant=not hosted)
    return PrefixStore(_attempt(), store)


_VARIABLES = (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"))
