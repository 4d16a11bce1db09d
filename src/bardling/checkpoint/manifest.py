"""The manifest of a checkpoint: what its folder must contain, so that damage is seen before anything is believed.

`manifest.json` lists every file with its size (bytes) and SHA-256, and says for which step the folder is and whether its
validation loss was the best so far. It is the last file written. A manifest found on disk may have been damaged or made by
anybody: its size is capped before it is read, and no name in it can lead out of the folder.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

NAME = "manifest.json"
FORMAT = 1
LARGEST = 1 << 20  # bytes; a manifest has a short line per file
MOST_FILES = 4096


@dataclass(frozen=True)
class FileEntry:
    """Size (bytes) and checksum of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint folder must contain."""

    step: int
    best: bool
    files: dict[str, FileEntry]  # by path inside the folder, with forward slashes

    def to_json(self) -> str:
        """The text of `manifest.json`."""
        files = {name: {"size": entry.size, "sha256": entry.sha256} for name, entry in sorted(self.files.items())}
        return json.dumps({"format": FORMAT, "step": self.step, "best": self.best, "files": files}, indent=1) + "\n"


def describe(folder: Path, step: int, best: bool) -> Manifest:
    """Make the manifest of a finished folder by reading every file in it."""
    files = {}
    for name, path in _walk(folder).items():
        files[name] = FileEntry(path.lstat().st_size, _sha256(path))
    return Manifest(step, best, files)


def read_manifest(folder: Path) -> Manifest:
    """Read a folder's manifest.

    Raises:
        ValueError: it is missing or malformed; the message says which.
        OSError: the disk does not answer, which says nothing about the manifest.
    """
    path = folder / NAME
    try:
        size = _regular_size(path)
        if size > LARGEST:
            raise ValueError(f"{NAME} is too large ({size:,} bytes)")
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{NAME} is missing") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise ValueError(f"{NAME} is not valid JSON") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"{NAME} has an unknown format")
    step, best, files = data.get("step"), data.get("best"), data.get("files")
    if type(step) is not int or step < 0 or type(best) is not bool or not isinstance(files, dict) or len(files) > MOST_FILES:
        raise ValueError(f"{NAME} is malformed")
    return Manifest(step, best, {name: _entry(name, value) for name, value in files.items()})


def problems(folder: Path, manifest: Manifest, *, checksums: bool, progress: Callable[[int], None] | None = None) -> list[str]:
    """Compare a folder with its manifest; empty when they agree.

    Args:
        checksums: also read every file; otherwise only names and sizes are compared.
        progress: called now and then with the bytes read since the last call.

    Raises:
        OSError: something cannot be read, which says nothing about its content.
    """
    found = []
    present = _walk(folder)
    for name, entry in manifest.files.items():
        path = present.pop(name, None)
        if path is None:
            found.append(f"{name} is missing")
            continue
        try:
            size = _regular_size(path)
            if size != entry.size:
                found.append(f"{name} has {size:,} bytes instead of {entry.size:,}")
            elif checksums and _sha256(path, progress) != entry.sha256:
                found.append(f"{name} has changed (its checksum differs)")
        except ValueError as error:
            found.append(str(error))
    return found + [f"{name} does not belong here" for name in sorted(present)]


def _entry(name: str, value: object) -> FileEntry:
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name or ":" in name or len(name) > 255:
        raise ValueError(f"{NAME} names a file outside its folder ({name[:80]!r})")
    size, sha256 = (value.get("size"), value.get("sha256")) if isinstance(value, dict) else (None, None)
    if type(size) is not int or size < 0 or not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError(f"{NAME} is malformed at {name[:80]!r}")
    return FileEntry(size, sha256)


def _walk(folder: Path) -> dict[str, Path]:
    """Everything in the folder that is no directory, but the manifest, by its path inside; links are listed, not followed."""

    def fail(error: OSError) -> None:
        raise error

    found = {}
    for root, folders, names in os.walk(folder, onerror=fail):
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        for name in names + links:
            path = Path(root) / name
            found[path.relative_to(folder).as_posix()] = path
    found.pop(NAME, None)
    return dict(sorted(found.items()))


def _regular_size(path: Path) -> int:
    """Size of a regular file; a link or a pipe in its place is refused before it is opened.

    Raises:
        ValueError: it is something else.
    """
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path.name} is not a regular file")
    return status.st_size


def _sha256(path: Path, progress: Callable[[int], None] | None = None) -> str:
    digest, piece = hashlib.sha256(), bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(piece):
            digest.update(memoryview(piece)[:size])  # lets other threads run
            if progress is not None:
                progress(size)
    return digest.hexdigest()
