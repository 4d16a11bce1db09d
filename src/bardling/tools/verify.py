"""Check that a recipe keeps its promises on this machine: eight comparisons, each of two ways to the same numbers.

The recipe is shrunk to take about a minute: a few steps, a small batch and, if necessary, a shorter context and a smaller model
of the same kind. The comparisons:

resumed = uninterrupted       a run resumed from a checkpoint in its middle has the same weights, bit for bit
checkpoint round trip         the saved model, loaded again, has the validation loss that the run logged
micro-batches agree           steps with micro-batches of 1, 2 and 4 sequences
1 process = 2                 the same steps by two processes under torchrun
1 process = 2 with shards     the same, where each process holds half of the model (FSDP2)
1 process = 2 halves          the same, where each process computes half of every layer (tensor parallelism)
compiled = eager              loss and gradients of one batch
cached = full generation      greedy generation with and without a KV cache

Tolerances are relative differences. Resuming must be exact; splits and compilation change the order of summation, which shows
in the sixth digit in float32 and the third in bfloat16.

Limits: this finds faults of the software and the machine, not of a cluster; the two processes share this machine.
"""

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file

from bardling.checkpoint.load import load
from bardling.checkpoint.run_folder import RunFolder
from bardling.config import (
    ModelConfig,
    ParallelConfig,
    RunConfig,
)
from bardling.config.recipes import config_to_toml
from bardling.data.batches.loader import Batch, EvalSequences
from bardling.data.batches.packing import document_bounds, document_start
from bardling.data.tokens.corpus import open_corpus
from bardling.distributed.context import SINGLE
from bardling.distributed.device import (
    Precision,
    choose_device,
    choose_precision,
    compiler_problem,
    device_name,
)
from bardling.errors import UserError
from bardling.evaluate.loss import evaluate_loss
from bardling.generation.generate import generate
from bardling.monitor.jsonl import metrics, read_jsonl
from bardling.planning.depth import apply_depth
from bardling.planning.layout import check_tensor
from bardling.tools.small_recipe import STEPS, shallower, shrink
from bardling.training.build import Execution, build
from bardling.training.objective import NextToken
from bardling.training.run import resume, train


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool | None  # None: skipped
    result: str  # the difference found, or why the check was skipped
    tolerance: str
    seconds: float


@dataclass(frozen=True)
class VerifyResult:
    checks: list[Check]
    notes: list[str]  # how the recipe was shrunk for them
    device: str
    precision: str

    @property
    def passed(self) -> bool:
        return all(check.passed is not False for check in self.checks)


class _Skip(Exception):  # noqa: N818  not an error
    """The comparison does not apply; the message is the reason."""


