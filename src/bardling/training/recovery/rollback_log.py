"""`skips.json`: the sequences that a run skips because they led to a bad step, each range with its event.

The file is written before the run rolls back, and every start reads it: the order of the samples is a pure function of the
seed and of this file, and a run killed during a rollback has rolled back when it is resumed. Entries are only ever added.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bardling.checkpoint.run_folder import RunFolder
from bardling.data.batches.skipped_ranges import Range
from bardling.distributed.context import Context
from bardling.errors import UserError
from bardling.files.atomic import atomic_file
from bardling.files.reading import read_json_object
from bardling.monitor.jsonl import json_value
from bardling.monitor.records import EventRecord
from bardling.training.state import TrainState

FORMAT = 1
_LARGEST = 1 << 62


@dataclass(frozen=True)
class Rollback:
    """Why a run rolled back, and what it skips since."""

    event: EventRecord
    ranges: tuple[Range, ...]  # of the data order


def rollback_log(folder: RunFolder) -> Path:
    return folder.path / "skips.json"


def read_rollbacks(folder: RunFolder) -> tuple[Rollback, ...]:
    """The rollbacks of a run so far; empty if the file does not exist.

    Raises:
        UserError: the file is damaged.
    """
    path = rollback_log(folder)
    if not path.is_file():
        return ()
    content = read_json_object(path)
    try:
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r} is not {FORMAT}")
        return tuple(_rollback(entry) for entry in content["rollbacks"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{path}: is damaged ({error}): restore it from a copy, or start a new run") from error


def load_rollbacks(folder: RunFolder, state: TrainState, context: Context) -> tuple[Rollback, ...]:
    """The rollbacks of a run that starts with `state`, as read by the primary process.

    Raises:
        UserError: the file is damaged, or lacks rollbacks that preceded `state`.
    """
    rollbacks = context.on_primary(lambda: read_rollbacks(folder))
    if len(rollbacks) < state.history.rollbacks:
        raise UserError(
            f"{rollback_log(folder)}: lists {len(rollbacks)} rollbacks, but {state.history.rollbacks} preceded the checkpoint "
            f"of step {state.step}: restore the file from a copy, because it decides the data order"
        )
    state.history.rollbacks = len(rollbacks)
    return rollbacks


def write_rollbacks(folder: RunFolder, rollbacks: Sequence[Rollback]) -> None:
    """Replace the file, durably.

    Raises:
        UserError: it cannot be written.
    """
    path = rollback_log(folder)
    entries = [{"ranges": rollback.ranges, "event": json_value(rollback.event.as_dict())} for rollback in rollbacks]
    content = json.dumps({"format": FORMAT, "rollbacks": entries}, indent=1, allow_nan=False) + "\n"
    try:
        with atomic_file(path) as file:
            file.write(content.encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}): free some space, then resume") from error


def _rollback(entry: dict[str, Any]) -> Rollback:
    ranges = []
    for first, count in entry["ranges"]:
        if not all(type(number) is int and 0 <= number < _LARGEST for number in (first, count)):
            raise ValueError(f"invalid range {[first, count]!r}")
        ranges.append((first, count))
    event = {key: value for key, value in entry["event"].items() if key != "kind"}
    event |= {key: float(event[key]) for key in ("loss", "grad_norm")}
    return Rollback(EventRecord(**event), tuple(ranges))
