"""The sides of a comparison, each in a process of its own that does training steps when it is told to.

Method: a parent starts a `Child` for each side. The child builds its model and optimizer, says that it is ready, and
waits for the word to do some steps, which it times as a block from one wait for the device to the next. Sides can thus
take turns within the same minute while none shares memory, threads or caches with another, and peak memory is that of
one side alone. A child that waits takes no processor time.

Sides: `ours` (the library's own parts of a run: `build_state`, `wrap`, `Prefetcher`, `fit`), `plain` (`plain.py`),
`nanogpt` (model and optimizer of a checkout, stepped as its train.py does), `transformers` (GPT2LMHeadModel under its
Trainer where `accelerate` is installed, else in the plain loop). All draw the same batches; all but transformers begin
with the same weights.

Memory above weights and optimizer: gradients are dropped and free memory is given back to the system, the use at that
moment is the floor, and the highest use in the steps that follow, gradients included, is measured against it. On a GPU
this is what PyTorch's allocator says; on Linux the process's resident memory, whose peak is reset through
/proc/self/clear_refs.
"""

import contextlib
import ctypes
import dataclasses
import gc
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bardling.config import ModelConfig, OptimConfig, RunConfig, TrainConfig
from bardling.data.loader import Batch, Prefetcher
from bardling.distributed.context import distributed
from bardling.distributed.device import DTYPES, choose_device, choose_precision, device_name, matmul_flops, prepare_backend
from bardling.errors import UserError
from bardling.model.arithmetic import flops_per_token
from bardling.model.gpt import GPT
from bardling.model.peaks import peak_flops
from bardling.train.compiling import compile_pays, wrap
from bardling.train.loop import fit
from bardling.train.persist import build_state
from bardling.train.plan import make_plan
from plain import PlainGPT, make_adamw, plain_steps

WITHOUT = ("compile", "chunked-loss", "fused-optimizer", "bf16", "flash", "prefetch")
"""Optimisations that `ours` can be told to leave out."""


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
    without: tuple[str, ...] = ()
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


