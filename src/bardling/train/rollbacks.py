"""`skips.json`: the windows that a run passes over because they led to bad numbers, each with what happened.

The file is written before the run goes back, and every start reads it: the order of the samples is a pure function of the
seed and of this file, and a run that is killed in the middle of going back has gone back when it is resumed. Entries are only
ever added.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bardling.checkpoint.runfolder import RunFolder, read_json
from bardling.data.skips import Range
from bardling.errors import UserError
from bardling.files import replacing
from bardling.monitor.records import EventRecord

FORMAT = 1
_LARGEST = 1 << 62


@dataclass(frozen=True)
class Rollback:
    """Why a run went back, and what it passes over since."""

    event: EventRecord
    ranges: tuple[Range, ...]  # of the data's order


def skips_file(folder: RunFolder) -> Path:
    """Where a run keeps them."""
    return folder.path / "skips.json"


def read_rollbacks(folder: RunFolder) -> tuple[Rollback, ...]:
    """The rollbacks of a run so far; none when there is no such file.

    Raises:
        UserError: the file is damaged.
    """
    path = skips_file(folder)
    if not path.is_file():
        return ()
    content = read_json(path)
    try:
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r} is not {FORMAT}")
        return tuple(_rollback(entry) for entry in content["rollbacks"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{path}: is damaged ({error}): restore it from a copy, or start a new run") from error


def write_rollbacks(folder: RunFolder, rollbacks: Sequence[Rollback]) -> None:
    """Replace the file, durably.

    Raises:
        UserError: it cannot be written.
    """
    entries = [{"ranges": rollback.ranges, "event": _plain(rollback.event.as_dict())} for rollback in rollbacks]
    content = json.dumps({"format": FORMAT, "rollbacks": entries}, indent=1, allow_nan=False) + "\n"
    try:
        with replacing(skips_file(folder)) as file:
            file.write(content.encode())
    except OSError as error:
        raise UserError(
            f"{skips_file(folder)}: cannot be written ({error.strerror or error}): make room, then resume"
        ) from error


def _rollback(entry: dict[str, Any]) -> Rollback:
    ranges = []
    for first, count in entry["ranges"]:
        if not all(type(number) is int and 0 <= number < _LARGEST for number in (first, count)):
            raise ValueError(f"range {[first, count]!r} is none")
        ranges.append((first, count))
    event = {key: value for key, value in entry["event"].items() if key != "kind"}
    event |= {key: float(event[key]) for key in ("loss", "grad_norm")}
    return Rollback(EventRecord(**event), tuple(ranges))


def _plain(value: Any) -> Any:
    """JSON has no NaN: such numbers become words that `float` reads."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
