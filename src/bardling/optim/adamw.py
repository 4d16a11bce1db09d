"""PyTorch's AdamW, without the second that its first use takes.

`torch.optim` marks methods of its optimizers as never to be compiled, and imports PyTorch's compiler to do so: over a second,
which is a good part of a short run. Here the methods go unmarked unless the compiler was imported before. That matters to
nobody who does not call them within a compiled function. Where a version of PyTorch does this another way, nothing changes.
"""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch


def spare_compiler() -> None:
    """Keep the methods that all optimizers share from importing the compiler."""
    if "torch._dynamo" in sys.modules:
        return
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        method = getattr(getattr(torch.optim.Optimizer, name), "__wrapped__", None)
        if method is not None and not hasattr(method, "__dynamo_disable"):
            method.__dynamo_disable = method


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW`, whose `step` does not import the compiler. The update cannot be differentiated."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        spare_compiler()
        super().__init__(*args, **settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        update = inspect.unwrap(torch.optim.AdamW.step)
        result: float | None = update(self, closure)
        return result
