"""Records as JSON Lines: one object a line, readable while the run goes on and after it was killed.

Lines are only ever appended. A kill can tear the last line; the reader leaves it out and `truncate_after` removes it. JSON
has no NaN and no infinities: they are written as the strings "NaN", "Infinity" and "-Infinity", so that a diverged loss
stays visible and every line stays valid; `float()` understands them.
"""

import errno
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bardling.errors import UserError
from bardling.files import replacing


class JsonlSink:
    """Appends records to a file, which is made when it does not exist.

    Lines that find no room on the disk are kept in memory and written as soon as there is some: a full disk ends no run.

    Raises:
        UserError: the file cannot be written; where only room is missing, `flush` and `close` say so, and `log` does not.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting = b""  # written to memory only, so far
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({_reason(error)})") from None

    def log(self, record: Mapping[str, object]) -> None:
        """Append one line; it survives this process at once, and the machine after `flush`."""
        line = json.dumps(_plain(record), ensure_ascii=False, allow_nan=False) + "\n"
        # A lone surrogate is no UTF-8; escaped it stays valid JSON.
        line = line if line.isascii() or _encodable(line) else json.dumps(_plain(record), allow_nan=False) + "\n"
        self._waiting += line.encode()
        try:
            self._write()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise self._refused(error) from None

    def sample(self, step: int, texts: Sequence[str]) -> None:
        """Append texts that the model wrote."""
        self.log({"kind": "sample", "step": step, "texts": list(texts)})

    def flush(self) -> None:
        """Wait until all lines are on the disk."""
        try:
            self._write()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._refused(error) from None

    def close(self) -> None:
        """Flush and close; closing twice is no error."""
        if not self._file.closed:
            try:
                self.flush()
            finally:
                self._file.close()

    def _write(self) -> None:
        while self._waiting:  # a nearly full disk takes a part
            self._waiting = self._waiting[self._file.write(self._waiting) :]

    def _refused(self, error: OSError) -> UserError:
        return UserError(f"{self._path}: cannot be written ({_reason(error)}): make room")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read all records; a last line without its line break, torn by a kill, is left out.

    Raises:
        UserError: the file cannot be read, or a line (named by its number) is no JSON object.
    """
    try:
        data = _read(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({_reason(error)})") from None
    lines = data.split(b"\n")[:-1]  # what follows the last line break is nothing, or torn
    return [_parse(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _read(path: Path) -> bytes:
    if path.exists() and not path.is_file():  # a pipe would wait for ever, and a device never end
        raise UserError(f"{path}: is not a file")
    try:
        return path.read_bytes()
    except MemoryError:
        raise UserError(f"{path}: {path.stat().st_size:,} bytes are more than fit into memory") from None


def figures(records: Iterable[Mapping[str, Any]], kind: str) -> list[dict[str, Any]]:
    """The numbers of the records of one kind, non-finite ones as floats again.

    Records without a step and a loss, and values that are no numbers, are left out: they are of other programs, or damage.
    """
    found = []
    for record in records:
        if record.get("kind") == kind:
            values = {key: _number(value) for key, value in record.items()}
            if type(values.get("step")) is int and values.get("loss") is not None:
                found.append({key: value for key, value in values.items() if value is not None})
    return found


def _number(value: object) -> int | float | None:
    if isinstance(value, str):
        return float(value) if value in ("NaN", "Infinity", "-Infinity") else None
    return value if isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 63) else None


def truncate_after(path: Path, step: int) -> None:
    """Remove the records of steps after `step`, and what a kill or a power cut left behind them: it will be written again.

    The file is replaced at once, and only if there is something to remove. A missing file is left missing.

    Raises:
        UserError: a line before the last record that stays is malformed, or the file cannot be written.
    """
    if not path.exists():
        return
    try:
        data = _read(path)
        kept = _lines_until(path, data.split(b"\n")[:-1], step)
        if b"".join(kept) == data:
            return
        with replacing(path) as file:
            file.writelines(kept)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({_reason(error)})") from None


def _lines_until(path: Path, lines: list[bytes], step: int) -> list[bytes]:
    """The lines, with their breaks, of records up to `step`. Malformed lines are dropped where no such record follows them."""
    kept: list[bytes] = []
    malformed: UserError | None = None
    for number, line in enumerate(lines, 1):
        try:
            stays = _step_of(path, number, line) <= step
        except UserError as error:
            malformed = malformed or error
            continue
        if stays and malformed:
            raise malformed
        if stays:
            kept.append(line + b"\n")
    return kept


def _step_of(path: Path, number: int, line: bytes) -> int:
    step = _parse(path, number, line).get("step")
    if type(step) is not int:
        raise UserError(f"{path}, line {number}: has no step: remove the line, then try again")
    return step


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(f"{path}, line {number}: is not valid JSON: remove the line, then try again") from None
    if not isinstance(record, dict):
        raise UserError(f"{path}, line {number}: is no JSON object: remove the line, then try again")
    return record


def _plain(value: object) -> object:
    """`value` with non-finite numbers as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)
