"""Number of CPU threads: one per core that this process is allowed to use.

PyTorch uses all visible cores. A container with a quota of 2 cores on a machine with 64 sees 64: 64 threads then wait for each
other at the end of every operator, and a step takes many times as long.

Limits: those of `files/cpu_quota.py`. `OMP_NUM_THREADS`, which launchers also set, takes precedence.
"""

import os

import torch


def limit_threads(quota: int | None) -> int:
    """Limit PyTorch's threads to the quota; returns the number of threads in use."""
    if quota is not None and "OMP_NUM_THREADS" not in os.environ and quota < torch.get_num_threads():
        torch.set_num_threads(quota)
    return torch.get_num_threads()
