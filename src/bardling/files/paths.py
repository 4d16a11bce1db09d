"""Paths as users write them: `~` is the home directory, whether the shell has replaced it or not.

A shell replaces it only at the start of a word, so `--out=~/x` and every value of a TOML file arrive as they were written.
"""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from bardling.errors import closest


def expand_home(path: str) -> str:
    """`path` with a leading `~` or `~user` replaced; a name that only begins with a tilde becomes absolute.

    The result never begins with a tilde, so that nothing expands it again.
    """
    if not path.startswith("~"):
        return path
    expanded = os.path.expanduser(path)  # noqa: PTH111  Path.expanduser raises an error if there is no such user
    return str(Path.cwd() / path) if expanded.startswith("~") else expanded


def similar(path: Path, names: Sequence[str] = ()) -> str:
    """A suggestion for a missing path: an entry of the same folder with a similar name, or one of `names`."""
    folder = path.parent
    if not folder.is_dir():
        return f": the folder {folder} does not exist"
    try:
        found = [entry.name for entry in folder.iterdir()]
    except OSError:
        return ""
    return closest(path.name, [*found, *names] if folder == Path() else found)


def shell_path(path: object) -> str:
    """`path` for a command that a user copies: quoted where a shell needs it, and never like an option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)
