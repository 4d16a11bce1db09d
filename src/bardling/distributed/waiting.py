"""How long a thread on a CPU keeps its core busy while it waits for the others.

Every operator ends with its threads waiting for the slowest. GNU's OpenMP, which PyTorch brings along on Linux, lets them turn
in a loop for that, 300,000 times (7 ms on one machine), before they sleep. That is the fastest way while each thread has a core
to itself. When another program wants one of the cores, the thread that is waited for stands aside, and the one that waits holds
the other core for nothing: every operator then takes milliseconds, a small step 70 times as long as without company.

With a thirtieth of these turns it takes 4 times as long, and without company one or two percent more (`benchmarks/company.py`
measures both). Results do not change.

This must be set before torch is imported, so the `bardling` command does it, not the library.
"""

import os
import platform
import sys
from collections.abc import MutableMapping

TURNS = 10_000
"""Times that a waiting thread looks before it sleeps. On x86 a turn pauses the processor; elsewhere it takes far less time, and
OpenMP's own number is none too large."""


def sleep_sooner(environment: MutableMapping[str, str] = os.environ) -> None:
    """Have OpenMP's threads wait for `TURNS`, unless the user has said how they should wait, or torch is there already."""
    said = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & environment.keys()
    if said or "torch" in sys.modules or not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return
    environment["GOMP_SPINCOUNT"] = str(TURNS)
