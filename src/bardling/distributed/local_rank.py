"""Which GPU of its node a process uses: that of its local rank, or the only one it sees.

Under torchrun, which sets LOCAL_RANK, all processes of a node see all its GPUs. `srun` sets SLURM_LOCALID; with
`--gpus-per-task=1`, each process sees a single GPU, which is number 0 for all of them. Without either variable, the processes
of a node count as consecutive ranks.

Limits: a process that sees a single GPU cannot tell whether another one also uses it; `require_own_gpu` finds out once the
processes have met.
"""

from collections.abc import Mapping
from typing import Any

import torch

from bardling.distributed.rendezvous import environment_number
from bardling.errors import UserError

_ANY = 2**31


def local_rank(environment: Mapping[str, str], visible: int) -> int:
    """The number of this process among those of its node.

    Args:
        visible: number of GPUs that this process sees. Without LOCAL_RANK, SLURM_LOCALID and LOCAL_WORLD_SIZE, a node is
            expected to have as many processes.

    Raises:
        UserError: a variable is not a number in its range.
    """
    world_size = environment_number("WORLD_SIZE", 1, 1, _ANY, environment)
    if "LOCAL_RANK" in environment or world_size == 1:
        return environment_number("LOCAL_RANK", 0, 0, _ANY, environment)
    if "SLURM_LOCALID" in environment:
        return environment_number("SLURM_LOCALID", 0, 0, _ANY, environment)
    local_size = environment_number("LOCAL_WORLD_SIZE", max(visible, 1), 1, _ANY, environment)
    return environment_number("RANK", 0, 0, world_size, environment) % local_size


def gpu_index(environment: Mapping[str, str], visible: int) -> int:
    """The number of this process's GPU among the `visible` ones, of which there is at least one.

    Raises:
        UserError: there is none for this local rank.
    """
    number = local_rank(environment, visible)
    if number < visible:
        return number
    if visible == 1:
        return 0
    name = next((name for name in ("LOCAL_RANK", "SLURM_LOCALID") if name in environment), "local rank")
    raise UserError(
        f"{name} = {number}: this process sees only {visible} GPUs, numbered from 0: start at most {visible} processes on this "
        "node, or give each a GPU of its own (srun --gpus-per-task=1)"
    )


def require_own_gpu(store: Any, identity: str, name: str) -> None:
    """Raise a `UserError` if another process of the job has the same GPU.

    Args:
        store: of the job (`torch.distributed.Store`).
        identity: of the GPU, unique among all hosts.
        name: how the message calls it.
    """
    if store.add(f"gpu/{identity}", 1) > 1:
        raise UserError(
            f"{name}: another process of this job uses the same GPU: start at most one process per GPU, or use --device cpu"
        )


def gpu_identity(device: torch.device) -> str:
    """Identifies a GPU among all hosts."""
    return str(torch.cuda.get_device_properties(device).uuid)
