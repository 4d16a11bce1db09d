"""Heartbeat between the processes of a run: detects processes that have died or hang, and ends the job.

A thread in every process publishes, several times per second, the process's activity and progress to a small store that all
processes can read, and reads what the others published. A process whose pulse no longer changes has died or is stopped; one
whose heartbeat continues without progress for too long hangs. Both end the job: the lowest rank that still responds prints one
line with rank, host, process id and last activity, and all exit with status 1, so that `torchrun` ends or restarts the job.

Processes form groups of consecutive ranks, about as many groups as ranks in each. Every interval, a process writes its pulse
and reads, in one operation, the pulses of its group and one entry for each other group; the first rank of a group, which has
just read its pulses, writes that entry. R ranks in G groups thus take 2R + G store operations per interval. A group whose entry
no longer changes is read pulse by pulse, so that if its first rank dies, only that rank seems silent.

In synchronous training, all processes wait if one hangs. The culprit is the one furthest behind: it has passed the fewest
points that all pass in the same order (collectives and passes) and is not waiting in a collective. Only the reader's own clock
is used, so clocks of different hosts may disagree.

Limits: activities that take long must announce it (`patience`), or they count as hanging. Stopping and continuing all processes
together, as when a laptop sleeps, is not a failure.
"""

import contextlib
import json
import math
import os
import signal
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from bardling.errors import JobLost, UserError
from bardling.files.streams import tell
from bardling.monitor.format import duration

LONG_PATIENCE = 1800.0
"""Seconds allowed for slow activities, such as compiling or writing a checkpoint to a slow disk."""

UNLIMITED_PATIENCE = math.inf
"""For activities of unknown duration, such as preparing a dataset."""

FIRST_NOTICE = 15.0
"""Seconds of waiting for other processes, before the first step, after which a line tells whom for."""

SMALLEST_GROUP = 8
"""Processes of a group, at least; fewer processes than two groups of this size form a single one."""

_STALE = 4
"""Reads without a change after which a group's entry is not trusted."""

# Ways to end that are not the fault of the process that ends.
_ORDERLY = ("", "done", "Terminated", "KeyboardInterrupt", "SystemExit", "JobLost")

_HINT = " (continue with `bardling resume`; `torchrun --max-restarts` does so automatically)"


@dataclass(frozen=True)
class Pulse:
    """What a process publishes about itself."""

    rank: int
    host: str
    pid: int
    parent: int  # process id of the parent
    beat: int = 0  # increases while the process lives
    progress: int = 0  # increases while its work proceeds
    points: int = 0  # number of collectives entered and passes begun
    waiting: bool = False  # inside a collective
    activity: str = "starting"
    patience: float = LONG_PATIENCE  # seconds that this activity may take without progress
    ended: str = ""  # how the process ended: "done" or the type of the exception; empty while it runs

    @property
    def name(self) -> str:
        """`rank 1 (host, process 123)`."""
        return f"rank {self.rank} ({self.host}, process {self.pid})"


@dataclass
class _Seen:
    """The last pulse of another process, and when it changed, by this process's clock (s)."""

    pulse: Pulse
    beat_at: float
    progress_at: float


