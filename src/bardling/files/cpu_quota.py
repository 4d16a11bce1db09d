"""The quota of CPU time that a container or job has, in cores, from the files of its control group.

They are described in cgroups(7): `cpu.max` in version 2, `cpu.cfs_quota_us` and `cpu.cfs_period_us` in version 1.

Limits: Linux only; quotas of parent groups are not visible in a container.
"""

import math
from pathlib import Path


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
