"""One process at a time holds a lock file, whatever the holder does with the file and however it ends."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from bardling.errors import UserError
from bardling.files import lock
from bardling.files.lock import locked

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="open files cannot be removed or moved there")

HOLD = """
import sys, time
from pathlib import Path
from bardling.files.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def held_elsewhere(path: Path) -> bool:
    try:
        with locked(path, timeout=0):
            return False
    except UserError:
        return True


def wait_in_thread(path: Path) -> tuple[threading.Thread, threading.Event, threading.Event]:
    """A thread that acquires the lock, sets the first event, and holds the lock until the second one is set."""
    acquired, release = threading.Event(), threading.Event()

    def run() -> None:
        with locked(path):
            acquired.set()
            release.wait(60)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, acquired, release


def test_only_one_holds_it_and_the_other_gets_one_line(tmp_path: Path) -> None:
    lock = tmp_path / "new" / "lock"
    with locked(lock):
        with pytest.raises(UserError, match=r"^busy$"), locked(lock, timeout=0.1, message="busy"):
            pass
        with pytest.raises(UserError, match=r"lock: another process holds this lock") as caught, locked(lock, timeout=0):
            pass
        assert "\n" not in str(caught.value)
        assert lock.read_bytes() == b""
    assert not held_elsewhere(lock)


@pytest.mark.parametrize("moved", [False, True])
def test_a_waiter_gets_the_lock_after_its_holder_removed_or_moved_the_file(tmp_path: Path, moved: bool) -> None:
    lock = tmp_path / "work" / "lock"
    with locked(lock):
        thread, acquired, release = wait_in_thread(lock)
        assert not acquired.wait(0.3)
        if moved:
            lock.parent.rename(tmp_path / "done")
        lock.unlink(missing_ok=True)
    try:
        assert acquired.wait(60)
        assert lock.exists()
        assert held_elsewhere(lock)
    finally:
        release.set()
        thread.join(60)
    assert not held_elsewhere(lock)


def test_a_killed_holder_lets_go(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    assert held_elsewhere(lock)
    child.kill()
    child.wait(60)
    assert lock.exists()
    with locked(lock, timeout=60):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_without_flock_work_continues_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    lock = tmp_path / "lock"
    for _ in range(2):  # nothing that the first one leaves behind stops the second
        with locked(lock, timeout=0):
            pass
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"bardling: warning: {lock}: cannot lock ({os.strerror(number).lower()}); continuing unlocked"] * 2


def test_a_lock_file_that_cannot_be_created_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot lock: ") as caught, locked(tmp_path / "file" / "lock"):
        pass
    assert "\n" not in str(caught.value)


def test_a_long_wait_is_told_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lock, "PATIENCE", 0.1)
    held, released = threading.Event(), threading.Event()

    def hold():
        with locked(tmp_path / "lock"):
            held.set()
            released.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(60)
    threading.Timer(0.5, released.set).start()
    with locked(tmp_path / "lock", waiting="another process prepares the data"):
        assert capsys.readouterr().err == "bardling: another process prepares the data\n"
    holder.join()
    with locked(tmp_path / "lock", waiting="never printed"):
        assert capsys.readouterr().err == ""
