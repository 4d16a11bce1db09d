"""Paths as users write them: `~` is the home directory, whether the shell has replaced it or not.

A shell replaces it only at the start of a word, so `--out=~/x` and every value of a TOML file arrive as they were written.
"""

import os
import shlex
from pathlib import Path


def expand_home(path: str) -> str:
    """`path` with a leading `~` or `~user` replaced; a name that only begins with a tilde becomes absolute.

    The result never begins with a tilde, so that nothing expands it again.
    """
    if not path.startswith("~"):
        return path
    expanded = os.path.expanduser(path)  # noqa: PTH111  Path.expanduser raises an error if there is no such user
    return str(Path.cwd() / path) if expanded.startswith("~") else expanded


def shell_path(path: object) -> str:
    """`path` for a command that a user copies: quoted where a shell needs it, and never like an option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)