def verify(
    config: RunConfig, *, seconds: float = 60.0, progress: Callable[[int, int], None] = lambda done, total: None
) -> VerifyResult:
    """Run all comparisons on a shrunk copy of `config`, in a temporary folder.

    Args:
        seconds: approximate duration; checks that would start later are skipped.
        progress: called with (checks done, total checks).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("bardling verify starts its own processes: start it without torchrun")
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device, fp8_excluded=[] if config.fp8 else None)
    with tempfile.TemporaryDirectory(prefix="bardling-verify-") as name:
        folder = Path(name)
        small, notes = shrink(apply_depth(config), folder, device, precision, seconds)
        checks = list(_Verification(small, folder, device, precision, seconds, progress).checks())
        return VerifyResult(checks, notes, device_name(device), precision.name)


_Outcome = tuple[bool | None, str, str]  # passed, difference, tolerance


@dataclass
class _Verification:
    """The comparisons and the runs that they share."""

    config: RunConfig
    folder: Path
    device: torch.device
    precision: Precision
    seconds: float
    progress: Callable[[int, int], None]

    def __post_init__(self) -> None:
        self.begin, config, device = time.monotonic(), self.config, self.device
        # Dropout masks depend on how a batch is split, so splits are compared without dropout. Two processes cannot use NCCL on
        # one GPU: splits are then compared on the CPU.
        on_cuda = device.type == "cuda" and torch.cuda.device_count() > 1
        native = on_cuda or device.type == "cpu"
        self.split = dataclasses.replace(
            config,
            device="cuda" if on_cuda else "cpu",
            precision=self.precision.name if native else "float32",
            fp8=config.fp8 and native,
            model=dataclasses.replace(config.model, dropout=0.0),
        )
        self.uninterrupted, self.context = self.folder / "uninterrupted", dataclasses.replace(SINGLE, device=device)

    @cached_property
    def base(self) -> Path:
        """The run that splits are compared with."""
        if self.device.type == "cpu" and dataclasses.replace(self.split, device=self.config.device) == self.config:
            return self.uninterrupted
        return train(self.split, self.folder / "base", quiet=True).folder

    def checks(self) -> Iterator[Check]:
        order: dict[str, Callable[[], _Outcome]] = {
            "resumed = uninterrupted": self.resumed,
            "checkpoint round trip": self.round_trip,
            "micro-batches agree": self.micro_batches,
            "cached = full generation": self.generation,
            "1 process = 2": partial(self.processes, "ddp"),
            "1 process = 2 with shards": partial(self.processes, "fsdp"),
            "1 process = 2 halves": partial(self.processes, "tensor"),
            "compiled = eager": self.compiled,
        }
        for done, (name, check) in enumerate(order.items()):
            self.progress(done, len(order))
            begin = time.monotonic()
            try:
                outcome = check()
            except _Skip as reason:
                outcome = None, str(reason), ""
            yield Check(name, *outcome, time.monotonic() - begin)
        self.progress(len(order), len(order))

    def resumed(self) -> _Outcome:
        """A copy of the run without its last checkpoint is resumed, and must end like the run."""
        train(self.config, self.uninterrupted, quiet=True)
        copy = self.folder / "resumed"
        shutil.copytree(self.uninterrupted, copy)
        shutil.rmtree(_last_checkpoint(copy))
        resume(copy, quiet=True)
        one, two = (load_file(_last_checkpoint(run) / "model.safetensors") for run in (self.uninterrupted, copy))
        worst = max(((one[name] - two[name]).abs().max().item() for name in one), default=0.0)
        same = one.keys() == two.keys() and worst == 0.0 and _losses(copy) == _losses(self.uninterrupted)
        return same, f"weights differ by {worst:.1e}" if worst else "bit for bit" if same else "losses differ", "0"

    def round_trip(self) -> _Outcome:
        """The loaded checkpoint has the loss that was logged before it was saved."""
        model = load(_last_checkpoint(self.uninterrupted)).build().to(self.device)
        config = RunFolder(self.uninterrupted).config()
        dataset = open_corpus(config.data, config.model.block_size)
        start = document_start(config.data.document_mask, dataset, dataset.tokenizer)
        sequences = EvalSequences(dataset.split("val"), config.model.block_size, config.eval.windows, start)
        loss = evaluate_loss(model, sequences, batch_size=2, precision=self.precision, context=self.context).loss
        return _compare([loss], [_losses(self.uninterrupted, "val")[-1]], 1e-6)

    def micro_batches(self) -> _Outcome:
        """The same batches in forward passes of 1, 2 and 4 sequences."""
        losses = []
        for micro in (1, 4):
            run = self.folder / f"micro{micro}"
            settings = dataclasses.replace(self.split.train, micro_batch=micro)
            train(dataclasses.replace(self.split, train=settings), run, quiet=True)
            losses += _losses(run)
        return _compare(losses, 2 * _losses(self.base), _tolerance(self.split.precision))

    def processes(self, layout: Literal["ddp", "fsdp", "tensor"]) -> _Outcome:
        self._skip_if_late()
        if layout != "ddp" and (self.config.tune.lora_rank or self.config.fp8 or self.config.cuda_graphs):
            raise _Skip("adapters, fp8 and CUDA graphs do not go with a divided model")
        parallel = ParallelConfig(tensor=2) if layout == "tensor" else ParallelConfig(layout=layout)
        try:
            check_tensor(RunFolder(self.base).config().model, parallel.tensor or 1)
        except UserError as reason:
            raise _Skip(str(reason)) from None
        recipe, run = self.folder / f"{layout}.toml", self.folder / layout
        config = dataclasses.replace(self.split, parallel=parallel)
        recipe.write_text(config_to_toml(config), encoding="utf-8")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        done = subprocess.run(
            [*command, "-m", "bardling", "train", str(recipe), "--out", str(run)],
            env={**os.environ, "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // 2))},
            capture_output=True,
            text=True,
            timeout=max(300.0, 5 * self.seconds),
        )
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("bardling:")]
            return False, errors[0] if errors else f"torchrun exited with status {done.returncode}", ""
        return _compare(_losses(run), _losses(self.base), _tolerance(self.split.precision))

    def compiled(self) -> _Outcome:
        """Loss and gradients of one batch, with and without torch.compile; one or two layers suffice to see a difference."""
        if self.device.type == "mps":
            raise _Skip("torch.compile is not reliable on Apple GPUs")
        self._skip_if_late()
        if (problem := compiler_problem(self.device)) is not None:
            raise _Skip(f"torch.compile does not work here, because {problem}")
        config = dataclasses.replace(shallower(RunFolder(self.uninterrupted).config().model), dropout=0.0)
        tokens = torch.randint(config.vocab_size, (2, config.block_size + 1), generator=torch.Generator().manual_seed(0))
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        documents = document_bounds(inputs == int(tokens[0, 5])) if self.config.data.document_mask else None
        batch = Batch(inputs, targets, documents).to(self.device)
        (eager, expected), (loss, found) = (self._loss_and_gradients(config, batch, compiled=on) for on in (False, True))
        largest = max(gradient.abs().max().item() for gradient in expected)
        difference = max((a - b).abs().max().item() for a, b in zip(expected, found, strict=True))
        worst, tolerance = max(abs(loss - eager) / abs(eager), difference / largest), 10 * _tolerance(self.precision.name)
        return worst <= tolerance, f"{worst:.1e}", f"{tolerance:.0e}"

    def _loss_and_gradients(self, config: ModelConfig, batch: Batch, *, compiled: bool) -> tuple[float, list[torch.Tensor]]:
        recompute = self.config.train.recompute == "blocks"
        execution = Execution(self.precision, compiled=compiled, fp8=self.config.fp8, recompute=recompute)
        assembly = build(config, self.config.optim, execution, self.context, seed=1)  # as in a run
        with self.precision.autocast():
            loss = NextToken()(assembly.forward, batch).loss
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item(), [p.grad for p in assembly.state.model.parameters() if p.grad is not None]

    def generation(self) -> _Outcome:
        """Greedy generation, token by token with a KV cache, against a full forward pass."""
        loaded = load(_last_checkpoint(self.uninterrupted))
        model, size = loaded.build().to(self.device), loaded.config.vocab_size
        prompts = [[1, 2, 3, 4], [5 % size, 3]]
        count = min(24, loaded.config.block_size - 4)
        steps = generate(model, prompts, max_new_tokens=count, temperature=0.0, vocab_size=size, seed=0)
        completions = [[-1 if token is None else token for token in row] for row in zip(*steps, strict=True)]
        worst = 0.0
        with torch.no_grad():
            for prompt, completion in zip(prompts, completions, strict=True):
                tokens = torch.tensor([prompt + completion[:-1]], device=self.device)
                logits = model(tokens)[0, len(prompt) - 1 :, :size].float()  # [completion, vocab]
                chosen = logits.gather(1, torch.tensor(completion, device=self.device)[:, None])[:, 0]
                worst = max(worst, (logits.max(dim=1).values - chosen).max().item())
        # Two nearly equal logits may be swapped; the chosen token must then be as good as the best one.
        return worst <= 1e-4, f"{worst:.1e} in logits", "1e-04"

    def _skip_if_late(self) -> None:
        if (elapsed := time.monotonic() - self.begin) > self.seconds:
            raise _Skip(f"{elapsed:.0f} s have passed; --seconds {2 * elapsed:.0f} leaves time for it")


def _last_checkpoint(run: Path) -> Path:
    return run / "checkpoints" / f"step-{STEPS:06d}"


def _losses(run: Path, kind: str = "train") -> list[float]:
    return [record["loss"] for record in metrics(read_jsonl(RunFolder(run).metrics_file), kind)]


def _tolerance(precision: str) -> float:
    return 1e-5 if precision == "float32" else 1e-2


def _compare(found: list[float], expected: list[float], tolerance: float) -> _Outcome:
    """Whether two lists agree within a relative difference of `tolerance`, and the largest difference."""
    if len(found) != len(expected):
        return False, f"{len(found)} losses instead of {len(expected)}", f"{tolerance:.0e}"
    differences = [abs(a - b) / max(abs(b), 1e-12) for a, b in zip(found, expected, strict=True)]
    passed = all(difference <= tolerance for difference in differences)  # NaN is not within the tolerance
    return passed, f"{max(differences):.1e}", f"{tolerance:.0e}"
