"""Who is alive, and who holds the others up: a heartbeat among the processes of one run.

A thread in every process publishes, several times a second, what the process does and how far it has come, in a small store
that all can read. The same thread reads the others' lines. A process whose line no longer changes has died or been stopped;
one whose line is fresh but whose work has not moved for too long is stuck. Both end the job: the lowest process that still
answers prints one line with the rank, host, process number and last activity, and all leave with status 1, so that `torchrun`
ends, or restarts, the job.

In synchronous training all processes wait when one is stuck. The culprit is who is furthest behind: it has entered the fewest
collectives and is not waiting in one. Only clocks of the reader are compared, so the hosts' clocks may differ.

Limits: work that is long by nature must say so (`patience`), or it passes for stuck. A process that is stopped and continued
together with the others (a laptop's sleep) is no fault.
"""

import contextlib
import json
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from bardling.errors import JobLost, UserError

LONG = 1800.0
"""Seconds that work may take which is long by nature: compiling, or writing a checkpoint to a slow disk."""


# Ways to leave that are no fault of who leaves.
_ORDERLY = ("", "done", "Terminated", "KeyboardInterrupt", "SystemExit", "JobLost")


@dataclass(frozen=True)
class Pulse:
    """What a process says about itself."""

    rank: int
    host: str
    pid: int
    parent: int
    beat: int = 0  # grows as long as the process lives
    moves: int = 0  # grows as long as its work goes on
    collectives: int = 0  # operations entered that need all processes
    waiting: bool = False  # inside such an operation
    activity: str = "starting"
    patience: float = LONG  # seconds that this activity may take
    ended: str = ""  # how it left, once it has: "done", or the kind of error

    @property
    def name(self) -> str:
        """`rank 1 (host, process 123)`."""
        return f"rank {self.rank} ({self.host}, process {self.pid})"


@dataclass
class _Seen:
    """When another process's line last changed, by the reader's clock (s)."""

    pulse: Pulse
    beat_at: float
    move_at: float


