"""Reading a prompt: from a file, a pipe (`--prompt_file <(command)`) or standard input, up to a limit.

The text is used unchanged, line endings included. Errors say that it is a prompt, since users give several files at once.
"""

import errno
import stat
import sys
from pathlib import Path
from typing import IO

from bardling.errors import UserError
from bardling.files.atomic import os_error_as_user_error, os_reason
from bardling.files.decoding import decode_text
from bardling.files.paths import expand_home

MAX_PROMPT_BYTES = 16 << 20
"""Limit of a prompt. A model sees only the end that fits into its context; more than this is surely the wrong file."""


def read_prompt_file(path: str | Path) -> str:
    """The prompt in a file or pipe, of at most `MAX_PROMPT_BYTES`."""
    path = Path(expand_home(str(path)))
    try:
        if stat.S_ISDIR(path.stat().st_mode):
            raise UserError(f"prompt file {path}: is a folder: name a text file that contains the prompt")
        with path.open("rb") as file:
            return decode_text(_read(file, f"prompt file {path}"), f"prompt file {path}", file=str(path))
    except OSError as error:
        missing = error.errno in (errno.ENOENT, errno.ENOTDIR)
        reason = "no such file" if missing else f"cannot be read ({os_reason(error).lower()})"
        raise UserError(f"prompt file {path}: {reason}: name a text file that contains the prompt") from error


def read_prompt_input() -> str:
    """The prompt on standard input."""
    stream: IO[bytes] | None = getattr(sys.stdin, "buffer", None)
    if stream is None:  # replaced by a text stream, or closed
        return sys.stdin.read() if sys.stdin else ""
    with os_error_as_user_error(Path("standard input"), "read"):
        data = _read(stream, "standard input")
    return decode_text(data, "the prompt on standard input", file="prompt.txt")


def _read(file: IO[bytes], name: str) -> bytes:
    data = file.read(MAX_PROMPT_BYTES + 1)
    if len(data) > MAX_PROMPT_BYTES:
        limit = f"the limit of a prompt is {MAX_PROMPT_BYTES >> 20} MiB"
        raise UserError(f"{name}: is too large ({limit}, of which the model sees the end): give a shorter text")
    return data
