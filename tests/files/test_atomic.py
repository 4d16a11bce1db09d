"""A file is there whole or not at all, whatever ends its writer."""

import os
import signal
import subprocess
import sys

import pytest

from bardling.errors import UserError
from bardling.files.atomic import (
    atomic_file,
    partial_path,
    remove_partial_files,
    remove_stale_partials,
    sync_folder,
    write_atomically,
)

KILLED = """
import os, signal, sys
from pathlib import Path
from bardling.files.atomic import atomic_file
with atomic_file(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced(tmp_path):
    write_atomically(tmp_path / "a", b"old")
    with atomic_file(tmp_path / "a", durable=False) as file:
        file.write(b"new")
        assert (tmp_path / "a").read_bytes() == b"old"  # until it is whole
    assert (tmp_path / "a").read_bytes() == b"new"
    assert names(tmp_path) == ["a"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    write_atomically(tmp_path / "a", b"old")

    def interrupted():
        with atomic_file(tmp_path / "a") as file:
            file.write(b"ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_what_a_kill_leaves_is_removed_and_nothing_else(tmp_path):
    others = ["a", "notes.partial", ".a.partial", ".dataset.partial", "b.7.partial"]
    for name in others:
        (tmp_path / name).write_bytes(b"old")
    (tmp_path / ".folder.7.partial").mkdir()
    child = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "a")], check=False)
    assert child.returncode == -signal.SIGKILL
    left = set(names(tmp_path)) - {*others, ".folder.7.partial"}
    assert len(left) == 1
    assert left.pop().startswith(".a.")
    remove_partial_files(tmp_path)
    assert names(tmp_path) == sorted([*others, ".folder.7.partial"])
    assert (tmp_path / "a").read_bytes() == b"old"


def test_what_killed_processes_left_of_one_target_is_removed_and_nothing_else(tmp_path):
    target = tmp_path / "a[1]"
    others = ["a[1]", "a[1].7.partial", ".a[1].partial", ".a1.999999999.partial", ".a[1].x.7.partial"]
    for name in [*others, f".a[1].{os.getppid()}.partial"]:  # the last is a living process's
        (tmp_path / name).write_bytes(b"")
    for number in range(2):
        child = subprocess.run([sys.executable, "-c", KILLED, str(target)], check=False)
        assert child.returncode == -signal.SIGKILL
        (tmp_path / f".a[1].99999999{number}9.partial").mkdir()
        (tmp_path / f".a[1].99999999{number}9.partial" / "model").write_bytes(b"half")
    partial_path(target).mkdir()  # of an earlier process with our number
    (tmp_path / ".a[1].9999999998.partial").symlink_to(tmp_path / "kept")
    (tmp_path / "kept").mkdir()
    remove_stale_partials(target)
    assert names(tmp_path) == sorted([*others, f".a[1].{os.getppid()}.partial", "kept"])
    remove_stale_partials(tmp_path / "missing" / "a")


def test_a_refusal_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"missing/.*cannot write: no such file or directory$"):
        write_atomically(tmp_path / "missing" / "a", b"")


def test_a_file_system_that_cannot_sync_folders_is_no_obstacle(tmp_path, monkeypatch):
    def refuses(_):
        raise OSError(22, os.strerror(22))

    monkeypatch.setattr(os, "fsync", refuses)
    sync_folder(tmp_path)
