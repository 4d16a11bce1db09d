"""Which GPU of its node a process uses."""

import pytest
import torch.distributed as dist

from bardling.distributed.local_rank import gpu_index, require_own_gpu
from bardling.errors import UserError

JOB = {"WORLD_SIZE": "16", "RANK": "11"}


@pytest.mark.parametrize(
    ("variables", "visible", "index"),
    [
        ({"LOCAL_RANK": "3"}, 8, 3),
        ({"LOCAL_RANK": "3", "SLURM_LOCALID": "0"}, 8, 3),
        ({"LOCAL_RANK": "3"}, 1, 0),  # srun --gpus-per-task=1
        ({"SLURM_LOCALID": "5"}, 8, 5),
        ({"SLURM_LOCALID": "5"}, 1, 0),
        ({"LOCAL_WORLD_SIZE": "2"}, 8, 1),
        ({}, 8, 3),
        ({}, 1, 0),
        ({"WORLD_SIZE": "1", "RANK": "0", "SLURM_LOCALID": "5"}, 8, 0),  # a program of its own
    ],
)
def test_the_gpu_of_a_process(variables, visible, index):
    assert gpu_index(JOB | variables, visible) == index


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK = 4"),
        ({"SLURM_LOCALID": "4"}, "SLURM_LOCALID = 4"),
        ({"LOCAL_WORLD_SIZE": "8"}, "local rank = 3"),
    ],
)
def test_a_process_without_a_gpu_is_told_how_many_there_are(variables, named):
    with pytest.raises(UserError, match=f"^{named}: this process sees only 2 GPUs.*start at most 2 processes"):
        gpu_index(JOB | variables, 2)


@pytest.mark.parametrize("name", ["LOCAL_RANK", "SLURM_LOCALID", "LOCAL_WORLD_SIZE"])
def test_a_variable_that_is_no_number(name):
    with pytest.raises(UserError, match=f"{name} = 'x': must be an integer"):
        gpu_index(JOB | {name: "x"}, 8)


def test_two_processes_with_the_same_gpu():
    store = dist.HashStore()
    require_own_gpu(store, "GPU-1", "cuda:0")
    require_own_gpu(store, "GPU-2", "cuda:0")
    with pytest.raises(UserError, match="cuda:0: another process of this job uses the same GPU"):
        require_own_gpu(store, "GPU-1", "cuda:0")
