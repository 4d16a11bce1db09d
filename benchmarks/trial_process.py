"""A `bardling` command in a process of its own, forked to save the import of PyTorch, and otherwise as a user starts it.

It parses its own `sys.argv`, has the default signal handlers and, if wanted, a terminal of its own, which can be closed. It can
announce that it begins a phase of its work (`PHASES`), so that a signal reaches it there.
"""

import contextlib
import fcntl
import importlib
import os
import signal
import sys
import termios
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from bardling.cli.main import main as bardling_main
from faults import FsyncFaults

PHASES = {
    "rendezvous": ("bardling.distributed.context", "form_group"),
    "validation": ("bardling.training.hooks.validate", "evaluate_loss"),
}
"""Module and function whose first call begins a phase."""


class Waiting:
    """Waiting for something that runs and writes to `log`."""

    log: Path
    status: int | None  # once it is over
    patience = 900.0  # seconds; compilation on a busy machine

    def over(self) -> bool:
        """Whether it has ended."""
        raise NotImplementedError

    def kill(self) -> None:
        raise NotImplementedError

    def wait_until(self, condition: Callable[[], bool]) -> bool:
        """Poll until the condition holds; False if the process exits first."""
        end = time.monotonic() + self.patience
        while not condition():
            if self.over():
                return False
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"no progress for {self.patience:.0f} s: {self.log.read_text()[-500:]}")
            time.sleep(0.0003)
        return True

    def pause(self, seconds: float) -> None:
        """Let it run for a while, or until it exits."""
        end = time.monotonic() + seconds
        self.wait_until(lambda: time.monotonic() >= end)

    def wait(self) -> int:
        self.wait_until(self.over)
        assert self.status is not None
        return self.status


class Process(Waiting):
    """A running command; its output goes to `log`.

    Args:
        faults: of its `fsync` calls.
        environment: further variables.
        phase: the phase to announce, see `reached`.
        terminal: whether it has a terminal of its own.
    """

    def __init__(
        self,
        arguments: list[str],
        log: Path,
        *,
        faults: FsyncFaults | None = None,
        environment: Mapping[str, str] = MappingProxyType({}),
        phase: str = "",
        terminal: bool = False,
    ) -> None:
        self.log = log
        self.status: int | None = None
        log.touch()
        self._terminal, theirs = os.openpty() if terminal else (-1, -1)
        self._phase, announce = os.pipe()
        os.set_blocking(self._phase, False)
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._phase)
            self.close_terminal()  # this end of it: it is closed only once nobody holds it
            if phase:
                _announce(phase, announce)
            _child(arguments, log, faults, environment, theirs)
        os.close(announce)
        if terminal:
            os.close(theirs)
            os.set_blocking(self._terminal, False)
        if faults is not None:
            faults.begin_parent()

    def over(self) -> bool:
        self._read_terminal()
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
                os.close(self._phase)
                self.close_terminal()
        return self.status is not None

    def reached(self) -> bool:
        """Whether the phase has begun."""
        try:
            return bool(os.read(self._phase, 1))
        except BlockingIOError:
            return False

    def send(self, number: int) -> None:
        if not self.over():
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)

    def close_terminal(self) -> None:
        if self._terminal >= 0:
            os.close(self._terminal)
            self._terminal = -1

    def _read_terminal(self) -> None:
        if self._terminal >= 0:
            with contextlib.suppress(OSError), self.log.open("ab") as file:  # nothing to read, or it has exited
                while text := os.read(self._terminal, 65536):
                    file.write(text)


def _announce(phase: str, pipe: int) -> None:
    """Write to `pipe` when the phase begins."""
    module, name = PHASES[phase]
    found = importlib.import_module(module)
    original = getattr(found, name)

    def announced(*arguments: object, **options: object) -> object:
        os.write(pipe, b"x")
        return original(*arguments, **options)

    setattr(found, name, announced)


def _child(arguments: list[str], log: Path, faults: FsyncFaults | None, environment: Mapping[str, str], terminal: int) -> None:
    """Body of the forked process; never returns."""
    status = 1
    try:
        if terminal >= 0:
            os.setsid()
            fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
            os.environ["TERM"] = "xterm"
        output = terminal if terminal >= 0 else os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False, buffering=1 if terminal >= 0 else -1)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
        os.environ.update(environment)
        if faults is not None:
            faults.begin_child()
        torch.set_num_threads(1)
        sys.argv = ["bardling", *arguments]
        try:
            bardling_main()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        threading._shutdown()  # as Python does at exit: ends the threads of pools, and waits for the others
    except BaseException:  # noqa: BLE001  a fork must not go on as its parent
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
