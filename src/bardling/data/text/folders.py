"""The files below a folder that may be training text, and what is not: one rule, so that nothing disappears unnoticed.

Left out, and named: what is hidden or no regular file, broken links, and folders that Bardling and other tools make (runs,
prepared datasets, models, caches), so that a run inside its own source folder changes neither its text nor its identity.
Links to folders are followed, each folder once: after the others, in the order of their paths, and never to a folder above.
"""

import os
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from bardling.data.text.download import cache_root
from bardling.errors import UserError
from bardling.files.atomic import os_error_as_user_error

CACHE_TAG = "CACHEDIR.TAG"  # of the Cache Directory Tagging Standard
_TAG_TEXT = (
    b"Signature: 8a477f597d28d172789f06886806bc55\n# This folder is a cache: it can be deleted, and is not training text.\n"
)


class Left(NamedTuple):
    """Something that is not read."""

    reason: str
    path: Path


def tag_cache(folder: Path) -> None:
    """Create a cache folder, marked as one. An existing folder is left as it is, because it may contain other things."""
    try:
        folder.mkdir(parents=True)
        (folder / CACHE_TAG).write_bytes(_TAG_TEXT)
    except OSError:  # it exists, or what is written there next reports the fault
        return


def made_folder(folder: Path) -> str:
    """What kind of folder that a program has made this is; empty for any other. A kind is a noun without its article."""
    try:
        names = set(os.listdir(folder))  # noqa: PTH208  only the names are needed
    except OSError:
        return ""
    run_files = {"config.toml", "dataset.json"} & names
    if {"config.toml", "metrics.jsonl"} <= names or ("checkpoints" in names and run_files):
        return "run folder"
    if "manifest.json" in names and any(name.startswith("train-") and name.endswith(".bin") for name in names):
        return "prepared dataset"
    if "config.json" in names and any(name.endswith(".safetensors") for name in names):
        return "model folder"
    if folder.resolve() == cache_root().resolve():
        return "cache folder"
    try:
        tagged = CACHE_TAG in names and (folder / CACHE_TAG).read_bytes()[:43] == _TAG_TEXT[:43]
    except OSError:
        tagged = False
    return "cache folder" if tagged else ""


def refuse_made_folder(folder: Path) -> None:
    """Raise a `UserError` if a source is a folder that a program has made."""
    if kind := made_folder(folder):
        remedy = (
            f"train on it directly with --data.source {folder}" if kind == "prepared dataset" else "choose a folder of text"
        )
        raise UserError(f"{folder}: is a {kind}, not text: {remedy}")


def files_below(root: Path, skip: Collection[str] = (), *, follow: bool = True) -> tuple[list[Path], list[Left]]:
    """The files in a folder tree, sorted by relative path, and what is left out.

    Neither folders named in `skip`, nor links to folders if they are not to be followed, are mentioned.
    """
    files: list[Path] = []
    left: list[Left] = []
    folders, links = [root], list[Path]()
    seen: set[Path] = set()
    while folders or links:
        if folders:
            folder = folders.pop()
        else:
            folder = min(links)
            links.remove(folder)
            if fault := _link_fault(folder, root, seen):
                left.append(Left(fault, folder))
                continue
        if folder != root and (kind := made_folder(folder)):
            left.append(Left(kind, folder))
            continue
        seen.add(folder.resolve())
        with os_error_as_user_error(folder, "read"):
            entries = list(folder.iterdir())
        for path in entries:
            if path.name in skip:
                continue
            if path.name.startswith("."):
                left.append(Left("hidden", path))
            elif path.is_symlink() and path.is_dir():
                if follow:
                    links.append(path)
            elif path.is_dir():
                if path.resolve() not in seen:
                    folders.append(path)
            elif path.is_file():
                files.append(path)
            else:
                left.append(Left("broken link" if path.is_symlink() else "not a regular file", path))
    return sorted(files, key=lambda path: path.relative_to(root).as_posix()), sorted(left, key=lambda entry: entry.path)


def _link_fault(link: Path, root: Path, seen: set[Path]) -> str:
    """Why a link to a folder is not followed; empty if it is."""
    target = link.resolve()
    if root.resolve().is_relative_to(target) or link.parent.resolve().is_relative_to(target):
        return "link to a folder that contains it"
    return "link to a folder that is read already" if target in seen else ""


def without_made_folders(files: Collection[Path], base: Path) -> tuple[list[Path], list[Left]]:
    """The files that a pattern matches, without those in folders below `base` that a program has made."""
    kind = lru_cache(maxsize=None)(made_folder)
    kept, left = [], dict[Path, Left]()
    for file in files:
        above = [folder for folder in file.parents if folder != base and folder.is_relative_to(base)]
        if found := next(((kind(folder), folder) for folder in above if kind(folder)), None):
            left[found[1]] = Left(*found)
        else:
            kept.append(file)
    return kept, list(left.values())
