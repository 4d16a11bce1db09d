"""Records as JSON Lines: one object per line, readable during the run and after it was killed.

Lines are only ever appended. A kill can leave an incomplete last line; `read_jsonl` ignores it and `truncate_after` removes
it. JSON has no NaN or infinity: they are written as the strings "NaN", "Infinity" and "-Infinity", so that a diverged loss
stays visible and every line is valid JSON; `float()` parses them.
"""

import errno
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bardling.errors import UserError
from bardling.files.atomic import atomic_file, os_error_as_user_error
from bardling.files.reading import parse_json_object
from bardling.monitor.records import BITS_PER_BYTE_VERSION


class JsonlSink:
    """Appends records to a file, creating it if necessary.

    When the disk is full, lines are kept in memory and written as soon as there is space: a full disk does not stop the run.

    Raises:
        UserError: the file cannot be written; if the disk is full, only `flush` and `close` raise it, not `log`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pending = b""  # not yet in the file
        with os_error_as_user_error(path, "write"):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)

    def log(self, record: Mapping[str, object]) -> None:
        """Append one line. It survives the process immediately, and a power cut after `flush`."""
        values = json_value(record)
        try:
            line = json.dumps(values, ensure_ascii=False, allow_nan=False).encode()
        except UnicodeEncodeError:  # a lone surrogate is not valid UTF-8; escaped, it is valid JSON
            line = json.dumps(values, allow_nan=False).encode()
        self._pending += line + b"\n"
        with os_error_as_user_error(self._path, "write", remedy=": free some space"):
            try:
                self._write()
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise

    def flush(self) -> None:
        """Write and sync all lines to disk."""
        with os_error_as_user_error(self._path, "write", remedy=": free some space"):
            self._write()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close; closing twice is not an error."""
        if not self._file.closed:
            try:
                self.flush()
            finally:
                self._file.close()

    def _write(self) -> None:
        while self._pending:  # a nearly full disk may accept only part of it
            self._pending = self._pending[self._file.write(self._pending) :]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read all records, ignoring an incomplete last line (one without a line break, cut off by a kill).

    A line that is not a JSON object is a `UserError` that names its number.
    """
    with os_error_as_user_error(path, "read"):
        data = _read(path)
    lines = data.split(b"\n")[:-1]  # after the last line break: nothing, or an incomplete line
    return [_parse(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _read(path: Path) -> bytes:
    if path.exists() and not path.is_file():  # reading a pipe or a device might never end
        raise UserError(f"{path}: is not a file")
    try:
        return path.read_bytes()
    except MemoryError:
        raise UserError(f"{path}: {path.stat().st_size:,} bytes do not fit into memory: free some memory") from None


def metrics(records: Iterable[Mapping[str, Any]], kind: str) -> list[dict[str, Any]]:
    """The numeric values of the records of one kind, with non-finite ones as floats again.

    Skips records without a step and a loss, and values that are not numbers: other programs write them, or they are damaged.
    Bits per byte of another version of that metric are left out, since they must not be compared.
    """
    selected = []
    for record in records:
        if record.get("kind") == kind:
            values = {key: _number(value) for key, value in record.items()}
            if values.get("bits_per_byte_version") != BITS_PER_BYTE_VERSION:
                values.pop("bits_per_byte", None)
            if type(values.get("step")) is int and values.get("loss") is not None:
                selected.append({key: value for key, value in values.items() if value is not None})
    return selected


def _number(value: object) -> int | float | None:
    if isinstance(value, str):
        return float(value) if value in ("NaN", "Infinity", "-Infinity") else None
    return value if isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 63) else None


def truncate_after(path: Path, step: int) -> None:
    """Remove the records of steps after `step`, with anything a kill or power cut left behind them: they will be rewritten.

    The file is replaced atomically, and only if there is something to remove. A missing file stays missing.

    Raises:
        UserError: a line before the last record to keep is malformed, or the file cannot be written.
    """
    if not path.exists():
        return
    with os_error_as_user_error(path, "write"):
        data = _read(path)
        kept = _lines_until(path, data.split(b"\n")[:-1], step)
        if kept != data:
            with atomic_file(path) as file:
                file.write(kept)


def _lines_until(path: Path, lines: list[bytes], step: int) -> bytes:
    """The lines of records up to `step`. Malformed lines are dropped unless such a record follows them."""
    kept: list[bytes] = []
    malformed: UserError | None = None
    for number, line in enumerate(lines, 1):
        try:
            found = _parse(path, number, line).get("step")
            if type(found) is not int:
                raise UserError(f"{path}, line {number}: has no step: remove the line and try again")
        except UserError as error:
            malformed = malformed or error
            continue
        if found <= step:
            if malformed:
                raise malformed
            kept.append(line + b"\n")
    return b"".join(kept)


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        return parse_json_object(line, f"{path}, line {number}")
    except UserError as error:
        raise UserError(f"{error}: remove the line and try again") from None


def json_value(value: object) -> object:
    """`value` with non-finite numbers, which JSON lacks, as strings that `float` parses."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    return value
