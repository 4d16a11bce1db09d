"""What PyTorch, NumPy and Python keep for the whole process: a library call neither depends on it nor changes it.

`Ambient` holds PyTorch's defaults, which decide the results of operations that do not name a dtype, device or mode; calls from
Python run with PyTorch's own (`NEUTRAL`). `isolated` also protects the random number generators, the number of threads and the
current GPU, which training changes.
"""

import contextlib
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T", bound=Callable[..., object])

_AUTOCAST_DEVICES = ("cpu", "cuda", "mps")


@dataclass(frozen=True)
class Ambient:
    """The defaults of PyTorch that a caller may have changed."""

    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=partial(torch.device, "cpu"))
    inference: bool = False
    grad: bool = True
    autocast: tuple[torch.dtype | None, ...] = (None,) * len(_AUTOCAST_DEVICES)  # per device type; None: disabled
    matmul: str | None = "highest"  # float32 precision of matmuls; None: set in a way that these functions cannot express
    deterministic: tuple[bool, bool] = (False, False)  # enabled; only as a warning

    @staticmethod
    def current() -> "Ambient":
        """The defaults now."""
        autocast = (torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in _AUTOCAST_DEVICES)
        matmul = None
        with contextlib.suppress(RuntimeError):  # the caller uses torch.backends.*.fp32_precision
            matmul = torch.get_float32_matmul_precision()
        deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        return Ambient(torch.get_default_dtype(), torch.get_default_device(), *modes, tuple(autocast), matmul, deterministic)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """A context with these defaults."""
        before = Ambient.current()
        if before == self:
            yield
            return
        with ExitStack() as stack:
            if self.inference != before.inference:
                stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.grad))
            if self.device != before.device:
                stack.enter_context(self.device)
            for kind, old, new in zip(_AUTOCAST_DEVICES, before.autocast, self.autocast, strict=True):
                if old != new:
                    stack.enter_context(torch.autocast(kind, dtype=new, enabled=new is not None))
            self._set(before)
            stack.callback(before._set, self)
            yield

    def _set(self, before: "Ambient") -> None:
        """Set what PyTorch has no context manager for."""
        torch.set_default_dtype(self.dtype)
        if self.matmul is not None and before.matmul is not None:
            torch.set_float32_matmul_precision(self.matmul)
        if self.deterministic != before.deterministic:
            torch.use_deterministic_algorithms(self.deterministic[0], warn_only=self.deterministic[1])


NEUTRAL = Ambient()


@contextlib.contextmanager
def isolated() -> Iterator[Callable[[T], T]]:
    """A context with PyTorch's own defaults that leaves the process's state unchanged.

    Yields a decorator for the caller's own functions: they run as outside, random number generators included.
    """
    ambient, threads, python, numpy = Ambient.current(), torch.get_num_threads(), random.getstate(), np.random.get_state()
    # Its end sets the GPU back without creating a context on one that is not in use, as `set_device` would.
    gpu = torch.cuda.device(torch.cuda.current_device()) if torch.cuda.is_available() else contextlib.nullcontext()
    theirs = _generators()

    @contextlib.contextmanager
    def outside() -> Iterator[None]:
        nonlocal theirs
        ours = _generators()
        _set_generators(theirs)
        try:
            with ambient.applied():
                yield
        finally:
            theirs = _generators()
            _set_generators(ours)

    try:
        with gpu, NEUTRAL.applied():
            yield lambda function: outside()(function)
    finally:
        _set_generators(theirs)
        random.setstate(python)
        np.random.set_state(numpy)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def _generators() -> tuple[Tensor, list[Tensor], Tensor | None]:
    """The states of PyTorch's generators: on the CPU, on every CUDA device, on an Apple GPU."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return torch.get_rng_state(), cuda, torch.mps.get_rng_state() if torch.backends.mps.is_available() else None


def _set_generators(states: tuple[Tensor, list[Tensor], Tensor | None]) -> None:
    torch.set_rng_state(states[0])
    torch.cuda.set_rng_state_all(states[1])
    if states[2] is not None:
        torch.mps.set_rng_state(states[2])
