"""An audit hook that detects, stops and records operations that no loader may perform.

Forbidden are commands, network connections, executing code that is not part of an imported module, and writing, creating or
removing files outside one folder. A Python audit hook cannot be removed; it acts only while it is armed.
"""

import os
import sys
from pathlib import Path
from typing import Any

import bardling

_FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "pty.spawn", "socket.connect",
    "socket.bind", "ctypes.dlopen", "pickle.find_class", "os.chown", "os.kill",
)  # fmt: skip
_CHANGES = (
    "os.chmod",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "shutil.rmtree",
    "shutil.move",
)


class ForbiddenError(BaseException):
    """Not an `Exception`, so that loaders do not catch it."""


def _place(path: str) -> str:
    """The path with its folder resolved but not its last component: removing a link changes the folder of the link."""
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))  # noqa: PTH118, PTH119, PTH120


def _paths(event: str, arguments: tuple[Any, ...]) -> list[str]:
    """The paths that an event in `_CHANGES` affects; relative ones may refer to an open folder."""
    sources = {"os.rename": (0, 1), "os.link": (0, 1), "os.symlink": (1,)}.get(event, (0,))
    above = {"os.rename": (2, 3), "os.link": (2, 3), "os.symlink": (2,), "os.mkdir": (2,), "os.remove": (1,), "os.rmdir": (1,)}
    paths = []
    for at, folder in zip(sources, above.get(event, (len(arguments),)), strict=False):
        descriptor = arguments[folder] if folder < len(arguments) else -1
        base = f"/proc/self/fd/{descriptor}" if isinstance(descriptor, int) and descriptor >= 0 else ""
        paths.append(_place(os.path.join(os.path.realpath(base) if base else str(Path.cwd()), os.fspath(arguments[at]))))  # noqa: PTH118
    return paths


class AuditHook:
    """Raises `ForbiddenError` for forbidden operations, and records them in `seen`."""

    def __init__(self) -> None:
        self.armed = False
        self.inside = ""  # the only folder that may be written to
        self.seen: list[str] = []
        self._sources = tuple(
            {sys.prefix, sys.base_prefix, str(Path(__file__).parents[1]), str(Path(bardling.__file__).parents[1]), "<frozen"}
        )
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        bad = None
        if event == "ctypes.dlopen" and arguments[0] is None:
            return  # the process itself, already loaded
        if event in _FORBIDDEN or (event == "subprocess.Popen" and arguments[1] != ["git", "rev-parse", "HEAD"]):
            bad = f"{event} {arguments!r}"
        elif event == "exec":  # late imports of modules are allowed
            code = arguments[0]
            if not (code.co_name == "<module>" and code.co_filename.startswith(self._sources)) and not self._importing():
                bad = f"exec of {code.co_filename}"
        elif event == "open":
            path, mode, flags = arguments
            writes = (isinstance(mode, str) and set(mode) & set("wax+")) or (
                isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            )
            if writes and not self._is_inside(path):
                bad = f"open {path!r} for writing"
        elif event in _CHANGES and not all(path.startswith(self.inside) for path in _paths(event, arguments)):
            bad = f"{event} {arguments!r}"
        if bad is not None:
            self.seen.append(bad[:300])
            raise ForbiddenError(bad[:300])

    def _is_inside(self, path: object) -> bool:
        if isinstance(path, int) or not isinstance(path, str | bytes | os.PathLike):
            return True  # a file descriptor: checked when it was opened
        return os.path.realpath(os.fspath(path)).startswith(self.inside) or os.fspath(path) == os.devnull

    @staticmethod
    def _importing() -> bool:
        frame = sys._getframe(2)
        while frame is not None:
            if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
                return True
            frame = frame.f_back  # type: ignore[assignment]
        return False