class Windows:
    """Batches for every side: half the tokens skewed to small ids, half copied from the place before, so that one can learn."""

    def __init__(self, vocab_size: int, block_size: int) -> None:
        self._vocab, self._time = vocab_size, block_size

    def batch(self, first_sample: int, size: int) -> Batch:
        """[size, block_size] inputs and targets, a function of the arguments alone."""
        rng = np.random.default_rng(first_sample)
        windows = (self._vocab * rng.random((size, self._time + 1)) ** 3).astype(np.int64)  # [B, T + 1]
        copied = rng.random(windows.shape) < 0.5
        windows[:, 1:] = np.where(copied[:, 1:], windows[:, :-1], windows[:, 1:])
        tokens = torch.from_numpy(windows)
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def batches(spec: Spec, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches, one forward pass each, made when they are asked for."""
    windows, first = Windows(int(spec.model["vocab_size"]), int(spec.model["block_size"])), 0
    while True:
        batch = windows.batch(first, spec.batch)
        yield batch.inputs.to(device), batch.targets.to(device)
        first += spec.batch


class Child:
    """A side's process, from the parent's view.

    Raises:
        UserError: it could not be started, or ended; the message has its last words.
    """

    def __init__(self, spec: Spec, label: str, environment: dict[str, str] | None = None) -> None:
        self.spec, self.label = spec, label
        self._words = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  closed in close()
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), json.dumps(dataclasses.asdict(spec))],
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


class _Leave(Exception):  # noqa: N818  the parent has ended the conversation
    """No more steps are wanted."""


@dataclass
class _Desk:
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
            _Leave: there will be none.
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
            raise _Leave
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


def _start_weights(spec: Spec, rows: int) -> dict[str, Tensor]:
    """The library's initial weights, for other sides; the embedding cut or padded (with zeros) to `rows`."""
    weights = dict(GPT(spec.config, seed=0).state_dict())
    table = weights["transformer.wte.weight"][: int(spec.model["vocab_size"])]
    weights["transformer.wte.weight"] = F.pad(table, (0, 0, 0, rows - table.size(0)))
    return weights


def _autocast(precision: str, device: torch.device) -> Callable[[], contextlib.AbstractContextManager[object]]:
    """What a side other than ours computes in: float32 unless asked."""
    if precision in ("bfloat16", "float16"):
        return lambda: torch.autocast(device.type, dtype=DTYPES[precision])
    return contextlib.nullcontext


def run_ours(spec: Spec, desk: _Desk) -> None:
    """The library, put together as a run puts it together."""
    without = set(spec.without)
    with distributed(spec.device) as context:
        prepare_backend(context.device, deterministic=False)
        precision = choose_precision("float32" if "bf16" in without else spec.precision, context.device)  # type: ignore[arg-type]
        name = device_name(context.device)
        peak = peak_flops(name, precision.name) or matmul_flops(context.device, DTYPES[precision.name], seconds=0.2)
        compiled = spec.compile == "on"
        if spec.compile == "auto":
            work = float(flops_per_token(spec.config)) * spec.tokens_per_step * spec.run_steps
            compiled, _ = compile_pays(work, peak, context.device)
        compiled = compiled and "compile" not in without
        config = RunConfig(
            seed=0,
            device=spec.device,
            precision=precision.name,
            compile="on" if compiled else "off",
            model=spec.config,
            optim=OptimConfig(lr=spec.lr, warmup_steps=0, schedule="constant"),
            train=TrainConfig(steps=spec.run_steps, batch_size=spec.batch * spec.accumulation, micro_batch=spec.batch),
        )
        state = build_state(config, context)
        if "fused-optimizer" in without:
            state.optimizer = make_adamw(state.model, fused=False, foreach=False)
        if "flash" in without:
            for switch in ("enable_flash_sdp", "enable_cudnn_sdp", "enable_mem_efficient_sdp"):
                getattr(torch.backends.cuda, switch)(False)
        forward: Any = wrap(state.model, compiled=compiled, context=context)
        if "chunked-loss" in without:
            forward = _full_logits(state.model, compiled)
        plan = make_plan(
            dataclasses.replace(config.train, steps=sys.maxsize), config.model.block_size, 1
        )  # until told to leave
        desk.ready(state.model, precision=precision.name, compiled=compiled)

        def hook(_: object, result: Any) -> None:
            if result is not None:
                desk.after(result.loss)
            desk.before()

        source = Windows(config.model.vocab_size, config.model.block_size)
        with contextlib.ExitStack() as stack:
            if "prefetch" in without:
                stream: Any = (Batch(*pair) for pair in batches(spec, context.device))
            else:
                requests = ((number * spec.batch, spec.batch) for number in range(sys.maxsize))
                stream = stack.enter_context(Prefetcher(source, requests, context.device))
            fit(
                state,
                stream,
                plan,
                lr_at=spec.rate,
                grad_clip=config.train.grad_clip,
                forward=forward,
                precision=precision,
                context=context,
                hooks=[hook],
            )


def _full_logits(model: GPT, compiled: bool) -> Callable[..., Tensor]:
    """The summed loss by way of all logits at once."""

    def forward(tokens: Tensor, targets: Tensor, *, reduction: str = "sum") -> Tensor:
        logits = model(tokens)  # [B, T, V]
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), reduction=reduction)

    return torch.compile(forward) if compiled else forward


