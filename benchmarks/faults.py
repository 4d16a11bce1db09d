"""Faults that come from the kernel or the disk, not from a replaced function.

- `FsyncFaults`: the kernel asks this process how to answer each `fsync` of another one (seccomp user notification; Linux 5.5 or
  newer, no privileges needed), whoever calls it: Python, PyTorch or a library. Chosen calls get EIO, the others proceed.
- `SmallDisk`: a separate in-memory file system (tmpfs) that fills up: further writes get ENOSPC. Needs root, or a system that
  allows unprivileged mounts in a namespace; `SmallDisk.possible` tells.
- `flip_byte`: changes one bit of one file in place.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import platform
import random
import select
import socket
import struct
import subprocess
import threading
from pathlib import Path

# Numbers of the system calls seccomp, fsync and fdatasync, and seccomp's name of the architecture.
_MACHINES = {"x86_64": (0xC000003E, 317, 74, 75), "aarch64": (0xC00000B7, 277, 82, 83)}
_NO_NEW_PRIVILEGES, _FILTER, _NEW_LISTENER = 38, 1, 8
_ALLOW, _ASK = 0x7FFF0000, 0x7FC00000
_RECEIVE, _ANSWER, _CONTINUE = 0xC0502100, 0xC0182101, 1
_QUESTION = struct.Struct("<QIIiIQ6Q")
_REPLY = struct.Struct("<QqiI")


class FsyncFaults:
    """Answers the `fsync` calls of one process: makes those with the numbers `failing` (from 1) fail with EIO.

    Create it before the fork; the child calls `begin_child`, the parent `begin_parent`. `count` is the number of calls,
    `failed` the number of those that failed.
    """

    def __init__(self, failing: range) -> None:
        self.failing, self.count, self.failed = failing, 0, 0
        self._ours, self._theirs = socket.socketpair()

    @staticmethod
    def possible() -> bool:
        return platform.system() == "Linux" and platform.machine() in _MACHINES

    def begin_child(self) -> None:
        """Intercept all further `fsync` calls of this process and its future threads."""
        machine, seccomp, *calls = _MACHINES[platform.machine()]

        def instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
            return struct.pack("<HBBI", code, if_true, if_false, value)

        load, equal, back = 0x20, 0x15, 0x06
        program = b"".join((
            instruction(load, 4), instruction(equal, machine, 0, 3), instruction(load, 0),
            instruction(equal, calls[0], 2, 0), instruction(equal, calls[1], 1, 0),
            instruction(back, _ALLOW), instruction(back, _ASK),
        ))  # fmt: skip
        buffer = ctypes.create_string_buffer(program, len(program))
        pointer = struct.pack("@HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        listener = libc.syscall(seccomp, _FILTER, _NEW_LISTENER, pointer)
        if listener < 0:
            raise OSError(ctypes.get_errno(), "seccomp")
        socket.send_fds(self._theirs, [b"x"], [listener])
        os.close(listener)
        self._ours.close()
        self._theirs.close()

    def begin_parent(self) -> None:
        """Answer calls in a thread until the process has exited."""
        self._theirs.close()
        threading.Thread(target=self._answer, daemon=True).start()

    def _answer(self) -> None:
        _, received, _, _ = socket.recv_fds(self._ours, 1, 1)
        self._ours.close()
        if not received:
            return
        listener = received[0]
        waiting = select.poll()
        waiting.register(listener, select.POLLIN)
        while True:
            events = waiting.poll()
            if events and events[0][1] & (select.POLLHUP | select.POLLERR | select.POLLNVAL):
                break
            question = bytearray(_QUESTION.size)
            try:
                fcntl.ioctl(listener, _RECEIVE, question)
                number = _QUESTION.unpack(question)[0]
                self.count += 1
                refused = self.count in self.failing
                self.failed += refused
                fcntl.ioctl(
                    listener, _ANSWER, _REPLY.pack(number, 0, -errno.EIO if refused else 0, 0 if refused else _CONTINUE)
                )
            except OSError as error:
                if error.errno != errno.ENOENT:  # killed between its call and our answer
                    break
        os.close(listener)


class SmallDisk:
    """A disk of `megabytes` at `folder`, as a context manager; `fill` uses up its space, `free` releases it."""

    def __init__(self, folder: Path, megabytes: int) -> None:
        self.folder, self._size = folder, megabytes
        self._ballast = folder / ".ballast"

    @staticmethod
    def possible(scratch: Path) -> bool:
        try:
            with SmallDisk(scratch / "probe", 1):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False

    def fill(self, leave: int) -> None:
        """Use up the space except for about `leave` bytes."""
        with self._ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(b"\0" * 4096):
                pass
        os.truncate(self._ballast, max(0, self._ballast.stat().st_size - leave) // 4096 * 4096)

    def free(self) -> None:
        self._ballast.unlink(missing_ok=True)

    def __enter__(self) -> "SmallDisk":
        self.folder.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={self._size}m", "tmpfs", str(self.folder)]
        subprocess.run(command, check=True, capture_output=True)
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "--lazy", str(self.folder)], check=False, capture_output=True)


def flip_byte(folder: Path, draw: random.Random, names: str = "*") -> str:
    """Change one bit of a random non-empty file, whose name matches the pattern `names`; returns which."""
    files = sorted(path for path in folder.rglob(names) if path.is_file() and path.stat().st_size)
    path = draw.choice(files)
    place = draw.randrange(path.stat().st_size)
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << draw.randrange(8)]))
    return f"byte {place} of {path.name}"
