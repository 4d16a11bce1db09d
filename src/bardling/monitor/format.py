"""Numbers for display: three digits and a unit."""

import math
from collections.abc import Sequence


def count(number: float) -> str:
    """`12345` -> `12.3k`, `1.5e9` -> `1.50B`: three digits and a suffix."""
    return _short(number, ("", "k", "M", "B", "T", "P", "E"))


def si(number: float, unit: str) -> str:
    """`3.12e14`, `FLOP/s` -> `312 TFLOP/s`: three digits and a decimal prefix (1 GB = 10^9 bytes)."""
    return _short(number, [f" {prefix}{unit}" for prefix in ("", "k", "M", "G", "T", "P", "E")])


def size_bytes(number: float) -> str:
    """`1.4e9` -> `1.40 GB`."""
    return si(number, "B")


def ms(seconds: float) -> str:
    """`0.0123` -> `12.3 ms`, `1.234` -> `1.23 s`."""
    return _short(seconds * 1e3, (" ms", " s"))


def duration(seconds: float) -> str:
    """`0.25` -> `0.2s`, `42` -> `42s`, `192` -> `3m12s`, `7384` -> `2h03m`, `200000` -> `2d07h`."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 0:
        return "-" + duration(-seconds)
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    for unit, part, size, step in (("d", "h", 86400, 3600), ("h", "m", 3600, 60), ("m", "s", 60, 1)):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // step:02d}{part}"
    return f"{whole}s"


def percent(fraction: float) -> str:
    """`0.4217` -> `42.2%`."""
    return f"{100 * fraction:.1f}%"


def _short(number: float, units: Sequence[str]) -> str:
    """Three digits, in the unit in which the number lies between 1 and 1000."""
    if not math.isfinite(number):
        return f"{number}{units[0]}"
    size, unit = abs(number), 0
    # 999.5 rounds to 1000, which is 1 of the next unit.
    while size >= 999.5 and unit < len(units) - 1:
        size /= 1000
        unit += 1
    digits = 0 if (unit == 0 and float(size).is_integer()) or size >= 99.95 else 1 if size >= 9.995 else 2
    return f"{'-' if number < 0 else ''}{size:.{digits}f}{units[unit]}"
