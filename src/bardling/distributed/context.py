"""The identity of this process among the processes of a run, passed as a value and never global.

`torchrun` describes the processes in environment variables, which are read only here. The processes form a device mesh with the
axes of `planning/layout.py`. The data axes decide which samples a process trains on and seed its dropout; the
global rank is for logging and launching only. Collectives on tensors in host memory run over gloo, those on GPU tensors over
NCCL, so that small decisions (has any process been asked to stop?) never wait for the GPU. With a `rank_timeout`, a heartbeat
(`heartbeat.py`) ends the job when a process dies or hangs.
"""

import contextlib
import math
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from bardling.distributed.device import choose_device
from bardling.distributed.heartbeat import Heartbeat, lost_connection
from bardling.distributed.threads import cpu_quota, limit_threads
from bardling.errors import Terminated, UserError
from bardling.planning.layout import AXES, DATA_AXES, Layout

T = TypeVar("T")

# Maximum wait for other processes in a collective. The heartbeat detects lost processes earlier; without it, this only has to
# exceed any work that one process does while the others wait.
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Context:
    """One process of a run and the device it computes on."""

    rank: int  # global: for logging and launching
    world_size: int
    device: torch.device
    heartbeat: Heartbeat | None = field(default=None, compare=False, repr=False)  # with several processes only
    mesh: DeviceMesh | None = field(default=None, compare=False, repr=False)  # None: a plain data-parallel layout

    @property
    def is_primary(self) -> bool:
        """Whether this process does what only one process may do: log, print, save."""
        return self.rank == 0

    @property
    def data_size(self) -> int:
        """Number of processes that train on different samples."""
        return self.world_size if self.mesh is None else self._size(DATA_AXES)

    @property
    def data_rank(self) -> int:
        """Which share of the samples this process trains on: 0 to `data_size` - 1."""
        if self.mesh is None:
            return self.rank
        return self.mesh.get_local_rank("replicate") * self._size(["shard"]) + self.mesh.get_local_rank("shard")

    def _size(self, axes: Sequence[str]) -> int:
        assert self.mesh is not None
        sizes = dict(zip(AXES, self.mesh.shape, strict=True))
        return math.prod(sizes[axis] for axis in axes)

    def arranged(self, layout: Layout) -> "Context":
        """The same process in a device mesh with the given layout. All processes must call this together.

        Raises:
            ValueError: the layout is for another number of processes.
        """
        if layout.world_size != self.world_size:
            raise ValueError(f"the layout {layout.sizes} is for {layout.world_size} processes, but there are {self.world_size}")
        if self.world_size == 1:
            return self  # a mesh needs a process group, which a single process does not have
        return replace(self, mesh=init_device_mesh(self.device.type, layout.sizes, mesh_dim_names=AXES))

    def group(self, axes: Sequence[str] = DATA_AXES) -> dist.ProcessGroup | None:
        """The processes that differ from this one along `axes` only; None for all processes."""
        if self.mesh is None or self._size(axes) == self.world_size:
            return None
        used = tuple(axis for axis in axes if self._size([axis]) > 1) or tuple(axes[:1])
        return self.mesh.get_group(used[0]) if len(used) == 1 else self.mesh[used]._flatten().get_group()

    def activity(self, name: str, patience: float | None = None) -> None:
        """Record the activity that this process starts, for the message in case it dies or hangs.

        Args:
            patience: seconds that the activity may take without progress; None for `train.rank_timeout`.
        """
        if self.heartbeat is not None:
            self.heartbeat.activity(name, patience)

    def progressed(self) -> None:
        """Record progress of the activity."""
        if self.heartbeat is not None:
            self.heartbeat.progressed()

    def warmed_up(self) -> None:
        """Record that a step has completed, so the next ones include no compilation or other first-time work."""
        if self.heartbeat is not None:
            self.heartbeat.warmed_up()

    def warming_up(self) -> None:
        """Record that the next step may be as slow as the first one, because it compiles a new shape."""
        if self.heartbeat is not None:
            self.heartbeat.warming_up()

    @contextlib.contextmanager
    def _collective(self) -> Iterator[None]:
        """Record that this process waits for the others."""
        if self.heartbeat is None:
            yield
            return
        self.heartbeat.enter_collective()
        yield  # after an exception, this process still counts as waiting
        self.heartbeat.leave_collective()

    def sum(self, tensor: torch.Tensor, axes: Sequence[str] = DATA_AXES) -> torch.Tensor:
        """Sum `tensor` over the processes along `axes`, in place; returns it. Collective."""
        if self.world_size > 1 and (self.mesh is None or self._size(axes) > 1):
            with self._collective():
                dist.all_reduce(tensor, group=self.group(axes))
        return tensor

    def largest(self, value: int) -> int:
        """The maximum of `value`, at most 2**31 - 1, over all processes. Collective."""
        if self.world_size == 1:
            return value
        votes = torch.tensor([value], dtype=torch.int32)  # in host memory, to avoid a CPU-GPU sync
        with self._collective():
            dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return int(votes.item())

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process. Collective."""
        return bool(self.largest(int(flag)))

    def broadcast(self, value: T) -> T:
        """The `value` of rank 0, in all processes. Collective."""
        if self.world_size == 1:
            return value
        box: list[T] = [value]
        with self._collective():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def on_primary(self, work: Callable[[], T]) -> T:
        """The result of `work`, which only the primary process runs; its `UserError` is raised in all processes. Collective."""
        if self.world_size == 1:
            return work()
        result: T | None = None
        problem: str | None = None
        if self.is_primary:
            try:
                result = work()
            except UserError as error:
                problem = str(error)
        result, problem = self.broadcast((result, problem))
        if problem is not None:
            raise UserError(problem)
        return cast(T, result)

    def barrier(self) -> None:
        """Wait for all processes. Collective."""
        self.any(False)


SINGLE = Context(rank=0, world_size=1, device=torch.device("cpu"))


@contextlib.contextmanager
def distributed(device: str, *, rank_timeout: float = 0.0) -> Iterator[Context]:
    """Join the processes started by `torchrun`, or run as a single process, and shut down cleanly at the end. On a CPU, this
    also limits the number of threads to the cores that the process may use.

    Args:
        device: as `RunConfig.device`.
        rank_timeout: seconds without heartbeat or progress after which a process counts as lost and the job ends (0 disables
            this).

    Raises:
        JobLost: another process has died; the message names it.
    """
    world_size = _variable("WORLD_SIZE", 1, 1, 2**31)
    rank, local_rank = _variable("RANK", 0, 0, world_size), _variable("LOCAL_RANK", 0, 0, 2**31)
    own = choose_device(device, local_rank)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    elif own.type == "cpu":
        limit_threads(cpu_quota())
    if world_size == 1:
        yield Context(0, 1, own)
        return
    if own.type == "mps":
        raise UserError("device = 'mps' cannot be shared by several processes: start one, or use --device cpu")
    if own.type == "cuda" and device not in ("auto", "cuda"):
        raise UserError(f"device = {device!r} with {world_size} processes: use 'cuda', so that each process uses its own GPU")
    with _process_group(own, rank, world_size, rank_timeout) as context:
        yield context


@contextlib.contextmanager
def _process_group(device: torch.device, rank: int, world_size: int, rank_timeout: float) -> Iterator[Context]:
    """Initialize the process group and start the heartbeat."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store: Any = _store(rank, world_size)  # Any: the stubs lack `clone`
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    heartbeat = Heartbeat(store.clone(), rank, world_size, rank_timeout) if rank_timeout else None
    outcome = "done"
    try:
        if heartbeat is not None:
            heartbeat.start()
        context = Context(rank, world_size, device, heartbeat)
        yield context
        context.activity("leaving")
        context.barrier()  # no process leaves while another still needs it
    except BaseException as error:
        outcome = type(error).__name__
        # After the death of one process, torchrun terminates the others: report that death in this case, too.
        if heartbeat is not None and (lost_connection(error) or (isinstance(error, Terminated) and heartbeat.missing())):
            heartbeat.explain(error)
        raise
    finally:
        if heartbeat is not None:
            heartbeat.close(outcome)
        dist.destroy_process_group()