class Heartbeat:
    """The heartbeat of this process and its view of the others.

    Args:
        store: a separate connection to the store of the job (`torch.distributed.Store`), because operations on one connection
            exclude each other and some of them wait.
        timeout: seconds without heartbeat or progress after which the job ends.
        interval: seconds between heartbeats; None for 1/40 of the timeout, from 0.05 to 0.5 s.
        leave: called with the exit status to end the process; tests replace it.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        world_size: int,
        timeout: float,
        *,
        interval: float | None = None,
        leave: Callable[[int], None] = os._exit,
    ) -> None:
        self.timeout, self._world_size, self._leave = timeout, world_size, leave
        self._interval = min(0.5, max(0.05, timeout / 40)) if interval is None else interval
        # If the store is in a stopped process, every operation waits, but not longer than the timeout.
        store.set_timeout(timedelta(seconds=max(1.0, timeout)))
        self._store = store
        self._own = Pulse(rank, socket.gethostname(), os.getpid(), os.getppid(), patience=max(LONG_PATIENCE, timeout))
        self._min_patience = LONG_PATIENCE
        self._beat = 0  # number of pulses published
        self._seen: dict[int, _Seen] = {}
        size = max(SMALLEST_GROUP, math.isqrt(world_size))
        self._groups = [range(first, min(first + size, world_size)) for first in range(0, world_size, size)]
        self._group = rank // size  # the number of the own one
        self._entries: dict[int, tuple[bytes, int]] = {}  # group -> its entry (empty: none), and reads since it has changed
        self._published = set[str]()  # keys known to exist: the store would wait for others
        self._lock, self._publishing = threading.Lock(), threading.Lock()
        self._next_notice = FIRST_NOTICE
        self._stop = threading.Event()
        self._store_failed: float | None = None
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Start the heartbeat."""
        self._thread.start()

    # Called by the main thread. Each method assigns one immutable value, which the thread may read at any time.

    def activity(self, activity: str, patience: float | None = None, *, shared: bool = False) -> None:
        """Record the start of an activity that may take `patience` seconds without progress (None: the timeout).

        `shared`: all processes start it at the same point, so one that does not is behind.
        """
        own, patience = self._own, max(patience or self.timeout, self._min_patience)
        progress, points = own.progress + 1, own.points + shared
        self._own = replace(own, progress=progress, points=points, activity=activity, patience=patience)

    def warmed_up(self) -> None:
        """Record that a step has completed, so that compilation and other first-time work no longer slow down the next ones."""
        self._min_patience = 0.0

    def warming_up(self) -> None:
        """Record that the next step may be as slow as the first one."""
        self._min_patience = LONG_PATIENCE

    def progressed(self) -> None:
        """Record progress."""
        self._own = replace(self._own, progress=self._own.progress + 1)

    def enter_collective(self) -> None:
        """Record the start of a collective."""
        own = self._own
        self._own = replace(own, progress=own.progress + 1, points=own.points + 1, waiting=True)

    def leave_collective(self) -> None:
        """Record the end of a collective."""
        self._own = replace(self._own, progress=self._own.progress + 1, waiting=False)

    def close(self, ended: str) -> None:
        """Stop the heartbeat and tell the others how this process ended."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(2 * self._interval + 1.0)
        self._own = replace(self._own, ended=ended)
        with contextlib.suppress(RuntimeError):  # the store is gone with another process, so no one reads it
            self._publish()

    # The thread.

    def _publish(self) -> None:
        with self._publishing:  # so that a delayed write of the thread does not overwrite the final one
            self._beat += 1
            self._store.set(f"pulse/{self._own.rank}", json.dumps(asdict(replace(self._own, beat=self._beat))))

    def _read(self, *, directly: bool = False) -> None:
        """Update the view of the others, `directly` from their own pulses, and write the entry of a group that this process
        leads."""
        groups = range(len(self._groups))
        trusted = [] if directly else [g for g in groups if g != self._group and self._entries.get(g, (b"", 0))[1] < _STALE]
        pulses = [f"pulse/{rank}" for g in groups if g not in trusted for rank in self._groups[g]]
        entries = [] if directly else [f"group/{g}" for g in groups if g != self._group]
        keys = self._existing([*pulses, *entries])
        values = dict(zip(keys, self._store.multi_get(keys) if keys else [], strict=True))
        own = [f"pulse/{rank}" for rank in self._groups[self._group]]
        if self._own.rank == self._groups[self._group].start and len(groups) > 1:
            joined = b"[" + b",".join(values[key] for key in own if key in values) + b"]"
            self._store.set(f"group/{self._group}", zlib.compress(joined))
        for group in () if directly else groups:
            value, (before, reads) = values.get(f"group/{group}", b""), self._entries.get(group, (b"", 0))
            self._entries[group] = value, (reads + 1 if value == before else 0)
            if group in trusted and value:
                self._note(json.loads(zlib.decompress(value)))
        self._note([json.loads(values[key]) for key in pulses if key in values])

    def _existing(self, keys: list[str]) -> list[str]:
        """Those that have been published."""
        new = [key for key in keys if key not in self._published]
        if new:
            self._published.update(new if self._store.check(new) else [key for key in new if self._store.check([key])])
        return [key for key in keys if key in self._published]

    def _note(self, pulses: list[dict[str, Any]]) -> None:
        """Take into account what others have published. An entry may be older than a pulse that was read directly."""
        now = time.monotonic()
        with self._lock:
            for pulse in (Pulse(**values) for values in pulses if values["rank"] != self._own.rank):
                seen = self._seen.setdefault(pulse.rank, _Seen(pulse, now, now))
                if pulse.beat > seen.pulse.beat:
                    progress_at = seen.progress_at if pulse.progress == seen.pulse.progress else now
                    self._seen[pulse.rank] = _Seen(pulse, now, progress_at)

    def _run(self) -> None:
        before, own_progress, own_progress_at = time.monotonic(), -1, time.monotonic()
        while not self._stop.wait(self._interval):
            try:
                self._publish()
                self._read()
                self._store_failed = None
            except RuntimeError:
                self._store_failed = self._store_failed or before
            now = time.monotonic()
            if now - before > max(10 * self._interval, self.timeout / 2) and self._store_failed is None:
                # This process was stopped for a while, so it does not know what the others did meanwhile.
                with self._lock:
                    for seen in self._seen.values():
                        seen.beat_at = seen.progress_at = now
                own_progress_at = now
            before = now
            if self._own.progress != own_progress:
                own_progress, own_progress_at = self._own.progress, now
                self._next_notice = FIRST_NOTICE
            diagnosis = self._diagnose(now, own_progress_at)
            if diagnosis is not None and not self._stop.is_set():
                self._end_job(*diagnosis)
                return
            self._tell_wait(now - own_progress_at)

    def _tell_wait(self, seconds: float) -> None:
        """Before the first step, tell whom this process has been waiting for, if no lower rank waits that could tell it."""
        own = self._own
        if not (own.waiting and self._min_patience and seconds > self._next_notice):
            return
        with self._lock:
            others = [seen.pulse for seen in self._seen.values() if not seen.pulse.ended]
        busy = [pulse for pulse in others if (pulse.points, pulse.waiting) < (own.points, True)]
        if busy and own.rank == min({own.rank, *(pulse.rank for pulse in others if pulse not in busy)}):
            whom = "; ".join(f"{pulse.name}: {pulse.activity}" for pulse in busy[:4])
            tell(f"waiting for {whom}" + (f"; and {len(busy) - 4} others" if len(busy) > 4 else "") + f" ({duration(seconds)})")
        self._next_notice = 3 * seconds

    def _silent(self, now: float, seconds: float) -> list[Pulse]:
        """Processes that have sent no heartbeat for `seconds` and have not ended."""
        with self._lock:
            return [seen.pulse for seen in self._seen.values() if not seen.pulse.ended and now - seen.beat_at > seconds]

    def _diagnose(self, now: float, own_progress_at: float) -> tuple[str, list[Pulse]] | None:
        """The message to print and the culprits, or None if nothing is wrong."""
        if self._store_failed is not None:
            return self._diagnose_store(now - self._store_failed)
        silent = self._silent(now, self.timeout)
        if silent:
            ages = {pulse.rank: now - self._seen[pulse.rank].beat_at for pulse in silent}
            lines = [f"{p.name} has not answered for {ages[p.rank]:.0f} s; it was last in: {p.activity}" for p in silent]
            return "; ".join(lines), silent
        if self._silent(now, 5 * self._interval):
            return None  # a silent process blocks the others, and only it is reported once the timeout is over
        with self._lock:
            alive = [(seen.pulse, now - seen.progress_at) for seen in self._seen.values() if not seen.pulse.ended]
        alive.append((self._own, now - own_progress_at))
        fewest = min((pulse.points, pulse.waiting) for pulse, _ in alive)
        behind = [(pulse, age) for pulse, age in alive if (pulse.points, pulse.waiting) == fewest]
        behind.sort(key=lambda item: item[0].rank)
        if all(age > max(pulse.patience, self.timeout) for pulse, age in behind):
            lines = [f"{pulse.name} has made no progress for {age:.0f} s in: {pulse.activity}" for pulse, age in behind]
            return "; ".join(lines), [pulse for pulse, _ in behind]
        return None

    def _diagnose_store(self, silence: float) -> tuple[str, list[Pulse]] | None:
        """The same if the store, which rank 0 hosts, has not answered for `silence` seconds."""
        if silence <= self.timeout:
            return None
        if 0 not in self._seen:
            return f"the process that hosts the store has not answered for {silence:.0f} s", []
        culprit = self._seen[0].pulse
        return f"{culprit.name} has not answered for {silence:.0f} s; it was last in: {culprit.activity}", [culprit]

    def _is_reporter(self, culprits: list[Pulse], now: float) -> bool:
        """Whether this is the lowest rank that still responds and, if possible, is not a culprit."""
        blamed = {pulse.rank for pulse in culprits}
        silent = {pulse.rank for pulse in self._silent(now, max(6 * self._interval, 2.0))}
        with self._lock:
            ranks = {self._own.rank} | {rank for rank, seen in self._seen.items() if not seen.pulse.ended}
        return self._own.rank == min((ranks - silent - blamed) or (ranks - silent) or {self._own.rank})

    def _end_job(self, message: str, culprits: list[Pulse]) -> None:
        if self._is_reporter(culprits, time.monotonic()):
            tell(f"{message}; ending the job{_HINT}")
        else:
            time.sleep(min(2.0, 4 * self._interval))  # the reporter goes first: torchrun ends all once one process has ended
        for pulse in culprits:
            if pulse.rank != self._own.rank:
                _kill_sibling(pulse, self._own)
        self._leave(1)

    def missing(self) -> list[Pulse]:
        """Processes that have died or ended with an error, after waiting a few heartbeats to be sure."""
        missing: list[Pulse] = []
        store_answers = self._store_failed is None
        for _ in range(max(6, math.ceil(2.0 / self._interval))):  # a number of reads, not seconds: this process may be delayed
            time.sleep(self._interval)
            now = time.monotonic()
            if store_answers:  # read again: if this process's thread was delayed, the others only seem silent
                try:
                    self._read(directly=True)
                except RuntimeError:  # the store is gone with another process or waits for it: use what is known
                    store_answers = False
            with self._lock:
                failed = [seen.pulse for seen in self._seen.values() if seen.pulse.ended not in _ORDERLY]
            missing = failed or self._silent(now, max(1.0, 3 * self._interval))
            if missing:
                break
        return missing

    def explain(self, error: BaseException) -> NoReturn:
        """Turn a failed collective into one line that names the missing processes.

        Raises:
            JobLost: in the process that reports for all.
            SystemExit: in the others, with status 1; in all, with status 2, after a user error.
        """
        with _sigterm_ignored():
            missing = self.missing()
        if missing and all(pulse.ended == UserError.__name__ for pulse in missing):
            raise SystemExit(2)  # that process has already printed the user error
        if not self._is_reporter(missing, time.monotonic()) or self._own.rank in {pulse.rank for pulse in missing}:
            time.sleep(min(2.0, 4 * self._interval))
            raise SystemExit(1)
        if not missing:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise JobLost(f"the processes have lost connection in: {self._own.activity} ({reason[:200]})")
        lines = []
        for pulse in missing:
            how = f"has ended ({pulse.ended})" if pulse.ended else "is gone (killed or disconnected)"
            lines.append(f"{pulse.name} {how}; it was last in: {pulse.activity}")
        raise JobLost("; ".join(lines) + _HINT)


@contextlib.contextmanager
def _sigterm_ignored() -> Iterator[None]:
    """Ignore SIGTERM while finding out which process has died, because torchrun sends one for that reason."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _kill_sibling(pulse: Pulse, own: Pulse) -> None:
    """Kill a stopped process of the same torchrun on this host; torchrun itself would wait half a minute before doing so."""
    if pulse.host != own.host or pulse.parent != own.parent or own.parent <= 1 or pulse.pid == own.pid:
        return
    # Not Linux, or already gone: torchrun ends it.
    with contextlib.suppress(OSError, IndexError, ValueError):
        fields = Path(f"/proc/{pulse.pid}/stat").read_text(encoding="utf-8", errors="replace").rsplit(")", 1)[1].split()
        if int(fields[1]) == own.parent:  # still the same process: its id may have been reused
            os.kill(pulse.pid, signal.SIGKILL)


def lost_connection(error: BaseException) -> bool:
    """Whether `error` is a collective that failed because of another process."""
    if isinstance(error, JobLost) or not isinstance(error, RuntimeError):
        return False
    signs = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "Timed out waiting")
    return type(error).__name__.startswith("Dist") or any(sign in str(error) for sign in signs)
