"""How the processes of a job meet: at the store at MASTER_ADDR:MASTER_PORT, which torchrun hosts, or else rank 0.

Whatever may wait (resolving the address, connecting, the other processes, their connections to each other) runs in a thread.
The main thread only waits for it, so a signal ends a rendezvous at once. After a few seconds, and then at growing intervals, a
line tells where this process waits and for which ranks; of the processes that have come, the first one prints it.

Limits: a process that cannot reach the store knows nothing of the others, so each of them prints its own line.
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from bardling.errors import JobLost, UserError
from bardling.files.streams import tell
from bardling.monitor.format import duration

TIMEOUT = timedelta(minutes=30)
"""Maximum wait for other processes, here and in a collective. The heartbeat detects lost processes earlier; without it, this
only has to exceed any work that one process does while the others wait."""

REMINDERS = (5.0, 15.0, 60.0, 300.0)
"""Seconds between two lines about the wait; the last interval repeats."""


def environment_number(name: str, default: int | None, low: int, high: int, environment: Mapping[str, str] = os.environ) -> int:
    """The integer in an environment variable, from `low` to `high` - 1; a `default` of None: it must be set."""
    text = environment.get(name, "" if default is None else str(default)).strip()
    value = int(text) if text.isdecimal() and len(text) < 12 else -1
    if not low <= value < high:
        limits = f"{low} to {high - 1}" + (" (WORLD_SIZE - 1)" if name == "RANK" else "")
        found = f"{name} = {text!r}" if name in environment else f"{name} is not set"
        raise UserError(f"{found}: must be an integer from {limits}: start with torchrun, or correct or unset it")
    return value


@dataclass(frozen=True)
class Place:
    """Where the processes of a job meet."""

    host: str
    port: int
    hosted: bool  # by torchrun; otherwise by rank 0
    attempt: str  # how often torchrun has restarted the job; it may keep the store, with addresses of dead processes

    @staticmethod
    def from_environment(environment: Mapping[str, str] = os.environ) -> "Place":
        hosted = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        port = environment_number("MASTER_PORT", None, 1, 2**16, environment)
        return Place(environment.get("MASTER_ADDR", ""), port, hosted, environment.get("TORCHELASTIC_RESTART_COUNT", "0"))

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def variables(self) -> str:
        return f"MASTER_ADDR = {self.host!r}, MASTER_PORT = {self.port}"

    def resolve(self) -> None:
        """Raise a `UserError` unless the address can be resolved."""
        try:
            socket.getaddrinfo(self.host or " ", self.port)  # an empty name would be that of this machine
        except (OSError, UnicodeError) as error:  # UnicodeError: a label of the name is empty or too long
            reason = getattr(error, "strerror", None) or "not a host name"
            found = f"MASTER_ADDR = {self.host!r}: cannot be resolved ({reason})" if self.host else "MASTER_ADDR is not set"
            remedy = "set it to the host name or IP address of rank 0, or start with torchrun"
            raise UserError(f"{found}: {remedy}") from None

    def listens(self) -> bool:
        """Whether a program listens there. PyTorch's store would print a trace of its C++ code for every failed attempt."""
        with contextlib.suppress(OSError), socket.create_connection((self.host, self.port), 2.0):
            return True
        return False

    def store(self, rank: int, world_size: int, timeout: timedelta = TIMEOUT) -> TCPStore:
        """A connection to the store, which rank 0 hosts unless torchrun does. Others may be missing."""
        primary = rank == 0 and not self.hosted
        tenants = {"multi_tenant": not self.hosted, "wait_for_workers": False}
        try:
            return TCPStore(self.host, self.port, world_size, is_master=primary, timeout=timeout, **tenants)
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            reason = str(error).splitlines()[0].rpartition("message: ")[2]
            if "failed to listen" in str(error):
                problem = f"MASTER_PORT = {self.port}: rank 0 cannot listen ({reason})"
                raise UserError(f"{problem}: set another port, the same for all processes") from None
            problem = f"{self.variables}: the processes cannot meet there ({reason})"
            raise UserError(f"{problem}: check that rank 0 runs there") from None


def form_group(rank: int, world_size: int, device: torch.device) -> Any:
    """Initialize PyTorch's process group with all processes of the job; returns their store, under a prefix of this group.

    Raises:
        UserError: the address or the port is unusable, or a process has not come in time.
        JobLost: the processes are there but cannot connect to each other.
    """
    meeting = _Meeting(Place.from_environment(), rank, world_size, device)
    thread = threading.Thread(target=meeting.run, name="rendezvous", daemon=True)
    thread.start()
    try:
        meeting.wait()
    finally:
        meeting.abandoned = True
    return meeting.store


