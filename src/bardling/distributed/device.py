"""The device and the number format: what the user asked for, or the best that is there, with the reason.

`auto` precision on a CPU is decided by a short measurement, since whether bfloat16 pays depends on the chip: with
AVX-512-BF16 or AMX its matrix products are two and more times faster, without them slower. The choice is recorded with
the run, and a resumed run keeps it.
"""

import contextlib
import ctypes
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from bardling.distributed.flash import use_attention
from bardling.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """A number format for matrix products, and how to compute in it."""

    name: Literal["float32", "bfloat16", "float16"]
    why: str
    device_type: str  # 'cpu', 'cuda' or 'mps'

    def autocast(self) -> AbstractContextManager[object]:
        """A context in which matrix products are computed in this format."""
        if self.name == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, dtype=DTYPES[self.name])

    @property
    def needs_scaler(self) -> bool:
        """Whether gradients need scaling: float16 has too few exponent bits for them."""
        return self.name == "float16"


def choose_device(wanted: str, local_rank: int = 0) -> torch.device:
    """Return the device that `wanted` ('auto', 'cpu', 'cuda', 'cuda:N', 'mps') means for this process.

    Raises:
        UserError: the device does not exist here.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if wanted == "auto":
        wanted = "cuda" if cuda else "mps" if mps else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise UserError(f"device = {wanted!r}: use auto, cpu, cuda, cuda:N or mps") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device = {wanted!r}: use auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda":
        if not cuda:
            raise UserError(f"device = {wanted!r}: this machine (or this build of PyTorch) has no CUDA; try --device auto")
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        if (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f"device = {str(device)!r}: there are {torch.cuda.device_count()} CUDA devices, numbered from 0")
    if device.type == "mps" and not mps:
        raise UserError("device = 'mps': this machine has no Apple GPU that PyTorch can use; try --device auto")
    return device


def choose_precision(
    wanted: Literal["auto", "float32", "bfloat16", "float16"], device: torch.device, *, fp8_but: Sequence[str] | None = None
) -> Precision:
    """Return the number format that `wanted` means on `device`, with the reason for the choice.

    Args:
        fp8_but: float8 is wanted for the linear layers of blocks but for these, whose sizes do not allow it; absent: for none.

    Raises:
        UserError: the device cannot compute in the format.
    """
    if fp8_but is not None:
        _require_fp8(device)
        but = f" but for {', '.join(fp8_but)}, whose sizes are no multiples of 16" if fp8_but else ""
        chosen = choose_precision(wanted, device)
        return replace(chosen, why=f"{chosen.why}; linear layers of blocks in float8{but}")
    if wanted != "auto":
        if wanted == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise UserError("precision = 'bfloat16': this GPU has no bfloat16 arithmetic; use float16 or float32")
        if wanted == "float16" and device.type == "cpu":
            raise UserError("precision = 'float16': CPUs train in float32 or bfloat16; choose one of these")
        return Precision(wanted, "as asked", device.type)
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision("bfloat16", "this GPU multiplies bfloat16 natively", device.type)
        return Precision("float16", "this GPU has no bfloat16 arithmetic", device.type)
    if device.type == "mps":
        return Precision("float32", "on Apple GPUs lower precision is not reliable enough to be a default", device.type)
    ratio = _narrow_speed(device)
    if ratio > 1.3:
        return Precision("bfloat16", f"this CPU multiplies it {ratio:.1f} times as fast as float32", device.type)
    return Precision("float32", f"bfloat16 runs at {ratio:.1f} times float32's speed on this CPU", device.type)


def _narrow_speed(device: torch.device, seconds: float = 1.5) -> float:
    """How many times as fast as float32 bfloat16 is multiplied.

    By turns, and each at its best, until neither has gained in two rounds: on a busy machine a single measurement of either
    may be many times too low.
    """
    speeds = dict.fromkeys((torch.float32, torch.bfloat16), 0.0)
    end, quiet = time.perf_counter() + seconds, 0
    while quiet < 2 and time.perf_counter() < end:
        found = {dtype: matmul_flops(device, dtype, seconds=0.03) for dtype in speeds}
        quiet = quiet + 1 if all(found[dtype] < 1.1 * best for dtype, best in speeds.items()) else 0
        speeds = {dtype: max(best, found[dtype]) for dtype, best in speeds.items()}
    return speeds[torch.bfloat16] / speeds[torch.float32]


def _require_fp8(device: torch.device) -> None:
    instead = "leave fp8 out: --precision bfloat16 or auto is the fastest here"
    if device.type != "cuda" or torch.version.hip is not None:
        raise UserError(f"fp8 = True on {device.type}: needs an NVIDIA GPU of compute capability 8.9 or newer; {instead}")
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        raise UserError(
            f"fp8 = True: this GPU has compute capability {major}.{minor}, but float8 needs 8.9 or newer; {instead}"
        )


def matmul_flops(device: torch.device, dtype: torch.dtype, *, size: int = 768, seconds: float = 0.05) -> float:
    """Measure the speed of square matrix products (FLOP/s): the best of the repetitions that fit into `seconds`."""
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()

    a @ b  # the first product pays for set-up
    synchronize()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        start = time.perf_counter()
        a @ b
        synchronize()
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def prepare_backend(
    device: torch.device, *, deterministic: bool, attention: Literal["auto", "fa3", "fa4"] = "auto"
) -> Callable[[], None]:
    """Switch on TF32 for float32 products where the device has it, repeatable kernels and those of attention if asked; returns
    an undo.

    On a CPU, memory that a step frees is kept for the next one; that stays so.

    Raises:
        UserError: the kernels of attention are not installed, or not for this device.
    """
    if device.type == "cpu":
        _keep_freed_memory()
    leave_attention = use_attention(attention, device)
    if device.type != "cuda":
        return lambda: None
    precision = torch.get_float32_matmul_precision()
    algorithms = torch.are_deterministic_algorithms_enabled()
    torch.set_float32_matmul_precision("highest" if deterministic else "high")
    torch.use_deterministic_algorithms(deterministic)

    def undo() -> None:
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(algorithms)
        leave_attention()

    return undo


def _keep_freed_memory() -> None:
    """Tell glibc to hand freed memory out again rather than back to the system, which would have to clear each page anew: in
    a step of a small model that was a twentieth of the time. Other C libraries are left as they are."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # <malloc.h>
        mallopt(mmap_threshold, 32 << 20)  # the largest that glibc takes: larger tensors keep coming from the system
        mallopt(trim_threshold, 2**31 - 1)


def device_name(device: torch.device) -> str:
    """The maker's name of the device, as far as the system tells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "Apple GPU"
    import platform

    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as info:
            for line in info:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux: the platform module knows the processor's name
    return platform.processor() or platform.machine()


def memory_used(device: torch.device) -> int:
    """Largest memory (bytes) this process has held so far: on the GPU, or of the process itself on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
