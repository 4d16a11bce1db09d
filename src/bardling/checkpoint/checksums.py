"""The manifest of a checkpoint: which files its folder must contain, with sizes and checksums, so that damage is detected.

`manifest.json` is written last, and also records the step and whether the validation loss was the best so far. Manifests are
untrusted: their size is limited, and no file name in them can point outside the folder.
"""

import dataclasses
import json
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from bardling.files.digests import file_sha256
from bardling.files.reading import parse_json_object

MANIFEST_NAME = "manifest.json"
_FORMAT = 1
_MAX_BYTES = 1 << 20  # a manifest has a short line per file
_MAX_FILES = 4096


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
        return json.dumps({"format": _FORMAT, **dataclasses.asdict(self)}, indent=1) + "\n"


def build_manifest(folder: Path, step: int, best: bool) -> Manifest:
    """Describe a finished folder by reading every file in it."""
    paths = _list_files(folder)
    return Manifest(step, best, {name: FileEntry(path.lstat().st_size, file_sha256(path)) for name, path in paths.items()})


def read_manifest(folder: Path) -> Manifest:
    """Read a folder's manifest; raises a `ValueError` if it is missing or malformed, an `OSError` if the disk fails."""
    path = folder / MANIFEST_NAME
    try:
        if (size := _regular_file_size(path)) > _MAX_BYTES:
            raise ValueError(f"{MANIFEST_NAME} is too large ({size:,} bytes)")
        data = parse_json_object(path.read_bytes(), MANIFEST_NAME)
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST_NAME} is missing") from None
    if data.get("format") != _FORMAT:
        raise ValueError(f"{MANIFEST_NAME} has an unknown format")
    step, best, files = data.get("step"), data.get("best"), data.get("files")
    if type(step) is not int or step < 0 or type(best) is not bool or not isinstance(files, dict) or len(files) > _MAX_FILES:
        raise ValueError(f"{MANIFEST_NAME} is malformed")
    return Manifest(step, best, {name: _parse_entry(name, value) for name, value in files.items()})


def find_problems(
    folder: Path, manifest: Manifest, *, checksums: bool, progress: Callable[[int], None] | None = None
) -> list[str]:
    """Compare names and sizes, with `checksums` also contents, with the manifest; the list is empty if they agree. `progress`
    is called regularly with the number of bytes read since the last call.
    """
    present = _list_files(folder)
    problems = []
    for name, entry in manifest.files.items():
        try:
            if name not in present:
                problems.append(f"{name} is missing")
            elif (size := _regular_file_size(present[name])) != entry.size:
                problems.append(f"{name} has {size:,} bytes instead of {entry.size:,}")
            elif checksums and file_sha256(present[name], progress) != entry.sha256:
                problems.append(f"{name} has changed (checksum mismatch)")
        except ValueError as error:
            problems.append(str(error))
    return problems + [f"{name} is not part of the checkpoint" for name in present if name not in manifest.files]


def _parse_entry(name: str, value: object) -> FileEntry:
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name or ":" in name or len(name) > 255:
        raise ValueError(f"{MANIFEST_NAME} names a file outside its folder ({name[:80]!r})")
    size, sha256 = (value.get("size"), value.get("sha256")) if isinstance(value, dict) else (None, None)
    if type(size) is not int or size < 0 or not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError(f"{MANIFEST_NAME} is malformed at {name[:80]!r}")
    return FileEntry(size, sha256)


def _list_files(folder: Path) -> dict[str, Path]:
    """Everything in the folder except directories and the manifest, by relative path. Links are listed, not followed."""

    def fail(error: OSError) -> None:
        raise error

    paths = (Path(root) / name for root, folders, names in os.walk(folder, onerror=fail) for name in names + folders)
    found = {path.relative_to(folder).as_posix(): path for path in paths if path.is_symlink() or not path.is_dir()}
    found.pop(MANIFEST_NAME, None)
    return dict(sorted(found.items()))


def _regular_file_size(path: Path) -> int:
    """Size in bytes; a `ValueError` refuses a link or pipe in the file's place before it is opened."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path.name} is not a regular file")
    return status.st_size
