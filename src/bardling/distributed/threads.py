"""How many threads compute on a CPU: one for each core that this process may really use.

PyTorch counts the cores that it sees. A container with a quota of two cores on a machine of 64 sees 64: sixty-four threads then
wait for each other at the end of every operator, and a step takes many times as long. The quota is in the control group's files
(cgroups(7): `cpu.max` in version 2, `cpu.cfs_quota_us` and `cpu.cfs_period_us` in version 1).

Limits: Linux only; quotas of groups above the container's own are not seen in it. `OMP_NUM_THREADS`, which launchers set too,
is left as it is.
"""

import math
import os
from pathlib import Path

import torch


def cpu_quota(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Cores that the control group in `folder` grants, rounded up; None without a limit, or where none can be read."""
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


def settle_threads(quota: int | None) -> int:
    """Have PyTorch use no more threads than the quota allows; returns how many it uses."""
    if quota is not None and "OMP_NUM_THREADS" not in os.environ and quota < torch.get_num_threads():
        torch.set_num_threads(quota)
    return torch.get_num_threads()
