"""Limits how long an OpenMP thread spins while it waits for the others.

At the end of every operator, threads wait for the slowest. GNU's OpenMP, which PyTorch bundles on Linux, lets them spin for
300,000 iterations (7 ms on one machine) before they sleep. That is fastest while each thread has its own core. If another
program needs a core, one thread is descheduled while the others spin and keep their cores busy without doing work: every
operator then takes milliseconds, and a small step takes 70 times as long.

With a thirtieth of the iterations it takes 4 times as long, at a cost of 1-2% on an idle machine
(`benchmarks/cpu_contention.py` measures both). Results do not change.

The environment variable must be set before torch is imported, so the `bardling` command sets it, not the library.
"""

import os
import platform
import sys
from collections.abc import MutableMapping

SPIN_COUNT = 10_000
"""Iterations that a waiting thread spins before it sleeps. On x86 each iteration pauses the CPU; on other CPUs an iteration is
much shorter, and OpenMP's default is not too high."""


def limit_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set `SPIN_COUNT`, unless the user has configured how threads wait or torch is already imported."""
    configured = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & environment.keys()
    if configured or "torch" in sys.modules or not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return
    environment["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
