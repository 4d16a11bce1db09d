"""Reading small files from untrusted sources: the size is checked first, and every error names the file in one line."""

import json
import stat
from pathlib import Path
from typing import Any

from bardling.errors import UserError
from bardling.files.atomic import os_error_as_user_error
from bardling.files.decoding import decode_text


def read_small_bytes(path: Path, *, limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes; anything else is a `UserError`."""
    with os_error_as_user_error(path, "read"):
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would block, and a device never ends
            raise UserError(f"{path}: is not a file")
        if status.st_size > limit:
            raise UserError(f"{path}: is too large ({status.st_size:,} bytes; the limit is {limit:,})")
        return path.read_bytes()


def read_small_text(path: Path, *, limit: int = 1 << 20) -> str:
    """Read a text file of at most `limit` bytes, in UTF-8 or what its byte order mark says; line endings become `\\n`."""
    return decode_text(read_small_bytes(path, limit=limit), str(path)).replace("\r\n", "\n").replace("\r", "\n")


def read_json_object(path: Path, *, limit: int = 16 << 20) -> dict[str, Any]:
    """Read a JSON file whose top level is an object."""
    return parse_json_object(read_small_bytes(path, limit=limit), str(path))


def parse_json_object(data: bytes, source: str) -> dict[str, Any]:
    """Parse UTF-8 JSON whose top level is an object; `source` names it in errors."""
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # ValueError: also bad UTF-8, and numbers with thousands of digits
        raise UserError(f"{source}: is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{source}: is not a JSON object (found {type(value).__name__})")
    return value
