"""Worker processes that run training steps on request, so that the implementations in a comparison can take turns.

Method. A parent starts a `Worker` for each implementation, by default with the program `implementations.py`. The worker builds
its model and optimizer, reports that it is ready, and waits for requests to run some steps, which it times as a block between
two device synchronisations. Implementations can thus alternate within the same minute without sharing memory, threads or
caches, and peak memory is that of one implementation. A waiting worker uses no CPU time.

Memory beyond weights and optimizer: gradients are dropped and free memory is returned to the system; the use at that moment
is the floor, and the peak of the following steps, including gradients, is measured relative to it. On a GPU this comes from
PyTorch's allocator; on Linux it is the resident memory of the process, whose peak is reset through /proc/self/clear_refs.
Elsewhere it is unknown.
"""

import contextlib
import ctypes
import dataclasses
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from bardling.config import ModelConfig
from bardling.distributed.device import choose_device, device_name
from bardling.errors import UserError

SCRIPT = Path(__file__).resolve().with_name("implementations.py")
WITHOUT = ("compile", "chunked-loss", "fused-optimizer", "bf16", "flash", "prefetch")
"""Optimisations that `ours` can run without."""
MORE = ("fp8", "cuda-graphs", "fa3", "fa4")
"""Optimisations that it can add, on an NVIDIA GPU."""


@dataclass(frozen=True)
class Spec:
    """What one worker trains."""

    kind: str  # ours, plain, nanogpt or transformers
    model: dict[str, Any]  # fields of ModelConfig
    batch: int  # sequences per forward pass, of all processes together
    accumulation: int = 1  # gradient accumulation steps
    device: str = "cpu"
    precision: str = "auto"  # for ours; for the others bfloat16 means autocast
    compile: str = "auto"
    run_steps: int = 5000  # of the run for which 'auto' decides
    fast: bool = False  # plain: as on a GPU
    without: tuple[str, ...] = ()  # of WITHOUT
    more: tuple[str, ...] = ()  # of MORE
    recompute: str = "none"  # of ours
    path: str = ""  # nanogpt: the checkout
    lr: float = 1e-3
    processes: int = 1  # that train together
    layout: str = "ddp"  # of several processes: ddp or fsdp
    reshard: bool = False  # with fsdp: gather weights again for the backward pass

    @property
    def tokens_per_step(self) -> int:
        """Tokens per step."""
        return self.batch * self.accumulation * int(self.model["block_size"])

    @property
    def config(self) -> ModelConfig:
        """The model configuration of the library."""
        return ModelConfig(**self.model)

    def rate(self, step: int) -> float:
        """Learning rate: a short warm-up, then constant."""
        return self.lr * min(1.0, (step + 1) / 10)


@dataclass(frozen=True)
class BlockOfSteps:
    """Result of a block of steps."""

    seconds: float  # per step
    losses: tuple[float, ...]
    memory_above: int | None = None  # bytes beyond weights and optimizer, if requested
    memory_peak: int | None = None  # bytes of the whole process; on a GPU, of its tensors


