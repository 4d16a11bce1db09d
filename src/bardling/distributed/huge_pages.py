"""Large tensors in pages of 2 MiB instead of 4 KiB, on Linux.

A matrix that is read once per token is spread over thousands of pages, and the processor looks up the address of each. PyTorch
asks the system for huge pages if `THP_MEM_ALLOC_ENABLE` is set; Linux gives them where `/sys/kernel/mm/transparent_hugepage/
enabled` is `madvise`, the default of most distributions. Measured on a busy CPU: GPT-2 124M generated 8 texts in float32 15-20%
faster, a single one as fast as before; 30 steps of the quickstart recipe took 6-14% less CPU time and 1-2% more memory.

The environment variable must be set before torch is imported, so the `bardling` command sets it, not the library.
"""

import os
import sys
from collections.abc import MutableMapping

VARIABLE = "THP_MEM_ALLOC_ENABLE"


def use_huge_pages(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let PyTorch use huge pages, unless the user has configured it or torch is already imported."""
    if VARIABLE not in environment and "torch" not in sys.modules and sys.platform.startswith("linux"):
        environment[VARIABLE] = "1"
