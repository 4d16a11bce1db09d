"""Checks, before a run of several processes begins, that all of them see the same run folder and the same tokens.

Rank 0 creates an empty file in the run folder, or in the nearest folder above it that exists; every process looks for it along
its own path and all learn who does not see it; rank 0 removes the file. A network file system may show a new file late, so a
process looks for some seconds before it gives up.
"""

import contextlib
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from bardling.data.tokens.shards import TokenDataset
from bardling.distributed.context import Context
from bardling.distributed.rendezvous import ranges
from bardling.errors import UserError

PATIENCE = 5.0
"""Seconds for which a process looks for the file."""

_NAMED = 4  # hosts in a message


def require_shared_folder(context: Context, folder: Path) -> None:
    """Raise a `UserError` in all processes unless each of them sees `folder` as rank 0 does. Collective."""
    if context.world_size == 1:
        return
    places = [folder.absolute(), *folder.absolute().parents]
    with _probe(places) if context.is_primary else contextlib.nullcontext() as probe:
        place, name = context.broadcast(probe) or (0, "")
        seen = not name or (place < len(places) and _appears(places[place] / name))
        blind = _hosts(context, seen)
    if blind:
        where = str(folder.absolute()) if context.is_primary else ""
        raise UserError(
            f"{context.broadcast(where)}: is not the same folder on {blind} as for rank 0 on "
            f"{context.broadcast(socket.gethostname())}: put the run into a folder that all nodes share, under the same path"
        )


def require_same_tokens(context: Context, dataset: TokenDataset) -> None:
    """Raise a `UserError` in all processes unless each of them has opened the same dataset as rank 0. Collective."""
    if context.world_size == 1:
        return
    differ = _hosts(context, dataset.fingerprint == context.broadcast(dataset.fingerprint))
    if differ:
        raise UserError(
            f"{context.broadcast(str(dataset.path))}: the tokens on {differ} differ from those of rank 0: prepare them once, "
            "in a folder that all nodes share (data.cache), or copy them"
        )


@contextlib.contextmanager
def _probe(places: list[Path]) -> Iterator[tuple[int, str] | None]:
    """Create an empty file in the first place that exists; yields the place's number and the file's name.

    Yields None if the file cannot be created: what follows reports that, since the run folder cannot be written either.
    """
    # A killed start leaves at most a name that starting again removes.
    name = f".config.toml.{secrets.randbelow(10**10)}.partial"
    place = next(number for number, place in enumerate(places) if place.is_dir())
    try:
        (places[place] / name).touch(exist_ok=False)
    except OSError:
        yield None
        return
    try:
        yield place, name
    finally:
        with contextlib.suppress(OSError):
            (places[place] / name).unlink(missing_ok=True)


def _appears(path: Path) -> bool:
    end = time.monotonic() + PATIENCE
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def _hosts(context: Context, good: bool) -> str:
    """The hosts of processes that are not `good`, as text; empty if all are. Collective."""
    found = context.gather(None if good else socket.gethostname())
    hosts = sorted({host for host in found if host is not None})
    if not hosts:
        return ""
    ranks = ranges(rank for rank, host in enumerate(found) if host is not None)
    more = f" and {len(hosts) - _NAMED} more hosts" if len(hosts) > _NAMED else ""
    return f"{', '.join(hosts[:_NAMED])}{more} (rank {ranks})"