class Worker:
    """A worker process, as seen by its parent: `program` with the fields of `spec`, a `Spec` unless it says otherwise.

    Raises:
        UserError: it could not be started, or exited; the message contains its last line of output.
    """

    def __init__(self, spec: Any, label: str, environment: dict[str, str] | None = None, *, program: Path = SCRIPT) -> None:
        self.spec, self.label = spec, label
        self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  closed in close()
        self._process = subprocess.Popen(
            [sys.executable, str(program), json.dumps(dataclasses.asdict(spec))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        try:
            self.facts: dict[str, Any] = self._response()
        except BaseException:
            self.close()
            raise

    def steps(self, count: int, *, memory: bool = False) -> BlockOfSteps:
        """Run a block of steps."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"steps": count, "memory": memory}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._raise_exited()
        response = self._response()
        return BlockOfSteps(**{**response, "losses": tuple(response["losses"])})

    def _response(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._raise_exited()
        response: dict[str, Any] = json.loads(line)
        if "error" in response:
            raise UserError(f"{self.label}: {response['error']}")
        return response

    def _raise_exited(self) -> NoReturn:
        status = self._process.wait()
        self._stderr.seek(0)
        last = ([line.strip() for line in self._stderr if line.strip()] or ["no output"])[-1]
        raise UserError(f"{self.label}: its process exited with status {status}: {last}")

    def close(self) -> None:
        """Stop the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()  # a worker exits at the end of its input
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._stderr.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Shutdown(Exception):  # noqa: N818  not an error
    """The parent requests no more steps."""


@dataclass
class StepServer:
    """The worker's side of the protocol: called before and after each step."""

    device: torch.device
    responses: Any  # text stream to the parent
    model: nn.Module | None = None
    left: int = 0
    count: int = 0
    losses: list[Tensor] = field(default_factory=list)
    begun: float = 0.0
    floor: int | None = None
    clock: Callable[[], float] = time.perf_counter

    def ready(self, model: nn.Module, **facts: object) -> None:
        """Report that everything is built."""
        self.model = model
        self._send({"parameters": sum(p.numel() for p in model.parameters()), "device": device_name(self.device), **facts})

    def before(self) -> None:
        """Return when a step is requested; at the end of a block, send its result first.

        Raises:
            Shutdown: no more steps are requested.
        """
        if self.left:
            return
        if self.count:
            self._synchronize()
            seconds = (self.clock() - self.begun) / self.count
            response: dict[str, object] = {"seconds": seconds, "losses": [float(loss) for loss in self.losses]}
            if self.floor is not None:
                peak = self._peak()
                response |= {"memory_above": peak - self.floor, "memory_peak": peak}
            self._send(response)
        line = sys.stdin.readline()
        if not line:
            raise Shutdown
        command = json.loads(line)
        self.left = self.count = command["steps"]
        self.losses, self.floor = [], self._floor() if command["memory"] else None
        self._synchronize()
        self.begun = self.clock()

    def after(self, loss: Tensor | None) -> None:
        """Record a step that has been launched on the device, without waiting for it."""
        if loss is not None:
            self.losses.append(loss.detach())
        self.left -= 1

    def _send(self, message: dict[str, object]) -> None:
        self.responses.write(json.dumps(message) + "\n")
        self.responses.flush()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def _floor(self) -> int | None:
        """Bytes used by weights and optimizer alone; resets the peak. None if this cannot be determined."""
        assert self.model is not None
        for parameter in self.model.parameters():
            parameter.grad = None
        gc.collect()
        if self.device.type == "cuda":
            self._synchronize()
            torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.memory_allocated(self.device)
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (proc(5))
            return _status("VmRSS")
        except OSError:
            return None  # not Linux, or not permitted

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _status("VmHWM")


def run_worker(work: Callable[[dict[str, Any], StepServer], None]) -> None:
    """The program of a worker process: `work` with the fields of its spec. Libraries' output goes to stderr, so that stdout
    contains only responses."""
    responses = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    values = json.loads(sys.argv[1])
    try:
        work(values, StepServer(choose_device(values["device"]), responses))
    except Shutdown:
        pass
    except UserError as error:
        responses.write(json.dumps({"error": str(error)}) + "\n")
    except torch.OutOfMemoryError:
        responses.write(json.dumps({"error": "out of memory"}) + "\n")
    responses.close()


def _status(key: str) -> int:
    """A size (bytes) in /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def closest_curves(one: Sequence[float], other: Sequence[float]) -> float:
    """Largest difference of two loss curves (nats); infinite if either contains NaN or infinity."""
    gaps = [abs(a - b) for a, b in zip(one, other, strict=True)]
    return max(gap if math.isfinite(gap) else math.inf for gap in gaps)
