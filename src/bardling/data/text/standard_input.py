"""Standard input as a source: it is stored in the cache while it is prepared, because its text is read more than once.

The file there is named by the content's SHA-256, so that the same input gives the same dataset, and an interrupted preparation
continues if the same command is run with the same input.
"""

import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bardling.data.text.download import cache_root
from bardling.data.text.folders import tag_cache
from bardling.data.text.sources import STANDARD_INPUT
from bardling.errors import UserError
from bardling.files.atomic import os_error_as_user_error


@contextmanager
def standard_input(spec: str) -> Iterator[str]:
    """The path of a copy of standard input, which is removed at the end, if that is the source `spec`; else the spec."""
    if spec != STANDARD_INPUT:
        yield spec
        return
    if sys.stdin is None or sys.stdin.isatty():
        raise UserError("standard input is a terminal: pipe text into this command, as in `cat FILE | bardling prepare - ...`")
    tag_cache(cache_root())
    with os_error_as_user_error(cache_root(), "store standard input in"):
        cache_root().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="stdin-", dir=cache_root()) as folder:
            copy, digest = Path(folder) / "stdin", hashlib.sha256()
            with copy.open("wb") as file:
                while piece := sys.stdin.buffer.read(1 << 20):
                    digest.update(piece)
                    file.write(piece)
            os.utime(copy, ns=(0, 0))  # its identity has the time of the last change
            named = cache_root() / "stdin" / digest.hexdigest()[:32]
            named.mkdir(parents=True, exist_ok=True)
            copy = copy.replace(named / "stdin")
    try:
        yield str(copy)
    finally:
        shutil.rmtree(named, ignore_errors=True)
