"""Device and dtype: the configured ones, or the best available, with the reason.

On a CPU, `auto` precision is decided by a short measurement, because bfloat16 matmuls are at least twice as fast with
AVX-512-BF16 or AMX, and slower without. The choice is stored with the run, and a resumed run keeps it.
"""

import contextlib
import ctypes
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from bardling.errors import UserError
from bardling.model.kernels.flash_attention import attention_backend

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """The dtype of matmuls, and how to use it."""

    name: Literal["float32", "bfloat16", "float16"]
    why: str
    device_type: str  # 'cpu', 'cuda' or 'mps'

    def autocast(self) -> AbstractContextManager[object]:
        """A context in which matmuls use this dtype."""
        if self.name == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, dtype=DTYPES[self.name])

    @property
    def needs_scaler(self) -> bool:
        """Whether gradients need scaling, because float16 has too few exponent bits."""
        return self.name == "float16"


def choose_device(wanted: str) -> torch.device:
    """Return the device of this process for `wanted`: 'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'.

    Raises:
        UserError: the device does not exist.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if wanted == "auto":
        wanted = "cuda" if cuda else "mps" if mps else "cpu"
    try:
        device = torch.device(wanted)
        known = device.type in ("cpu", "cuda", "mps")
    except RuntimeError:
        known = False
    if not known:
        raise UserError(f"device = {wanted!r}: use auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda":
        if not cuda:
            raise UserError(f"device = {wanted!r}: CUDA is not available (or PyTorch is built without it); try --device auto")
        device = torch.device("cuda", device.index or 0)
        if (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f"device = {str(device)!r}: there are {torch.cuda.device_count()} CUDA devices, numbered from 0")
    if device.type == "mps" and not mps:
        raise UserError("device = 'mps': PyTorch finds no Apple GPU on this machine; try --device auto")
    return device


def choose_precision(
    wanted: Literal["auto", "float32", "bfloat16", "float16"],
    device: torch.device,
    *,
    fp8_excluded: Sequence[str] | None = None,
    measure: Callable[[torch.device], float] | None = None,
) -> Precision:
    """Return the dtype for `wanted` on `device`, with the reason.

    Args:
        fp8_excluded: with fp8, the linear layers whose sizes do not allow it; None without fp8.
        measure: replaces `bfloat16_speedup`.

    Raises:
        UserError: the device does not support the dtype.
    """
    if fp8_excluded is not None:
        _require_fp8(device)
        exception = f", except {', '.join(fp8_excluded)}, whose sizes are not multiples of 16" if fp8_excluded else ""
        chosen = choose_precision(wanted, device, measure=measure)
        return replace(chosen, why=f"{chosen.why}; linear layers of blocks in float8{exception}")
    if wanted != "auto":
        if wanted == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise UserError("precision = 'bfloat16': this GPU does not support bfloat16; use float16 or float32")
        if wanted == "float16" and device.type == "cpu":
            raise UserError("precision = 'float16': CPUs train in float32 or bfloat16; use one of them")
        return Precision(wanted, "as configured", device.type)
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision("bfloat16", "this GPU supports bfloat16", device.type)
        return Precision("float16", "this GPU does not support bfloat16", device.type)
    if device.type == "mps":
        return Precision("float32", "lower precision is not reliable enough on Apple GPUs to be the default", device.type)
    ratio = (measure or bfloat16_speedup)(device)
    if ratio > 1.3:
        return Precision("bfloat16", f"bf16 matmul is {ratio:.1f}x faster on this CPU", device.type)
    return Precision("float32", f"bf16 matmul has {ratio:.2g}x the speed of float32 on this CPU", device.type)


def bfloat16_speedup(device: torch.device, seconds: float = 1.5) -> float:
    """Measure the speed of bfloat16 matmuls relative to float32.

    The two are measured alternately and the best of each counts, until neither improves in two rounds: on a busy machine, a
    single measurement may be many times too low. CPUs that emulate bfloat16 are so slow that small matmuls show it.
    """
    small = [matmul_flops(device, dtype, size=192, seconds=0.005) for dtype in (torch.bfloat16, torch.float32)]
    if small[0] < small[1] / 20:
        return small[0] / small[1]
    speeds = dict.fromkeys((torch.float32, torch.bfloat16), 0.0)
    end, stable_rounds = time.perf_counter() + seconds, 0
    while stable_rounds < 2 and time.perf_counter() < end:
        found = {dtype: matmul_flops(device, dtype, seconds=0.03) for dtype in speeds}
        stable_rounds = stable_rounds + 1 if all(found[dtype] < 1.1 * best for dtype, best in speeds.items()) else 0
        speeds = {dtype: max(best, found[dtype]) for dtype, best in speeds.items()}
    return speeds[torch.bfloat16] / speeds[torch.float32]


def compiler_problem(device: torch.device, *, again: bool = False) -> str | None:
    """Why `torch.compile` fails on this device, in a few words; None if it works. Compiles a trivial function."""
    try:
        torch.compile(lambda x: x + 1, dynamic=False)(torch.zeros(8, device=device))
    except Exception as error:  # noqa: BLE001  compilers and libraries fail in many ways, and a run can do without them
        if remove_damaged_code(error) and not again:
            return compiler_problem(device, again=True)
        cause = getattr(error, "inner_exception", error)
        if type(cause).__name__ == "InvalidCxxCompiler":
            name = os.environ.get("CXX")
            found = f"CXX = {name!r} is not a working compiler" if name else "there is no C++ compiler"
            return f"{found} (install g++ or clang++, or set CXX)"
        if type(cause).__name__ == "TritonMissing":
            return "there is no working Triton (pip install triton)"
        text = str(getattr(cause, "output", None) or cause).strip() or type(cause).__name__
        errors = [line.strip() for line in text.splitlines() if "error" in line.lower()] or text.splitlines()
        line = errors[-1 if "Traceback" in text else 0]  # Triton compiles in another process, whose traceback it passes on
        return f"the compiler fails: {line if len(line) <= 120 else line[:119] + '…'}"
    return None


def remove_damaged_code(error: BaseException) -> str | None:
    """If compiled code in PyTorch's cache cannot be loaded, because a compilation was killed, remove it and return its path."""
    cause = getattr(error, "inner_exception", None)  # of PyTorch's compiler
    damage = r"(/.+\.so): (?:invalid ELF|ELF |file too short|cannot read)"  # as glibc says; missing symbols are no damage
    found = re.match(damage, str(cause)) if isinstance(cause, OSError | ImportError) else None
    if found is None:
        return None
    Path(found[1]).unlink(missing_ok=True)
    return found[1]


