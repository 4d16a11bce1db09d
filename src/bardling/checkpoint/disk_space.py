"""Checks before a run starts whether its checkpoints fit on the disk."""

import shutil
from pathlib import Path

from bardling.config import CheckpointConfig
from bardling.errors import UserError
from bardling.monitor.format import size_bytes


def check_space(checkpoints: Path, size: int, config: CheckpointConfig, *, steps: int, best_steps: int) -> str | None:
    """Compare the free disk space with what the checkpoints will need; without space for one more, raise a `UserError`.

    Args:
        checkpoints: the run's checkpoint folder, which need not exist yet.
        size: of one checkpoint (bytes).
        steps: remaining ones, `best_steps` of which validate and so may save a checkpoint.

    Returns a warning if checkpoints can be saved but not all kept; None if everything fits or the free space is unknown.
    """
    existing = [sum(file.lstat().st_size for file in folder.rglob("*")) for folder in checkpoints.glob("step-*")]
    folder = next(path for path in (checkpoints, *checkpoints.parents) if path.exists())
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    if usage.total == 0:  # some network file systems don't report their size
        return None
    regular = steps if config.every_seconds else -(-steps // config.every_steps) if config.every_steps else 1
    saves = min(regular + (best_steps if config.save_best else 0), steps)
    # The previous checkpoint stays while the next one is written; the first has none before it.
    needed = size * min(saves, 1 if existing else 2)
    if needed > usage.free:
        count = f"two are needed while one replaces the other ({size_bytes(2 * size)})" if needed > size else "one is needed"
        raise UserError(
            f"{folder}: {size_bytes(usage.free)} are free, but a checkpoint of this model takes {size_bytes(size)} and {count}:"
            " free some space, or choose another --out"
        )
    permanent = steps // config.keep_every if config.keep_every else 0
    kept = config.keep_last + config.keep_best + permanent + 1
    total = min(saves + len(existing), kept) * size
    if total > usage.free + sum(existing):
        return (
            f"{folder}: up to {size_bytes(total)} of checkpoints will be kept, but {size_bytes(usage.free)} are free: lower "
            "checkpoint.keep_last, keep_best or keep_every, or free some space; failed saves are reported and retried"
        )
    return None
