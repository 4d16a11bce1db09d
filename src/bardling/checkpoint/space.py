"""Is there room on the disk for a run's checkpoints? Asked before the run starts, when something can still be done about it."""

import shutil
from pathlib import Path

from bardling.config import CheckpointConfig
from bardling.errors import UserError
from bardling.monitor.format import size_bytes


def check_space(checkpoints: Path, size: int, config: CheckpointConfig, *, steps: int, best_steps: int) -> str | None:
    """Compare the free space with what the checkpoints will need.

    Args:
        checkpoints: the run's folder of checkpoints, which need not exist yet.
        size: of one checkpoint (bytes).
        steps: steps still to do; `best_steps`: validations among them, each of which may save.

    Returns:
        A warning, if checkpoints can be saved but not all be kept; None when everything fits or nothing can be known.

    Raises:
        UserError: not even the checkpoint that stays and the one being written fit.
    """
    there = [sum(file.lstat().st_size for file in folder.rglob("*")) for folder in checkpoints.glob("step-*")]
    place = checkpoints
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        usage = shutil.disk_usage(place)
    except OSError:
        return None
    if usage.total == 0:  # some network file systems do not say
        return None
    times = steps if config.every_seconds else -(-steps // config.every_steps) if config.every_steps else 1
    saves = min(times + (best_steps if config.save_best else 0), steps)
    # While one is written, the one before it stays; the first of all has none before it.
    needed = size * min(saves, 1 if there else 2)
    if needed > usage.free:
        both = f"two are needed while one replaces the other ({size_bytes(2 * size)})" if needed > size else "one is needed"
        raise UserError(
            f"{place}: {size_bytes(usage.free)} are free, but a checkpoint of this model takes {size_bytes(size)} and {both}: "
            "make room, or choose another --out"
        )
    for_good = steps // config.keep_every if config.keep_every else 0
    kept = config.keep_last + config.keep_best + for_good + 1
    most = min(saves + len(there), kept) * size
    if most > usage.free + sum(there):
        return (
            f"{place}: up to {size_bytes(most)} of checkpoints will be kept, but {size_bytes(usage.free)} are free: lower "
            "checkpoint.keep_last, keep_best or keep_every, or make room; what cannot be written will be said and tried again"
        )
    return None