def run_plain(spec: Spec, desk: _Desk) -> None:
    """`plain.py`; with `fast` compiled, in bfloat16, fused, and with a vocabulary that suits a GPU."""
    vocab = int(spec.model["vocab_size"])
    rows = -(-vocab // 64) * 64 if spec.fast else vocab
    if desk.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    model = PlainGPT(spec.model, rows)
    model.load_state_dict(_start_weights(spec, rows))
    model.to(desk.device)
    optimizer = make_adamw(model, fused=True) if spec.fast else make_adamw(model)
    precision = "bfloat16" if spec.fast or spec.precision == "bfloat16" else "float32"
    forward = torch.compile(model) if spec.fast else model
    desk.ready(model, precision=precision, compiled=spec.fast)
    _drive(spec, desk, forward, model, optimizer, precision)


def _drive(
    spec: Spec, desk: _Desk, forward: Callable[[Tensor, Tensor], Tensor], model: nn.Module, optimizer: Any, precision: str
) -> None:
    """Do plain steps for ever."""
    steps = plain_steps(
        forward,
        model,
        optimizer,
        batches(spec, desk.device),
        accumulation=spec.accumulation,
        rate=spec.rate,
        autocast=_autocast(precision, desk.device),
    )
    while True:
        desk.before()
        desk.after(next(steps))


def run_nanogpt(spec: Spec, desk: _Desk) -> None:
    """Model and optimizer of a nanoGPT checkout, stepped as its train.py does (float32 on a CPU, by its own rule)."""
    found = importlib.util.spec_from_file_location("nanogpt_model", Path(spec.path) / "model.py")
    if found is None or found.loader is None or not (Path(spec.path) / "model.py").is_file():
        raise UserError(f"{spec.path}: has no model.py; name a checkout of nanoGPT")
    module = importlib.util.module_from_spec(found)
    sys.modules["nanogpt_model"] = module  # its dataclass looks itself up there
    found.loader.exec_module(module)
    keys = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")
    model = module.GPT(module.GPTConfig(**{key: spec.model[key] for key in keys}, dropout=0.0))
    model.load_state_dict(_start_weights(spec, int(spec.model["vocab_size"])), strict=False)  # its head is the embedding
    model.to(desk.device)
    optimizer = model.configure_optimizers(0.1, spec.lr, (0.9, 0.95), desk.device.type)
    precision = "bfloat16" if spec.fast or spec.precision == "bfloat16" else "float32"
    forward = torch.compile(model) if spec.fast else model
    desk.ready(model, precision=precision, compiled=spec.fast)
    _drive(spec, desk, lambda tokens, targets: forward(tokens, targets)[1], model, optimizer, precision)


def run_transformers(spec: Spec, desk: _Desk) -> None:
    """GPT2LMHeadModel in transformers' Trainer; without `accelerate`, which that needs, in the plain loop."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        raise UserError("transformers is not installed: pip install 'bardling[hf]'") from None
    shape = spec.model
    config = GPT2Config(
        vocab_size=shape["vocab_size"],
        n_positions=shape["block_size"],
        n_embd=shape["n_embd"],
        n_layer=shape["n_layer"],
        n_head=shape["n_head"],
        activation_function="gelu_new" if shape["gelu"] == "tanh" else "gelu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).to(desk.device).train()
    precision = "bfloat16" if spec.precision == "bfloat16" else "float32"
    trainer = importlib.util.find_spec("accelerate") is not None
    desk.ready(model, precision=precision, compiled=False, how="Trainer" if trainer else "plain loop (no accelerate)")
    if trainer:
        _drive_trainer(spec, desk, model, precision)
    else:
        _drive(spec, desk, lambda tokens, _: model(tokens, labels=tokens).loss, model, make_adamw(model), precision)


def _drive_trainer(spec: Spec, desk: _Desk, model: Any, precision: str) -> None:
    """Let the Trainer train; it waits at each step's beginning."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    windows = Windows(int(spec.model["vocab_size"]), int(spec.model["block_size"]))

    class Rows(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            first = 0
            while True:
                batch = windows.batch(first, spec.batch)
                for row in batch.inputs:
                    yield {"input_ids": row, "labels": row}
                first += spec.batch

    class Turns(TrainerCallback):
        def on_step_begin(self, *_: object, **__: object) -> None:
            desk.before()

        def on_step_end(self, *_: object, **__: object) -> None:
            desk.after(None)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=spec.batch,
            gradient_accumulation_steps=spec.accumulation,
            max_steps=10**9,
            learning_rate=spec.lr,
            lr_scheduler_type="constant",
            weight_decay=0.1,
            max_grad_norm=1.0,
            bf16=precision == "bfloat16",
            use_cpu=desk.device.type == "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=[Turns()]).train()


SIDES = {"ours": run_ours, "plain": run_plain, "nanogpt": run_nanogpt, "transformers": run_transformers}


def closest_curves(one: Sequence[float], other: Sequence[float]) -> float:
    """Largest difference of two loss curves (nats); infinite where either is no number."""
    gaps = [abs(a - b) for a, b in zip(one, other, strict=True)]
    return max(gap if math.isfinite(gap) else math.inf for gap in gaps)


def _main() -> None:
    """The child: what libraries print goes to stderr, so that stdout carries answers only."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    values = json.loads(sys.argv[1])
    spec = Spec(**{**values, "without": tuple(values["without"])})
    try:
        SIDES[spec.kind](spec, _Desk(choose_device(spec.device), answers))
    except _Leave:
        pass
    except UserError as error:
        answers.write(json.dumps({"error": str(error)}) + "\n")
    except torch.OutOfMemoryError:
        answers.write(json.dumps({"error": "out of memory"}) + "\n")
    answers.close()


if __name__ == "__main__":
    _main()