def _require_fp8(device: torch.device) -> None:
    instead = "leave fp8 out; --precision bfloat16 or auto is the fastest here"
    if device.type != "cuda" or torch.version.hip is not None:
        raise UserError(f"fp8 = True on {device.type}: needs an NVIDIA GPU of compute capability 8.9 or newer; {instead}")
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        raise UserError(
            f"fp8 = True: this GPU has compute capability {major}.{minor}, but float8 needs 8.9 or newer; {instead}"
        )


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def matmul_flops(device: torch.device, dtype: torch.dtype, *, size: int = 768, seconds: float = 0.05) -> float:
    """Measure the speed of square matmuls (FLOP/s): the best repetition within `seconds`."""
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)

    a @ b  # warmup
    synchronize(device)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        start = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


@contextlib.contextmanager
def backend(device: torch.device, *, deterministic: bool, attention: Literal["auto", "fa3", "fa4"] = "auto") -> Iterator[None]:
    """A context with TF32 for float32 matmuls, deterministic kernels and attention kernels as configured.

    On a CPU, freed memory is kept for the next step, also afterwards.

    Raises:
        UserError: the attention kernels are not installed or do not support this device.
    """
    if device.type == "cpu":
        keep_freed_memory()
    with attention_backend(attention, device):
        if device.type != "cuda":
            yield
            return
        precision = torch.get_float32_matmul_precision()
        algorithms = torch.are_deterministic_algorithms_enabled()
        torch.set_float32_matmul_precision("highest" if deterministic else "high")
        torch.use_deterministic_algorithms(deterministic)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
            torch.use_deterministic_algorithms(algorithms)


def keep_freed_memory() -> None:
    """Tell glibc to reuse freed memory instead of returning it to the system, which has to clear each page again: this took 5%
    of a step of a small model. Other C libraries are not changed."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # <malloc.h>
        mallopt(mmap_threshold, 32 << 20)  # the maximum of glibc; larger tensors still come from the system
        mallopt(trim_threshold, 2**31 - 1)


def device_name(device: torch.device) -> str:
    """Vendor name of the device, as reported by the system."""
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
        pass  # not Linux
    return platform.processor() or platform.machine()


def free_memory(device: torch.device) -> int | None:
    """Free bytes on `device`; None if the system does not report them."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def memory_used(device: torch.device) -> int | None:
    """Peak memory of this process so far (bytes): on the GPU, or resident memory on a CPU (None on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
