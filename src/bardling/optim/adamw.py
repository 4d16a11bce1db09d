"""PyTorch's AdamW without importing PyTorch's compiler, which takes over a second of a short run.

`torch.optim` disables compilation of several optimizer methods, and imports the compiler to do so. Here these methods stay as
they are unless the compiler has already been imported, which matters only to code that calls them in a compiled function. With
PyTorch versions that do this differently, this module has no effect.
"""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch


def avoid_compiler_import() -> None:
    """Keep the methods shared by all optimizers from importing the compiler."""
    if "torch._dynamo" in sys.modules:
        return
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        method = getattr(getattr(torch.optim.Optimizer, name), "__wrapped__", None)
        if method is not None and not hasattr(method, "__dynamo_disable"):
            method.__dynamo_disable = method


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` whose `step` does not import the compiler. Differentiable updates are not supported."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        avoid_compiler_import()
        super().__init__(*args, **settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        update = inspect.unwrap(torch.optim.AdamW.step)
        result: float | None = update(self, closure)
        return result
