"""Number of CPU threads: one per core that this process is allowed to use.

PyTorch uses all visible cores. A container with a quota of 2 cores on a machine with 64 sees 64: 64 threads then wait for each
other at the end of every operator, and a step takes many times as long. The quota is in the files of the control group
(cgroups(7): `cpu.max` in version 2, `cpu.cfs_quota_us` and `cpu.cfs_period_us` in version 1).

Limits: Linux only; quotas of parent groups are not visible in a container. `OMP_NUM_THREADS`, which launchers also set, takes
precedence.
"""

import math
import os
from pathlib import Path

import torch


def cpu_quota(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Cores granted by the control group in `folder`, rounded up; None without a readable limit."""
    try:
        quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        try:
            quota, period = (
                (folder / "cpu" / f"cpu.cfs_{name}_us").read_text(encoding="ascii") for name in ("quota", "period")
            )
        except (OSError, ValueError):
            return None
    try:
        cores = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):
        return None  # "max"
    return math.ceil(cores) if cores > 0 else None


def limit_threads(quota: int | None) -> int:
    """Limit PyTorch's threads to the quota; returns the number of threads in use."""
    if quota is not None and "OMP_NUM_THREADS" not in os.environ and quota < torch.get_num_threads():
        torch.set_num_threads(quota)
    return torch.get_num_threads()
