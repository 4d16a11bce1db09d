"""Children: processes that do training steps when they are told to, so that the sides of a comparison can take turns.

Method: a parent starts a `Child` for each side (`sides.py` is what it runs). The child builds its model and optimizer, says
that it is ready, and waits for the word to do some steps, which it times as a block from one wait for the device to the
next. Sides can thus take turns within the same minute while none shares memory, threads or caches with another, and peak
memory is that of one side alone. A child that waits takes no processor time.

Memory above weights and optimizer: gradients are dropped and free memory is given back to the system, the use at that
moment is the floor, and the highest use in the steps that follow, gradients included, is measured against it. On a GPU this
is what PyTorch's allocator says; on Linux the process's resident memory, whose peak is reset through /proc/self/clear_refs.
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
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from bardling.config import ModelConfig
from bardling.distributed.device import device_name
from bardling.errors import UserError

SIDES = Path(__file__).resolve().with_name("sides.py")
WITHOUT = ("compile", "chunked-loss", "fused-optimizer", "bf16", "flash", "prefetch")
"""Optimisations that `ours` can be told to leave out."""
MORE = ("fp8", "cuda-graphs", "fa3", "fa4")
"""Those that it has on request, on an NVIDIA GPU."""


@dataclass(frozen=True)
class Spec:
    """One side's work."""

    kind: str  # ours, plain, nanogpt or transformers
    model: dict[str, Any]  # fields of ModelConfig
    batch: int  # sequences in a forward pass
    accumulation: int = 1  # forward passes in a step
    device: str = "cpu"
    precision: str = "auto"  # of ours; of the others bfloat16 means autocast
    compile: str = "auto"
    run_steps: int = 5000  # of the run for which 'auto' decides
    fast: bool = False  # plain: as on a GPU
    without: tuple[str, ...] = ()  # of WITHOUT
    more: tuple[str, ...] = ()  # of MORE
    recompute: str = "none"  # of ours
    path: str = ""  # nanogpt: the checkout
    lr: float = 1e-3

    @property
    def tokens_per_step(self) -> int:
        """Tokens trained on in a step."""
        return self.batch * self.accumulation * int(self.model["block_size"])

    @property
    def config(self) -> ModelConfig:
        """The model as the library's configuration."""
        return ModelConfig(**self.model)

    def rate(self, step: int) -> float:
        """Learning rate: a short warm-up, then constant."""
        return self.lr * min(1.0, (step + 1) / 10)


@dataclass(frozen=True)
class BlockOfSteps:
    """What a child says about a block of steps."""

    seconds: float  # a step
    losses: tuple[float, ...]
    memory_above: int | None = None  # bytes above weights and optimizer, where it was asked for
    memory_peak: int | None = None  # bytes of the whole process, on a GPU of its tensors


class Child:
    """A side's process, from the parent's view.

    Raises:
        UserError: it could not be started, or ended; the message has its last words.
    """

    def __init__(self, spec: Spec, label: str, environment: dict[str, str] | None = None) -> None:
        self.spec, self.label = spec, label
        self._words = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  closed in close()
        self._process = subprocess.Popen(
            [sys.executable, str(SIDES), json.dumps(dataclasses.asdict(spec))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        try:
            self.facts: dict[str, Any] = self._answer()
        except BaseException:
            self.close()
            raise

    def steps(self, count: int, *, memory: bool = False) -> BlockOfSteps:
        """Let it do a block of steps."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"steps": count, "memory": memory}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._ended()
        answer = self._answer()
        return BlockOfSteps(**{**answer, "losses": tuple(answer["losses"])})

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._ended()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise UserError(f"{self.label}: {answer['error']}")
        return answer

    def _ended(self) -> NoReturn:
        status = self._process.wait()
        self._words.seek(0)
        last = ([line.strip() for line in self._words if line.strip()] or ["it said nothing"])[-1]
        raise UserError(f"{self.label}: its process ended with status {status}: {last}")

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()  # a child whose input ends leaves
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._words.close()

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Leave(Exception):  # noqa: N818  the parent has ended the conversation
    """No more steps are wanted."""


@dataclass
class Desk:
    """The child's side of the conversation: asked before each step, told after each."""

    device: torch.device
    answers: Any  # the text stream that goes to the parent
    model: nn.Module | None = None
    left: int = 0
    count: int = 0
    losses: list[Tensor] = field(default_factory=list)
    begun: float = 0.0
    floor: int | None = None

    def ready(self, model: nn.Module, **facts: object) -> None:
        """Say that everything is built."""
        self.model = model
        self._say({"parameters": sum(p.numel() for p in model.parameters()), "device": device_name(self.device), **facts})

    def before(self) -> None:
        """Wait until a step is wanted; answers for the block of steps that has been done.

        Raises:
            Leave: there will be none.
        """
        if self.left:
            return
        if self.count:
            self._synchronize()
            seconds = (time.perf_counter() - self.begun) / self.count
            answer: dict[str, object] = {"seconds": seconds, "losses": [float(loss) for loss in self.losses]}
            if self.floor is not None:
                peak = self._peak()
                answer |= {"memory_above": peak - self.floor, "memory_peak": peak}
            self._say(answer)
        line = sys.stdin.readline()
        if not line:
            raise Leave
        command = json.loads(line)
        self.left = self.count = command["steps"]
        self.losses, self.floor = [], self._floor() if command["memory"] else None
        self._synchronize()
        self.begun = time.perf_counter()

    def after(self, loss: Tensor | None) -> None:
        """A step has been given to the device. Nothing waits for it here."""
        if loss is not None:
            self.losses.append(loss.detach())
        self.left -= 1

    def _say(self, message: dict[str, object]) -> None:
        self.answers.write(json.dumps(message) + "\n")
        self.answers.flush()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def _floor(self) -> int | None:
        """Bytes in use when there are weights and optimizer only; starts a new peak. None where that cannot be found out."""
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
            return None  # not Linux, or not allowed

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _status("VmHWM")


def _status(key: str) -> int:
    """A size (bytes) in /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def closest_curves(one: Sequence[float], other: Sequence[float]) -> float:
    """Largest difference of two loss curves (nats); infinite where either is no number."""
    gaps = [abs(a - b) for a, b in zip(one, other, strict=True)]
    return max(gap if math.isfinite(gap) else math.inf for gap in gaps)