@dataclass
class _Meeting:
    """A rendezvous: `run` in a thread, `wait` in the main one."""

    place: Place
    rank: int
    world_size: int
    device: torch.device
    store: PrefixStore | None = None  # the result
    error: BaseException | None = None
    waiting_for: str = ""  # what to tell about the wait; empty: another process tells it
    abandoned: bool = False
    done: threading.Event = field(default_factory=threading.Event)
    _begin: float = field(default_factory=time.monotonic)

    def wait(self) -> None:
        """Return when `run` has ended, and raise its error."""
        told = ""
        for interval in (*REMINDERS, *[REMINDERS[-1]] * (int(TIMEOUT.total_seconds() / REMINDERS[-1]) + 1)):
            if self.done.wait(interval):
                break
            told = self.waiting_for
            if told:
                tell(f"rank {self.rank} is waiting {told} ({duration(time.monotonic() - self._begin)})")
        else:
            self.error = self._too_late()
        if self.error is not None:
            raise self.error
        if told:
            tell(f"all {self.world_size} processes have joined")

    def run(self) -> None:
        try:
            self._run()
        except BaseException as error:  # noqa: BLE001  raised again in the main thread
            self.error = error
        finally:
            self.done.set()

    def _run(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # PyTorch has one for each thread
        self.waiting_for = f"for the address of {self.place} to be resolved"
        self.place.resolve()
        if self.rank or self.place.hosted:
            whom = "torchrun" if self.place.hosted else "rank 0"
            self.waiting_for = f"for {whom}, which does not listen at {self.place} (MASTER_ADDR:MASTER_PORT) yet"
            self._until(self.place.listens)
            self.waiting_for = f"for an answer at {self.place} (MASTER_ADDR:MASTER_PORT); is another program listening there?"
        server, problem = self.place.store(self.rank, self.world_size), f"the store at {self.place} has gone"
        try:
            store = self._join(server)
            self.waiting_for = f"for the {self.world_size} processes, which have met at {self.place}, to connect to each other"
            problem = f"the processes have met at {self.place} but cannot connect to each other"
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world_size, timeout=TIMEOUT)
        except RuntimeError as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise JobLost(f"{problem} ({reason}): a process has ended, or a firewall separates them") from None
        self.store = store

    def _join(self, server: TCPStore) -> PrefixStore:
        """Wait until all processes have joined; returns the store for this group."""
        self.waiting_for = ""
        # A program may form several groups, one after the other. Each has its own keys.
        attempt = f"bardling/{self.place.attempt}"
        store = PrefixStore(f"{attempt}/{server.add(f'{attempt}/groups/{self.rank}', 1)}", server)
        store.set(f"joined/{self.rank}", "")
        first = store.add("joined", 1) == 1
        self._until(lambda: store.add("joined", 0) >= self.world_size, (lambda: self._missing(store)) if first else None)
        return store

    def _until(self, condition: Callable[[], bool], explain: Callable[[], str] | None = None) -> None:
        """Poll `condition`; `explain` tells what for."""
        pause = 0.01
        while not condition():
            if self.abandoned:
                raise SystemExit
            if explain is not None:
                self.waiting_for = explain()
            if time.monotonic() - self._begin > TIMEOUT.total_seconds():
                raise self._too_late()
            time.sleep(pause)
            pause = min(0.5, 1.5 * pause)

    def _missing(self, store: PrefixStore) -> str:
        """The ranks that have not joined."""
        missing = [rank for rank in range(self.world_size) if not store.check([f"joined/{rank}"])]
        return f"for rank{'s' if len(missing) > 1 else ''} {ranges(missing)} of {self.world_size} at {self.place}"

    def _too_late(self) -> UserError:
        limit, whom = duration(TIMEOUT.total_seconds()), self.waiting_for or "for other ranks"
        remedy = "start all processes, with the same MASTER_ADDR and MASTER_PORT"
        return UserError(f"{self.place.variables}: rank {self.rank} has waited {limit} {whom}: {remedy}")


def ranges(numbers: Iterable[int]) -> str:
    """Numbers in ascending order as text: `1, 3-7`."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(f"{low}" if low == high else f"{low}-{high}" for low, high in found)
