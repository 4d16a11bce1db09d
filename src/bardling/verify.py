"""Does a recipe keep its promises on this machine? Six comparisons, each of two ways to the same numbers.

The recipe is shrunk until all of it takes about a minute: a few steps, a small batch and, where need be, a shorter context and
a smaller model of the same kind. What is compared:

resumed = uninterrupted       a run that goes on from a checkpoint in its middle, weights to the bit
checkpoint round trip         the saved model, loaded again, has the validation loss that the run logged
micro-batches agree           a step in 1, 2 and 4 sequences at a time
1 process = 2                 the same steps by two processes under torchrun
compiled = eager              loss and gradients of one batch
cached = full generation      greedy text with and without the cache of keys and values

Tolerances are relative differences. Resuming must be exact; splits and compilation add numbers in another order, which float32
shows in the sixth digit and bfloat16 in the third.

Limits: it shows faults of the software and the machine, not of a cluster; two processes share this machine.
"""

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from bardling.checkpoint.load import load
from bardling.config import CheckpointConfig, EvalConfig, ModelConfig, MonitorConfig, RunConfig, SampleConfig
from bardling.configfile import config_to_toml
from bardling.data.loader import EvalWindows
from bardling.data.packing import document_bounds, document_start
from bardling.distributed.context import SINGLE
from bardling.distributed.device import DTYPES, Precision, choose_device, choose_precision, device_name, matmul_flops
from bardling.errors import UserError
from bardling.evaluate.loss import evaluate_loss
from bardling.generate import generate
from bardling.interop.dataset import open_data
from bardling.model.arithmetic import flops_per_token
from bardling.model.depth import without_dial
from bardling.model.gpt import GPT
from bardling.model.layers import use_fp8
from bardling.train.compiling import wrap
from bardling.train.run import resume, train

STEPS, BATCH = 6, 4
_ALL_STEPS = 9 * STEPS  # of all the runs together, two processes and set-up included
_SMALL_FILE = 50 << 20  # bytes of text that are prepared in seconds


@dataclass(frozen=True)
class Check:
    """One comparison."""

    name: str
    passed: bool | None  # None: skipped
    figure: str  # what was found, or why it was skipped
    tolerance: str
    seconds: float


@dataclass(frozen=True)
class VerifyResult:
    """All comparisons, and what was changed so that they fit into a minute."""

    checks: list[Check]
    notes: list[str]
    device: str
    precision: str

    @property
    def passed(self) -> bool:
        """Whether none has failed."""
        return all(check.passed is not False for check in self.checks)


class _Skip(Exception):  # noqa: N818  not an error
    """The comparison does not apply here; the message says why."""


