"""The identity of this process among the processes of a run, passed as a value and never global.

`torchrun` describes the processes in environment variables (`rendezvous.py`). The processes form a device mesh with the axes of
`planning/layout.py`. The data axes decide which samples a process trains on and seed its dropout; the
global rank is for logging and launching only. Collectives on tensors in host memory run over gloo, those on GPU tensors over
NCCL, so that small decisions (has any process been asked to stop?) never wait for the GPU. With a `rank_timeout`, a heartbeat
(`heartbeat.py`) ends the job when a process dies or hangs.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from bardling.distributed.device import choose_device
from bardling.distributed.heartbeat import Heartbeat, lost_connection
from bardling.distributed.local_rank import gpu_identity, gpu_index, local_rank, require_own_gpu
from bardling.distributed.rendezvous import environment_number, form_group
from bardling.distributed.threads import limit_threads
from bardling.errors import Terminated, UserError
from bardling.files.cpu_quota import cpu_quota
from bardling.planning.layout import AXES, DATA_AXES, Layout

T = TypeVar("T")


@dataclass(frozen=True)
class Context:
    """One process of a run and the device it computes on."""

    rank: int  # global: for logging and launching
    world_size: int
    device: torch.device
    heartbeat: Heartbeat | None = field(default=None, compare=False, repr=False)  # with several processes only
    mesh: DeviceMesh | None = field(default=None, compare=False, repr=False)  # None: a plain data-parallel layout
    store: Store | None = field(default=None, compare=False, repr=False)  # of the job; rank 0 may host it, so it is kept open

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

    @property
    def stage(self) -> int:
        """Which stage of a pipeline this process computes; 0 without one."""
        return 0 if self.mesh is None else self.mesh.get_local_rank("pipeline")

    @property
    def dropout_rank(self) -> int:
        """Which dropout masks this process draws: 0 to n - 1. Processes that compute other layers, or other parts of a layer,
        drop different activations."""
        rank = self.data_rank
        for axis in ("tensor", "context", "pipeline"):
            rank = rank * self.size(axis) + (0 if self.mesh is None else self.mesh.get_local_rank(axis))
        return rank

    def size(self, axis: str) -> int:
        """Number of processes along an axis of the mesh."""
        return self._size([axis]) if self.mesh is not None else self.world_size if axis == "replicate" else 1

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

    def activity(self, name: str, patience: float | None = None, *, shared: bool = False) -> None:
        """Record the activity that this process starts, for the message in case it dies or hangs.

        Args:
            patience: seconds that the activity may take without progress; None for `train.rank_timeout`.
            shared: all processes start it at the same point.
        """
        if self.heartbeat is not None:
            self.heartbeat.activity(name, patience, shared=shared)

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

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank. Collective."""
        if self.world_size == 1:
            return [value]
        values = cast(list[T], [None] * self.world_size)
        with self._collective():
            dist.all_gather_object(values, value)
        return values

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
    world_size = environment_number("WORLD_SIZE", 1, 1, 2**31)
    rank, visible = environment_number("RANK", 0, 0, world_size), torch.cuda.device_count()
    local_rank(os.environ, visible)  # checks the variables on a CPU, too
    own = choose_device(device)
    if own.type == "cuda":
        own = torch.device("cuda", gpu_index(os.environ, visible)) if device in ("auto", "cuda") else own
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
    store = form_group(rank, world_size, device)
    heartbeat = Heartbeat(store.clone(), rank, world_size, rank_timeout) if rank_timeout else None
    outcome = "done"
    try:
        if heartbeat is not None:
            heartbeat.start()
        if device.type == "cuda":
            require_own_gpu(store, gpu_identity(device), str(device))
        context = Context(rank, world_size, device, heartbeat, store=store)
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
