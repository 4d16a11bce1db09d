"""SHA-256 digests, as hexadecimal digits."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path


def file_sha256(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Digest of a file's content; `progress` is called with the number of bytes read since the last call."""
    digest, buffer = hashlib.sha256(), bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(memoryview(buffer)[:size])  # releases the GIL
            if progress is not None:
                progress(size)
    return digest.hexdigest()


def json_sha256(value: object, *, sort_keys: bool = False, separators: tuple[str, str] | None = None) -> str:
    """Digest of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=sort_keys, separators=separators).encode()).hexdigest()