def verify(
    config: RunConfig, *, seconds: float = 60.0, progress: Callable[[int, int], None] = lambda done, total: None
) -> VerifyResult:
    """Compare, on a shrunk copy of `config`, in a folder that is removed again.

    Args:
        seconds: what it should take about; comparisons that would begin later are skipped.
        progress: called with (comparisons done, in all).

    Raises:
        UserError: the recipe does not fit this machine.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("bardling verify starts its own processes: start it without torchrun")
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device, fp8_but=[] if config.fp8 else None)
    with tempfile.TemporaryDirectory(prefix="bardling-verify-") as name, _cache(Path(name)):
        folder = Path(name)
        small, notes = shrink(without_dial(config), folder, device, precision, seconds)
        return VerifyResult(
            list(_Verification(small, folder, device, precision, seconds, progress).checks()),
            notes,
            device_name(device),
            precision.name,
        )


@contextmanager
def _cache(folder: Path) -> Iterator[None]:
    """Datasets that are made here go when the folder goes."""
    before = os.environ.get("BARDLING_CACHE")
    os.environ["BARDLING_CACHE"] = str(folder / "cache")
    try:
        yield
    finally:
        os.environ.pop("BARDLING_CACHE")
        if before is not None:
            os.environ["BARDLING_CACHE"] = before


def shrink(
    config: RunConfig, folder: Path, device: torch.device, precision: Precision, seconds: float
) -> tuple[RunConfig, list[str]]:
    """A copy of `config` that trains in seconds, and what was changed in its model and data."""
    notes = []
    data = config.data
    path = Path(data.source)
    own = (path / "manifest.json").is_file() or (path.is_file() and path.stat().st_size <= _SMALL_FILE)
    if not own or data.tokenizer not in ("byte", "char"):
        lines = _text().splitlines(keepends=True)
        text = folder / "text.jsonl"  # of some two hundred documents
        documents = ("".join(lines[first : first + 20]) for first in range(0, len(lines), 20))
        text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")
        if not own:
            notes.append("made-up text, since the recipe's own would take long to prepare")
            data = dataclasses.replace(data, source=str(text), tokenizer="byte", cache="")
        elif not (path / "manifest.json").is_file() and not Path(data.tokenizer).exists():
            notes.append(f"text by bytes instead of {data.tokenizer}")
            data = dataclasses.replace(data, tokenizer="byte")
    model = config.model
    if model.init:
        notes.append(f"new weights instead of {model.init}")
        model = dataclasses.replace(model, init="")
    peak = matmul_flops(device, DTYPES[precision.name])
    budget = seconds / 6 * peak * 0.2  # FLOPs: most of the time goes into starting, and small models are far from the peak

    def cost(model: ModelConfig) -> float:
        vocab = dataclasses.replace(model, vocab_size=model.vocab_size or 256)
        return flops_per_token(vocab, model.block_size) * BATCH * model.block_size * _ALL_STEPS

    for smaller in (_shorter, _shallower, _narrower, _shorter, _narrower):
        if cost(model) > budget:
            before, model = model, smaller(model)
            names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
            changed = [n for n in names if getattr(before, n) != getattr(model, n)]
            notes += [f"model.{n} {getattr(before, n)} -> {getattr(model, n)}" for n in changed]
    shortened = config.train.context_doublings(config.model.block_size)
    small = dataclasses.replace(
        config,
        device=str(device),
        precision=precision.name,
        compile="off",
        deterministic=True,
        model=model,
        data=data,
        optim=dataclasses.replace(config.optim, warmup_steps=2, decay_steps=None),
        train=dataclasses.replace(
            config.train,
            steps=STEPS,
            batch_size=BATCH,
            micro_batch=2,
            log_every=1,
            deadline=None,
            rank_timeout=30.0,
            # One doubling, which the resumed run has before it.
            batch_start=BATCH // 2 if config.train.batch_doublings else None,
            context_start=model.block_size // 2 if shortened and model.block_size % 2 == 0 else None,
            ramp=0.75,
        ),
        eval=EvalConfig(every=STEPS // 2, windows=4),
        sample=SampleConfig(every=0),
        checkpoint=CheckpointConfig(every=STEPS // 2, keep_last=3),
        monitor=MonitorConfig(),
    )
    return small, notes


def _shorter(model: ModelConfig) -> ModelConfig:
    return dataclasses.replace(model, block_size=max(32, min(model.block_size, 256) // 2))


def _shallower(model: ModelConfig) -> ModelConfig:
    return dataclasses.replace(model, n_layer=min(model.n_layer, 2), value_embeddings=min(model.value_embeddings, 1))


def _narrower(model: ModelConfig) -> ModelConfig:
    """Fewer heads of the same width, with as many groups of keys and values as divide them; a vocabulary of bytes."""
    heads, width = max(1, min(model.n_head, 4) // 2 or 1), model.n_embd // model.n_head
    kv = None if model.n_kv_head is None else max(n for n in range(1, heads + 1) if heads % n == 0 and n <= model.n_kv_head)
    hidden = None if model.mlp_hidden is None else max(8, model.mlp_hidden * heads // model.n_head)
    return dataclasses.replace(model, n_head=heads, n_embd=heads * width, n_kv_head=kv, mlp_hidden=hidden, vocab_size=0)


def _text() -> str:
    """Some 200 kB with a little structure, always the same."""
    chance = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    words = ["".join(chance.choices(syllables, k=chance.randint(1, 4))) for _ in range(400)]
    return "".join(" ".join(chance.choices(words, k=chance.randint(4, 12))).capitalize() + ".\n" for _ in range(4500))


class _Verification:
    """The comparisons, with the runs that they share."""

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        device: torch.device,
        precision: Precision,
        seconds: float,
        progress: Callable[[int, int], None],
    ) -> None:
        self.config, self.folder, self.device, self.precision = config, folder, device, precision
        self.seconds, self.progress, self.begin = seconds, progress, time.monotonic()
        # Masks of dropout depend on how a batch is split, so the splits are compared without it. Two processes on one GPU
        # cannot talk over NCCL: then all splits are compared on the CPU.
        enough = device.type == "cpu" or (device.type == "cuda" and torch.cuda.device_count() > 1)
        self.split = dataclasses.replace(
            config,
            device="cuda" if enough and device.type == "cuda" else "cpu",
            precision=precision.name if enough else "float32",
            fp8=config.fp8 and enough,
            model=dataclasses.replace(config.model, dropout=0.0),
        )
        self.whole, self.base = folder / "whole", folder / "base"

    def checks(self) -> Iterator[Check]:
        """Make the comparisons one after the other."""
        order: list[tuple[str, Callable[[], tuple[bool, str, str]]]] = [
            ("resumed = uninterrupted", self.resumed),
            ("checkpoint round trip", self.round_trip),
            ("micro-batches agree", self.micro_batches),
            ("cached = full generation", self.generation),
            ("1 process = 2", self.processes),
            ("compiled = eager", self.compiled),
        ]
        for done, (name, check) in enumerate(order):
            self.progress(done, len(order))
            begin = time.monotonic()
            try:
                passed, figure, tolerance = check()
                yield Check(name, passed, figure, tolerance, time.monotonic() - begin)
            except _Skip as reason:
                yield Check(name, None, str(reason), "", time.monotonic() - begin)
        self.progress(len(order), len(order))

    def resumed(self) -> tuple[bool, str, str]:
        """A copy of the run without its last checkpoint goes on, and ends as the run did."""
        train(self.config, self.whole, quiet=True)
        again = self.folder / "again"
        shutil.copytree(self.whole, again)
        shutil.rmtree(_checkpoint(again, STEPS))
        resume(again, quiet=True)
        one, two = (load_file(_checkpoint(run, STEPS) / "model.safetensors") for run in (self.whole, again))
        worst = max(((one[name] - two[name]).abs().max().item() for name in one), default=0.0)
        same = one.keys() == two.keys() and worst == 0.0 and _losses(again) == _losses(self.whole)
        return same, f"weights differ by {worst:.1e}" if worst else "to the bit" if same else "other losses", "0"

    def round_trip(self) -> tuple[bool, str, str]:
        """The checkpoint, loaded as any reader loads it, has the loss that was logged before it was saved."""
        loaded = load(_checkpoint(self.whole, STEPS))
        config = load_config(self.whole)
        dataset = open_data(config.data)
        start = document_start(config.data.document_mask, dataset, dataset.tokenizer)
        windows = EvalWindows(dataset.split("val"), config.model.block_size, config.eval.windows, start)
        context = dataclasses.replace(SINGLE, device=self.device)
        model = loaded.build().to(self.device)
        loss = evaluate_loss(model, windows, batch_size=2, precision=self.precision, context=context).loss
        return _agree([loss], [_losses(self.whole, "val")[-1]], 1e-6)

    def micro_batches(self) -> tuple[bool, str, str]:
        """The same batch in forward passes of 1, 2 and 4 sequences."""
        self._base()
        worst = []
        for micro in (1, 4):
            run = self.folder / f"micro{micro}"
            train(
                dataclasses.replace(self.split, train=dataclasses.replace(self.split.train, micro_batch=micro)), run, quiet=True
            )
            worst += _losses(run)
        return _agree(worst, 2 * _losses(self.base), self._tolerance())

    def processes(self) -> tuple[bool, str, str]:
        """Two processes under torchrun."""
        self._in_time()
        self._base()
        recipe, run = self.folder / "two.toml", self.folder / "two"
        recipe.write_text(config_to_toml(self.split), encoding="utf-8")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        threads = str(max(1, torch.get_num_threads() // 2))
        done = subprocess.run(
            [*command, "-m", "bardling", "train", str(recipe), "--out", str(run)],
            env={**os.environ, "OMP_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            timeout=max(300.0, 5 * self.seconds),
        )
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.startswith("bardling:")]
            return False, said[0] if said else f"torchrun ended with status {done.returncode}", ""
        return _agree(_losses(run), _losses(self.base), self._tolerance())

    def compiled(self) -> tuple[bool, str, str]:
        """Loss and gradients of one batch, with torch.compile and without; one or two layers are enough to see a difference."""
        if self.device.type == "mps":
            raise _Skip("torch.compile is not reliable on Apple GPUs")
        if self.device.type == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++", "c++", "cl")):
            raise _Skip("no C++ compiler, which torch.compile needs on a CPU")
        self._in_time()
        config = load_config(self.whole).model
        config = dataclasses.replace(_shallower(config), dropout=0.0)
        tokens = torch.randint(config.vocab_size, (2, config.block_size + 1), generator=torch.Generator().manual_seed(0))
        inputs, targets = (part.contiguous().to(self.device) for part in (tokens[:, :-1], tokens[:, 1:]))
        known = {}
        if self.config.data.document_mask:
            known = {"documents": document_bounds(tokens[:, :-1], int(tokens[0, 5])).to(self.device)}
        found: list[tuple[float, list[torch.Tensor]]] = []
        for compiled in (False, True):
            model = GPT(config, seed=1).to(self.device)
            use_fp8(model.transformer.h, self.config.fp8)
            model.recompute = self.config.train.recompute == "blocks"
            forward = wrap(model, compiled=compiled, context=dataclasses.replace(SINGLE, device=self.device))  # as a run does
            with self.precision.autocast():
                loss = forward(inputs, targets, reduction="sum", **known)
            loss.backward()
            found.append((loss.item(), [p.grad for p in model.parameters() if p.grad is not None]))
        (eager, slopes), (other, others) = found
        largest = max(slope.abs().max().item() for slope in slopes)
        apart = max((a - b).abs().max().item() for a, b in zip(slopes, others, strict=True))
        worst, tolerance = max(abs(other - eager) / abs(eager), apart / largest), 10 * self._tolerance(self.precision.name)
        return worst <= tolerance, f"{worst:.1e}", f"{tolerance:.0e}"

    def generation(self) -> tuple[bool, str, str]:
        """Greedy text, token by token from a cache, against a whole forward pass for each token."""
        loaded = load(_checkpoint(self.whole, STEPS))
        model, size = loaded.build().to(self.device), loaded.config.vocab_size
        prompts = [[1, 2, 3, 4], [5 % size, 3]]
        count = min(24, loaded.config.block_size - 4)
        cached: list[list[int]] = [[], []]
        for tokens in generate(model, prompts, max_new_tokens=count, temperature=0.0, vocab_size=size, seed=0):
            for row, token in zip(cached, tokens, strict=True):
                row.append(-1 if token is None else token)
        worst = 0.0
        with torch.no_grad():
            for prompt, made in zip(prompts, cached, strict=True):
                text = torch.tensor([prompt + made[:-1]], device=self.device)
                logits = model(text)[0, len(prompt) - 1 :, :size].float()  # [made, vocab]
                chosen = logits.gather(1, torch.tensor(made, device=self.device)[:, None])[:, 0]
                worst = max(worst, (logits.max(dim=1).values - chosen).max().item())
        # Two nearly equal logits may change places; the chosen token must then be as good as the best one.
        return worst <= 1e-4, f"{worst:.1e} in logits", "1e-04"

    def _base(self) -> None:
        """The run that splits are compared with."""
        if self.base.exists():
            return
        same = dataclasses.replace(self.split, device=self.config.device) == self.config and self.device.type == "cpu"
        if same:
            self.base = self.whole
        else:
            train(self.split, self.base, quiet=True)

    def _tolerance(self, precision: str = "") -> float:
        return 1e-5 if (precision or self.split.precision) == "float32" else 1e-2

    def _in_time(self) -> None:
        passed = time.monotonic() - self.begin
        if passed > self.seconds:
            raise _Skip(f"{passed:.0f} s have passed; --seconds {2 * passed:.0f} leaves time for it")


def load_config(run: Path) -> RunConfig:
    """The resolved configuration of a run."""
    from bardling.checkpoint.runfolder import RunFolder

    return RunFolder(run).config()


def _checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def _losses(run: Path, kind: str = "train") -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if line["kind"] == kind]


def _agree(found: list[float], expected: list[float], tolerance: float) -> tuple[bool, str, str]:
    """Whether two lists agree to a relative difference of `tolerance`, with the figure."""
    if len(found) != len(expected):
        return False, f"{len(found)} figures instead of {len(expected)}", f"{tolerance:.0e}"
    worst = max(abs(a - b) / max(abs(b), 1e-12) for a, b in zip(found, expected, strict=True))
    return worst <= tolerance, f"{worst:.1e}", f"{tolerance:.0e}"  # NaN is not below the tolerance
