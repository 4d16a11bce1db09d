"""One value that says who this process is among the others, passed to whatever needs it and never global.

`torchrun` describes the processes in environment variables; they are read here, once. Collectives run over gloo for
tensors in host memory and over NCCL for those on a GPU, so that small decisions (has anyone been asked to stop?) never
wait for the GPU.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from bardling.distributed.device import choose_device
from bardling.errors import UserError

T = TypeVar("T")

# A process that waits longer than this for the others takes them for dead. Long enough for a slow disk, short enough to notice.
TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Context:
    """A process among `world_size`, and the device it computes on."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_primary(self) -> bool:
        """Whether this process does what only one may do: log, print, save."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over all processes, in place; returns it."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in at least one process; all processes must ask."""
        if self.world_size == 1:
            return flag
        votes = torch.tensor([int(flag)], dtype=torch.int32)  # in host memory: does not wait for the GPU
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return bool(votes.item())

    def broadcast(self, value: T) -> T:
        """The primary's `value`, in all processes."""
        if self.world_size == 1:
            return value
        box: list[T] = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.any(False)


SINGLE = Context(rank=0, world_size=1, device=torch.device("cpu"))


@contextlib.contextmanager
def distributed(device: str) -> Iterator[Context]:
    """Join the processes that `torchrun` started (or be the only one); leaves them in order at the end.

    Args:
        device: as `RunConfig.device`.
    """
    try:
        rank, local_rank, world_size = (int(os.environ.get(name, default)) for name, default in _VARIABLES)
    except ValueError:
        raise UserError("RANK, LOCAL_RANK and WORLD_SIZE must be whole numbers: start with torchrun, or unset them") from None
    own = choose_device(device, local_rank)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    if world_size == 1:
        yield Context(0, 1, own)
        return
    if own.type == "mps":
        raise UserError("device = 'mps' cannot be shared by several processes: start one, or use --device cpu")
    if own.type == "cuda" and device not in ("auto", "cuda"):
        raise UserError(f"device = {device!r} with {world_size} processes: use 'cuda', so that each process takes its own GPU")
    backend = "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield Context(rank, world_size, own)
        dist.barrier()  # no process leaves while another still needs it
    finally:
        dist.destroy_process_group()


_VARIABLES = (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"))