class Watch:
    """The heartbeat of this process and its view of the others.

    Args:
        store: a connection of its own to the processes' store (`torch.distributed.Store`): operations on one connection exclude
            each other, and some of them wait.
        timeout: seconds of silence, or of work that does not move, after which the job is ended.
        interval: seconds between beats; unset takes a fortieth of the timeout, from 0.05 to 0.5 s.
        leave: called with the status when the job is to end; tests replace it.
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
        # Where the store lives in a process that was stopped, every operation waits: that must not outlast the timeout.
        store.set_timeout(timedelta(seconds=max(1.0, timeout)))
        self._store = store
        self._own = Pulse(rank, socket.gethostname(), os.getpid(), os.getppid(), patience=max(LONG, timeout))
        self._least = LONG
        self._beat = 0  # written by the thread alone, as `_own` is by the main thread alone
        self._seen: dict[int, _Seen] = {}
        self._lock, self._publishing = threading.Lock(), threading.Lock()
        self._stop = threading.Event()
        self._store_failed: float | None = None
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begin to beat."""
        self._thread.start()

    # What the main thread says. Each is one assignment of an immutable value, which the thread may read at any moment.

    def doing(self, activity: str, patience: float | None = None) -> None:
        """Say what begins now; it may take `patience` seconds (unset: the timeout)."""
        patience = max(patience or self.timeout, self._least)
        self._own = replace(self._own, moves=self._own.moves + 1, activity=activity, patience=patience)

    def steady(self) -> None:
        """Say that a step has been done: what comes now is no longer slowed by compiling and the like."""
        self._least = 0.0

    def unsteady(self) -> None:
        """Say that the next step may be as slow as the first one."""
        self._least = LONG

    def moved(self) -> None:
        """Say that the work goes on."""
        self._own = replace(self._own, moves=self._own.moves + 1)

    def enter(self) -> None:
        """An operation that needs all processes begins."""
        own = self._own
        self._own = replace(own, moves=own.moves + 1, collectives=own.collectives + 1, waiting=True)

    def left(self) -> None:
        """It has ended."""
        self._own = replace(self._own, moves=self._own.moves + 1, waiting=False)

    def close(self, ended: str) -> None:
        """Stop beating, and tell the others that this is no death."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(2 * self._interval + 1.0)
        self._own = replace(self._own, ended=ended)
        try:
            self._publish()
        except RuntimeError:
            return  # the store has left with another process: nobody reads any more

    # The thread.

    def _publish(self) -> None:
        with self._publishing:  # a line of the thread's that was held up must not replace the last one
            self._store.set(f"pulse/{self._own.rank}", json.dumps(asdict(replace(self._own, beat=self._beat))))

    def _read(self) -> None:
        for rank in range(self._world_size):
            key = f"pulse/{rank}"
            if rank != self._own.rank and self._store.check([key]):
                pulse, now = Pulse(**json.loads(self._store.get(key))), time.monotonic()
                with self._lock:
                    seen = self._seen.get(rank)
                    if seen is None:
                        self._seen[rank] = _Seen(pulse, now, now)
                        continue
                    if pulse.beat != seen.pulse.beat:
                        seen.beat_at = now
                    if pulse.moves != seen.pulse.moves:
                        seen.move_at = now
                    seen.pulse = pulse

    def _run(self) -> None:
        before, own_moves, own_at = time.monotonic(), -1, time.monotonic()
        while not self._stop.wait(self._interval):
            self._beat += 1
            try:
                self._publish()
                self._read()
                self._store_failed = None
            except RuntimeError:
                self._store_failed = self._store_failed or before
            now = time.monotonic()
            if now - before > max(10 * self._interval, self.timeout / 2) and self._store_failed is None:
                # This process itself was stopped for a while: what the others did meanwhile is unknown.
                with self._lock:
                    for seen in self._seen.values():
                        seen.beat_at = seen.move_at = now
                own_at = now
            before = now
            if self._own.moves != own_moves:
                own_moves, own_at = self._own.moves, now
            message = self._judge(now, own_at)
            if message is not None and not self._stop.is_set():
                self._end(*message)
                return

    def _silent(self, now: float, seconds: float) -> list[Pulse]:
        """Processes that have not beaten for `seconds`, and had not left."""
        with self._lock:
            return [seen.pulse for seen in self._seen.values() if not seen.pulse.ended and now - seen.beat_at > seconds]

    def _judge(self, now: float, own_at: float) -> tuple[str, list[Pulse]] | None:
        """The line to print and the culprits, or None while all is well."""
        if self._store_failed is not None:
            silence = now - self._store_failed
            culprit = self._seen[0].pulse if 0 in self._seen else None
            if silence > self.timeout:
                name = "the process that holds the processes' store" if culprit is None else culprit.name
                last = "" if culprit is None else f"; it was last in: {culprit.activity}"
                return f"{name} has not answered for {silence:.0f} s{last}", [] if culprit is None else [culprit]
            return None
        silent = self._silent(now, self.timeout)
        if silent:
            ages = {pulse.rank: now - self._seen[pulse.rank].beat_at for pulse in silent}
            return "; ".join(
                f"{p.name} has not answered for {ages[p.rank]:.0f} s; it was last in: {p.activity}" for p in silent
            ), silent
        if self._silent(now, 5 * self._interval):
            return None  # who has fallen silent holds the others up: it alone is named, when its time is over
        with self._lock:
            alive = [(seen.pulse, now - seen.move_at) for seen in self._seen.values() if not seen.pulse.ended]
        alive.append((self._own, now - own_at))
        fewest = min((pulse.collectives, pulse.waiting) for pulse, _ in alive)
        behind = [(pulse, age) for pulse, age in alive if (pulse.collectives, pulse.waiting) == fewest]
        if all(age > max(pulse.patience, self.timeout) for pulse, age in behind):
            what = [
                f"{p.name} has made no progress for {age:.0f} s in: {p.activity}"
                for p, age in sorted(behind, key=lambda b: b[0].rank)
            ]
            return "; ".join(what), [pulse for pulse, _ in behind]
        return None

    def _speaks(self, culprits: list[Pulse], now: float) -> bool:
        """Whether this is the lowest process that still answers and is not to blame itself (if any is)."""
        blamed = {pulse.rank for pulse in culprits}
        dumb = {pulse.rank for pulse in self._silent(now, max(4 * self._interval, 2.0))}
        with self._lock:
            ranks = {self._own.rank} | {rank for rank, seen in self._seen.items() if not seen.pulse.ended}
        return self._own.rank == min((ranks - dumb - blamed) or (ranks - dumb) or {self._own.rank})

    def _end(self, message: str, culprits: list[Pulse]) -> None:
        if self._speaks(culprits, time.monotonic()):
            sys.stderr.write(f"bardling: {message}; ending the job{_HINT}\n")
            sys.stderr.flush()
        else:
            time.sleep(min(2.0, 4 * self._interval))  # who speaks goes first: torchrun ends all as soon as one has left
        for pulse in culprits:
            if pulse.rank != self._own.rank:
                _put_down(pulse, self._own)
        self._leave(1)

    def missing(self) -> list[Pulse]:
        """Processes that have died or ended with an error; waits a few beats to be sure."""
        missing: list[Pulse] = []
        answers = self._store_failed is None
        for _ in range(max(6, math.ceil(2.0 / self._interval))):  # looks, not seconds: a busy machine may hold this one up
            time.sleep(self._interval)
            now = time.monotonic()
            if answers:  # read afresh: the thread may have been held up, and its silence must not pass for the others'
                try:
                    self._read()
                except RuntimeError:  # the store has left with another process, or waits for it: what is known must do
                    answers = False
            with self._lock:
                left = [seen.pulse for seen in self._seen.values() if seen.pulse.ended not in _ORDERLY]
            missing = left or self._silent(now, max(1.0, 3 * self._interval))
            if missing:
                break
        return missing

    def explain(self, error: BaseException) -> NoReturn:
        """Turn the failure of an operation between processes into one line that names who is missing.

        Raises:
            JobLost: in the process that speaks for the others.
            SystemExit: status 1, in the others.
        """
        with _undisturbed():
            missing = self.missing()
        if missing and all(pulse.ended == UserError.__name__ for pulse in missing):
            raise SystemExit(2)  # it has said what the user can put right; there is nothing to add
        if not self._speaks(missing, time.monotonic()) or self._own.rank in {pulse.rank for pulse in missing}:
            time.sleep(min(2.0, 4 * self._interval))
            raise SystemExit(1)
        if not missing:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise JobLost(f"the processes have lost each other in: {self._own.activity} ({reason[:200]})")
        lines = []
        for pulse in missing:
            how = f"has ended ({pulse.ended})" if pulse.ended else "is gone (killed, or cut off)"
            lines.append(f"{pulse.name} {how}; it was last in: {pulse.activity}")
        raise JobLost("; ".join(lines) + _HINT)


_HINT = " (go on with `bardling resume`; under `torchrun --max-restarts` that happens by itself)"


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Leave SIGTERM aside for the few beats it takes to find out who has died: torchrun sends one because of that death."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _put_down(pulse: Pulse, own: Pulse) -> None:
    """Kill a stopped process that the same torchrun started on this host, which would wait half a minute before it does so."""
    if pulse.host != own.host or pulse.parent != own.parent or own.parent <= 1 or pulse.pid == own.pid:
        return
    try:
        fields = Path(f"/proc/{pulse.pid}/stat").read_text(encoding="utf-8", errors="replace").rsplit(")", 1)[1].split()
        if int(fields[1]) == own.parent:  # still that process: the number may have been given away since
            os.kill(pulse.pid, signal.SIGKILL)
    except (OSError, IndexError, ValueError):
        return  # not Linux, or gone already: torchrun ends it


def lost_connection(error: BaseException) -> bool:
    """Whether `error` says that an operation between processes has failed because of another process."""
    if isinstance(error, JobLost) or not isinstance(error, RuntimeError):
        return False
    text = str(error)
    signs = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "Timed out waiting")
    return type(error).__name__.startswith("Dist") or any(sign in text for sign in signs)


FOREVER = math.inf
"""Patience with work of unknown length: preparing a dataset."""
