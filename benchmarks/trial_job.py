"""A `bardling` command in several processes on this machine, which `chaos.py` disturbs together or one by one.

There is no launcher, which would end the other processes when one has died: they must notice it themselves.
"""

import socket
from pathlib import Path
from typing import Any

from faults import FsyncFaults
from trial_process import Process, Waiting


class Job(Waiting):
    """Processes with one log; `status` is the first that is not 0, and `statuses` are those of all.

    Args:
        faulty: the rank that gets `faults`.
        options: as for `Process`.
    """

    patience = 180.0

    def __init__(
        self, arguments: list[str], log: Path, size: int, *, faults: FsyncFaults | None = None, faulty: int = 0, **options: Any
    ) -> None:
        self.log, self.status = log, None
        self.targets: tuple[int, ...] = tuple(range(size))  # the ranks that get signals
        with socket.create_server(("127.0.0.1", 0)) as server:
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1]), "WORLD_SIZE": str(size)}
        environments = {rank: {**options.pop("environment", {}), **place, "RANK": str(rank)} for rank in range(size)}
        started = {
            rank: Process(arguments, log, faults=faults if rank == faulty else None, environment=environments[rank], **options)
            for rank in sorted(environments, key=lambda rank: rank == faulty)  # last, because its faults start a thread
        }
        self.processes = [started[rank] for rank in range(size)]

    @property
    def statuses(self) -> list[int | None]:
        return [process.status for process in self.processes]

    def over(self) -> bool:
        if all(process.over() for process in self.processes):
            self.status = next(filter(None, self.statuses), 0)
        return self.status is not None

    def reached(self) -> bool:
        """Whether a process has begun the phase."""
        return any(process.reached() for process in self.processes)

    def send(self, number: int) -> None:
        for rank in self.targets:
            self.processes[rank].send(number)

    def close_terminal(self) -> None:
        for process in self.processes:
            process.close_terminal()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