def _attempt() -> str:
    """Store prefix of this attempt of the job. torchrun may keep one store across restarts, and without a new prefix, processes
    would connect to the addresses of dead ones."""
    return f"bardling/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _store(rank: int, world_size: int) -> PrefixStore:
    """The store for rendezvous at MASTER_ADDR:MASTER_PORT, hosted by torchrun or by rank 0."""
    host, port = os.environ.get("MASTER_ADDR", ""), _variable("MASTER_PORT", 0, 1, 2**16)
    try:
        socket.getaddrinfo(host or " ", port)  # an empty name would be that of this machine
    except (OSError, UnicodeError) as error:  # UnicodeError: a label of the name is empty or too long
        reason = getattr(error, "strerror", None) or "not a host name"
        remedy = "set it to the host name or IP address of rank 0, or start with torchrun"
        raise UserError(f"MASTER_ADDR = {host!r}: cannot be resolved ({reason}): {remedy}") from None
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    primary = rank == 0 and not hosted
    try:
        store = TCPStore(host, port, world_size, is_master=primary, timeout=TIMEOUT, multi_tenant=not hosted)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        reason = str(error).splitlines()[0].rpartition("message: ")[2]
        if "failed to listen" in str(error):
            problem = f"MASTER_PORT = {port}: rank 0 cannot listen ({reason}): set another port, the same for all processes"
        else:
            where = f"MASTER_ADDR = {host!r}, MASTER_PORT = {port}"
            problem = f"{where}: the processes cannot meet there ({reason}): check that rank 0 runs there"
        raise UserError(problem) from None
    return PrefixStore(_attempt(), store)


def _variable(name: str, default: int, low: int, high: int) -> int:
    """The integer in an environment variable, from `low` to `high` - 1."""
    text = os.environ.get(name, str(default)).strip()
    value = int(text) if text.isdecimal() and len(text) < 12 else -1
    if not low <= value < high:
        limits = f"{low} to {high - 1}" + (" (WORLD_SIZE - 1)" if name == "RANK" else "")
        raise UserError(f"{name} = {text!r}: must be an integer from {limits}: start with torchrun, or correct or unset it")
    return value
