"""Checks and conversions shared by the sections of a configuration."""

import dataclasses
import re
from collections.abc import Mapping

from bardling.errors import UserError
from bardling.files.paths import expand_home

INF = float("inf")


def require(condition: bool, key: str, value: object, rule: str) -> None:
    """Raise a `UserError` that names `key` and `value` unless `condition` holds."""
    if not condition:
        raise UserError(f"{key} = {value!r}: {rule}")


def require_at_least(minimum: int, config: object, section: str, *names: str) -> None:
    """Raise a `UserError` unless each named setting is unset, or at least `minimum` and finite."""
    for name in names:
        value = getattr(config, name)
        rule = f"must be at least {minimum}" + (" and finite" if isinstance(value, float) else "")
        require(value is None or minimum <= value < INF, f"{section}.{name}", value, rule)


def require_storable(settings: Mapping[str, object], prefix: str = "") -> None:
    """Raise a `UserError` if an integer of a configuration does not fit TOML, so that a run could not be resumed from it."""
    for name, value in settings.items():
        if dataclasses.is_dataclass(value):
            require_storable(vars(value), f"{name}.")
        elif isinstance(value, int) and value.bit_length() > 63:
            raise UserError(f"{prefix}{name}: an integer of {value.bit_length()} bits is too large: use at most 63 bits")


def require_positive(config: object, section: str, *names: str) -> None:
    """Raise a `UserError` unless each named setting is unset, or above 0 and finite."""
    for name in names:
        value = getattr(config, name)
        require(value is None or 0 < value < INF, f"{section}.{name}", value, "must be above 0 and finite")


def expand_paths(config: object, *names: str) -> None:
    """Replace a leading `~` in the named settings of a new configuration, each a path or a tuple of paths."""
    for name in names:
        value = getattr(config, name)
        expanded = expand_home(value) if isinstance(value, str) else tuple(map(expand_home, value))
        object.__setattr__(config, name, expanded)  # the configuration is frozen


def duration_seconds(text: str, key: str) -> float:
    """Convert a time such as 8h, 1h30m, 45m, 90s or 2d to seconds; a number without a unit is in seconds.

    Raises:
        UserError: `text` is not a time; the message names `key`.
    """
    found = re.fullmatch(r"(?:(\d{1,6})d)?(?:(\d{1,9})h)?(?:(\d{1,9})m)?(?:(\d{1,9}(?:\.\d{1,9})?)s?)?", text.strip())
    if found is None or not any(found.groups()):
        raise UserError(f"{key} = {text!r}: write a time as 8h, 1h30m, 45m, 90s or 2d")
    days, hours, minutes, seconds = (float(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def doublings(start: int | None, full: int, key: str, full_key: str) -> int:
    """How many times a size must double to grow from `start` to `full`; 0 if `start` is None.

    Raises:
        UserError: `full` cannot be reached by doubling; the message names `key` and the nearest valid size.
    """
    valid = [full >> times for times in range(full.bit_length()) if full % (1 << times) == 0]
    if start is not None and start not in valid:
        nearest = min(valid, key=lambda size: abs(size - start))
        raise UserError(f"{key} = {start}: must become {full_key} = {full} by doubling: use {nearest}")
    return 0 if start is None else valid.index(start)
