"""Every knob of a run, on one page.

A run is described by one `RunConfig`: a few settings of its own and a section for each part of the system. Each field's
docstring says what it does and in which unit; `bardling train --help` prints the same words. Nothing heavy is imported here,
so that help, planning and errors answer at once.

Checks that need a single section are in its `__post_init__`; those that need several are in `RunConfig.__post_init__`;
those that need the dataset or the number of processes are where these are known (`train/plan.py`).
"""

import re
from dataclasses import dataclass, field, replace
from typing import Literal

from bardling.architecture import Architecture, Family, Feedforward, Norm, Positions, QKNorm
from bardling.errors import UserError

_INF = float("inf")


def _require(condition: bool, key: str, value: object, rule: str) -> None:
    if not condition:
        raise UserError(f"{key} = {value!r}: {rule}")


def duration_seconds(text: str, key: str) -> float:
    """Seconds that a text such as 8h, 1h30m, 45m, 90s or 2d stands for; a bare number is seconds.

    Raises:
        UserError: it is none; the message names `key`.
    """
    found = re.fullmatch(r"(?:(\d{1,6})d)?(?:(\d{1,9})h)?(?:(\d{1,9})m)?(?:(\d{1,9}(?:\.\d{1,9})?)s?)?", text.strip())
    if found is None or not any(found.groups()):
        raise UserError(f"{key} = {text!r}: write a time as 8h, 1h30m, 45m, 90s or 2d")
    days, hours, minutes, seconds = (float(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def doublings(start: int | None, whole: int, key: str, whole_key: str) -> int:
    """How often a size that begins at `start` (unset: whole) doubles until it is `whole`.

    Raises:
        UserError: it never is; the message names `key` and the nearest size that fits.
    """
    fitting = [whole]
    while fitting[-1] % 2 == 0:
        fitting.append(fitting[-1] // 2)
    if start is not None and start not in fitting:
        nearest = min(fitting, key=lambda size: abs(size - start))
        raise UserError(f"{key} = {start}: must become {whole_key} = {whole} by doubling: use {nearest}")
    return 0 if start is None else fitting.index(start)


@dataclass(frozen=True)
class ModelConfig:
    """The network: a GPT-2, or a member of another family, or a mixture of their parts."""

    n_layer: int = 6
    """Transformer blocks."""
    n_head: int = 6
    """Attention heads in a block; must divide n_embd, unless head_dim is set."""
    n_embd: int = 384
    """Width of the residual stream (channels)."""
    block_size: int = 256
    """Longest context (tokens)."""
    vocab_size: int = 0
    """Entries of the vocabulary; 0 takes the tokenizer's."""
    dropout: float = 0.0
    """Probability of dropping an activation while training."""
    bias: bool = True
    """Biases in linear layers and layer norms, as in GPT-2; the families llama and qwen3 have none."""
    gelu: Literal["tanh", "erf"] = "tanh"
    """GELU's form: GPT-2's tanh approximation, or the exact one that nanoGPT uses."""
    vocab_multiple: int = 64
    """The embedding's rows are padded to a multiple of this, for speed; padded ids are never predicted."""
    init: str = ""
    """Weights to start from: gpt2, gpt2-medium, gpt2-large, gpt2-xl, USER/REPO, a folder or a file; empty draws new ones."""
    family: Family = "gpt2"
    """What unset options below are: as in GPT-2, Llama or Qwen3, which transformers opens; 'custom' mixes, from GPT-2's."""
    norm: Norm | None = None
    """Normalisation; unset takes the family's."""
    norm_eps: float | None = None
    """Term against division by zero in norms; unset takes the family's."""
    positions: Positions | None = None
    """How tokens know their places: a learned vector, or rotated queries and keys; unset takes the family's."""
    rope_theta: float | None = None
    """Base of rotary positions' wavelengths; unset takes the family's."""
    qk_norm: QKNorm | None = None
    """RMSNorm of each head's queries and keys, with or without a learned weight; unset takes the family's."""
    n_kv_head: int | None = None
    """Heads of keys and values, each shared by n_head / n_kv_head heads; unset takes n_head."""
    head_dim: int | None = None
    """Width of a head (channels); unset takes n_embd / n_head."""
    mlp: Feedforward | None = None
    """The MLP's nonlinearity; unset takes the family's."""
    mlp_hidden: int | None = None
    """Inner width of the MLP (channels); unset takes 4 n_embd, for swiglu 8/3 n_embd rounded up to a multiple of 64."""
    tied: bool | None = None
    """Use the token embedding as the head too; unset takes the family's."""
    zero_init: bool = False
    """Start the projections back into the residual stream at zero, so that every block begins as the identity."""
    init_std: float = 0.02
    """Standard deviation of initial matrices and embeddings."""
    logit_softcap: float = 0.0
    """Squash logits smoothly between plus and minus this; 0 leaves them."""
    sliding_window: int | None = None
    """Tokens that layers with a window see, themselves included; unset: every layer sees all."""
    global_every: int = 4
    """With a sliding window, every how many layers one sees all; 0: none does."""
    value_embeddings: int = 0
    """Extra token embeddings mixed into the values of as many first and last layers; 0: none."""
    depth: int = 0
    """One dial: layers of a compute-optimal run, whose width, heads, learning rates, batch and steps follow; 0: set each."""

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_multiple"):
            _require(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "must be at least 1")
        _require(self.depth >= 0, "model.depth", self.depth, "must be at least 0 (0: no dial)")
        _require(self.vocab_multiple <= 4096, "model.vocab_multiple", self.vocab_multiple, "must be at most 4096")
        _require(self.vocab_size >= 0, "model.vocab_size", self.vocab_size, "must be 0 (the tokenizer's) or more")
        _require(0.0 <= self.dropout < 1.0, "model.dropout", self.dropout, "must be at least 0 and below 1")
        for name in ("n_kv_head", "head_dim", "mlp_hidden", "sliding_window"):
            size = getattr(self, name)
            _require(size is None or size >= 1, f"model.{name}", size, "must be at least 1")
        for name in ("norm_eps", "rope_theta", "init_std"):
            number = getattr(self, name)
            _require(number is None or 0 < number < _INF, f"model.{name}", number, "must be above 0 and finite")
        rule = "must be at least 0 and finite (0: off)"
        _require(0 <= self.logit_softcap < _INF, "model.logit_softcap", self.logit_softcap, rule)
        _require(self.global_every >= 0, "model.global_every", self.global_every, "must be at least 0 (0: no layer sees all)")
        tables = (self.n_layer + 1) // 2
        rule = f"must be from 0 to {tables}, half of model.n_layer = {self.n_layer}"
        _require(0 <= self.value_embeddings <= tables, "model.value_embeddings", self.value_embeddings, rule)
        if self.n_kv_head is not None and self.n_head % self.n_kv_head:
            raise UserError(f"model.n_kv_head = {self.n_kv_head}: must divide model.n_head = {self.n_head}")
        if self.head_dim is None and self.n_embd % self.n_head:
            near = self.n_embd // self.n_head * self.n_head or self.n_head
            raise UserError(
                f"model.n_embd = {self.n_embd} is not divisible by model.n_head = {self.n_head}: "
                f"try --model.n_embd {near} or {near + self.n_head}"
            )
        made = self.architecture
        if made.positions == "rotary" and made.head_dim % 2:
            raise UserError(f"model.head_dim = {made.head_dim}: must be even for rotary positions; set --model.head_dim")

    @property
    def architecture(self) -> Architecture:
        """Every choice with its value: the options that are set, and the family's for the rest."""
        return Architecture.of(self)

    def resolved(self) -> "ModelConfig":
        """The same model with every option of its family written out. Sizes that follow from others stay unset."""
        made, options = self.architecture, ("norm", "norm_eps", "positions", "rope_theta", "qk_norm", "mlp", "bias", "tied")
        return replace(self, **{name: getattr(made, name) for name in options})

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: `vocab_size` rounded up to a multiple of `vocab_multiple`."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


@dataclass(frozen=True)
class DataConfig:
    """The text, and how it becomes tokens."""

    source: str = "stdlib"
    """'stdlib' (Python's own sources), shakespeare, openwebtext, fineweb-edu, hf:NAME[:CONFIG][:SPLIT][:FIELD] on the hub, a
    text file, a folder, a glob, FILE.jsonl[:FIELD], a prepared folder, or token files of nanoGPT, nano-gpt or llm.c."""
    tokenizer: str = "byte"
    """'byte', 'char', 'bpe:SIZE' (trained on the source), 'gpt2', or the path of a tokenizer.json."""
    val_fraction: float = 0.05
    """Part of the text that is held out for validation."""
    document_mask: bool = False
    """A token sees only its own document, in training and validation: attention stops at the end-of-text token."""
    cache: str = ""
    """Folder for datasets made from a source; empty takes $BARDLING_CACHE, else ~/.cache/bardling."""

    def __post_init__(self) -> None:
        _require(bool(self.source), "data.source", self.source, "must name a source")
        rule = "characters have no end-of-text token, which tells documents apart: leave it out, or take another data.tokenizer"
        _require(not (self.document_mask and self.tokenizer == "char"), "data.document_mask", self.document_mask, rule)
        _require(0.0 < self.val_fraction < 1.0, "data.val_fraction", self.val_fraction, "must be between 0 and 1")


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning rate."""

    name: Literal["adamw", "muon"] = "adamw"
    """AdamW for everything; or Muon for the matrices inside blocks and AdamW for the rest."""
    lr: float = 6e-4
    """Highest learning rate (of AdamW: with Muon, that of all but the matrices inside blocks)."""
    muon_lr: float = 0.02
    """Muon's highest learning rate; it follows the same schedule, and the same value suits models of any width."""
    embed_lr: float | None = None
    """With Muon, highest learning rate of embeddings; unset takes lr."""
    head_lr: float | None = None
    """With Muon, highest learning rate of a head that is not tied to the embedding; unset takes lr."""
    min_lr: float | None = None
    """Learning rate at the end of the decay; unset takes a tenth of lr."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly to lr."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape after the warm-up; 'wsd' stays at lr and decays linearly over the last decay_fraction."""
    decay_steps: int | None = None
    """Step at which the decay ends; unset takes train.steps."""
    decay_fraction: float = 0.2
    """Part of the steps in which 'wsd' decays."""
    weight_decay: float = 0.1
    """Decoupled weight decay, applied to tensors of two or more dimensions."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the gradient's mean and mean square."""
    eps: float = 1e-8
    """AdamW's term against division by zero."""
    momentum: float = 0.95
    """Muon's decay rate of the gradient's mean (Nesterov's form)."""
    muon_steps: int = 5
    """Newton-Schulz steps by which Muon orthogonalises an update: fewer are cheaper and less exact."""
    muon_precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of these steps; auto takes bfloat16 where the run's matrix products are computed in it."""
    cautious_decay: bool = False
    """With Muon, decay only those entries of its matrices whose update moves them towards zero too."""
    ema_decay: float = 0.0
    """Decay rate of a running mean of the weights, which validation and samples then use; 0 keeps none."""

    def __post_init__(self) -> None:
        for name in ("lr", "muon_lr", "embed_lr", "head_lr"):
            value = getattr(self, name)
            _require(value is None or 0 < value < _INF, f"optim.{name}", value, "must be above 0 and finite")
        _require(0 <= self.momentum < 1, "optim.momentum", self.momentum, "must be at least 0 and below 1")
        _require(1 <= self.muon_steps <= 20, "optim.muon_steps", self.muon_steps, "must be from 1 to 20")
        _require(0 <= self.ema_decay < 1, "optim.ema_decay", self.ema_decay, "must be at least 0 and below 1")
        _require(
            self.min_lr is None or 0 <= self.min_lr <= self.lr,
            "optim.min_lr",
            self.min_lr,
            f"must be between 0 and optim.lr = {self.lr}",
        )
        _require(self.warmup_steps >= 0, "optim.warmup_steps", self.warmup_steps, "must be at least 0")
        _require(self.decay_steps is None or self.decay_steps >= 1, "optim.decay_steps", self.decay_steps, "must be at least 1")
        _require(0 < self.decay_fraction <= 1, "optim.decay_fraction", self.decay_fraction, "must be above 0, at most 1")
        _require(0 <= self.weight_decay < _INF, "optim.weight_decay", self.weight_decay, "must be at least 0 and finite")
        _require(all(0 <= b < 1 for b in self.betas), "optim.betas", self.betas, "must each be at least 0 and below 1")
        _require(0 < self.eps < _INF, "optim.eps", self.eps, "must be above 0 and finite")

    @property
    def final_lr(self) -> float:
        """Learning rate at the end of the decay."""
        return self.lr / 10 if self.min_lr is None else self.min_lr


@dataclass(frozen=True)
class TrainConfig:
    """How long, and in which portions."""

    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 32
    """Sequences per optimizer step, over all processes."""
    batch_start: int | None = None
    """Sequences of the first steps; the batch doubles in equal stages until it is whole; unset: whole from the start."""
    context_start: int | None = None
    """Tokens of context in the first steps, which double likewise up to model.block_size: batches are cut into more, shorter
    sequences; unset: whole from the start."""
    ramp: float = 0.5
    """Part of the steps in which batch and context grow."""
    micro_batch: int | Literal["auto"] | None = None
    """Sequences per forward pass of one process; 'auto' finds what fits; unset: batch_size divided by the processes."""
    recompute: Literal["none", "blocks"] = "none"
    """Compute each block's activations again in the backward pass instead of keeping them: less memory, a quarter more time."""
    grad_clip: float = 1.0
    """Largest norm of the gradient; 0 switches clipping off."""
    log_every: int = 10
    """Steps between logged lines."""
    deadline: int | str | None = None
    """Time that the run may take in all: 8h, 1h30m, 90s or seconds. Its steps, and the decay, are planned to end then."""
    rank_timeout: float = 120.0
    """Seconds of silence, or without progress, after which a process counts as dead and the job ends; 0: never."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every"):
            _require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "must be at least 1")
        _require(0 < self.ramp <= 1, "train.ramp", self.ramp, "must be above 0, at most 1")
        least = isinstance(self.micro_batch, str) or self.micro_batch is None or self.micro_batch >= 1
        _require(least, "train.micro_batch", self.micro_batch, "must be at least 1, or 'auto'")
        rule = "must be at least 0 and finite (0: never)"
        _require(0 <= self.rank_timeout < _INF, "train.rank_timeout", self.rank_timeout, rule)
        seconds = self.deadline_seconds
        _require(seconds is None or seconds >= 1, "train.deadline", self.deadline, "must be at least a second")
        rule = "must be at least 0 and finite (0: no clipping)"
        _require(0 <= self.grad_clip < _INF, "train.grad_clip", self.grad_clip, rule)

    @property
    def batch_doublings(self) -> int:
        """How often the batch doubles; UserError where `batch_start` never becomes `batch_size`."""
        return doublings(self.batch_start, self.batch_size, "train.batch_start", "train.batch_size")

    def context_doublings(self, block_size: int) -> int:
        """How often the context doubles; UserError where `context_start` never becomes `block_size`."""
        return doublings(self.context_start, block_size, "train.context_start", "model.block_size")

    @property
    def deadline_seconds(self) -> float | None:
        """`deadline` in seconds; None without one."""
        if self.deadline is None or isinstance(self.deadline, int):
            return self.deadline
        return duration_seconds(self.deadline, "train.deadline")


@dataclass(frozen=True)
class EvalConfig:
    """Validation while training."""

    every: int = 250
    """Steps between validations; 0 validates only after the last step."""
    windows: int = 64
    """Windows of block_size tokens, spread evenly over the held-out split: the same ones every time."""
    tasks: tuple[str, ...] = ()
    """Multiple-choice tasks to measure while training: 'hellaswag', or the path of a JSONL file in its form."""
    tasks_every: int | None = None
    """Steps between these; unset takes eval.every."""
    task_items: int | None = None
    """Items of each task, drawn at random but the same every time; unset takes all."""

    def __post_init__(self) -> None:
        _require(self.task_items is None or self.task_items >= 1, "eval.task_items", self.task_items, "must be at least 1")
        _require(self.tasks_every is None or self.tasks_every >= 0, "eval.tasks_every", self.tasks_every, "must be at least 0")
        _require(self.every >= 0, "eval.every", self.every, "must be at least 0 (0: only at the end)")
        _require(self.windows >= 1, "eval.windows", self.windows, "must be at least 1")


@dataclass(frozen=True)
class SampleConfig:
    """Text that the model writes while it trains."""

    every: int = 0
    """Steps between samples; 0 switches them off."""
    prompt: str = ""
    """Text to go on from; empty starts from the end-of-text token (or a line break)."""
    num_samples: int = 1
    """Samples at a time."""
    max_new_tokens: int = 128
    """Longest sample (tokens)."""
    temperature: float = 0.8
    """Randomness: 0 always takes the likeliest token."""
    top_k: int | None = None
    """Only the k likeliest tokens may be drawn; unset allows all."""
    top_p: float | None = None
    """Only the likeliest tokens that together reach this probability may be drawn; unset allows all."""

    def __post_init__(self) -> None:
        _require(self.every >= 0, "sample.every", self.every, "must be at least 0 (0: no samples)")
        _require(self.num_samples >= 1, "sample.num_samples", self.num_samples, "must be at least 1")
        _require(self.max_new_tokens >= 1, "sample.max_new_tokens", self.max_new_tokens, "must be at least 1")
        rule = "must be at least 0 and finite (0: greedy)"
        _require(0 <= self.temperature < _INF, "sample.temperature", self.temperature, rule)
        _require(self.top_k is None or self.top_k >= 1, "sample.top_k", self.top_k, "must be at least 1")
        _require(self.top_p is None or 0 < self.top_p <= 1, "sample.top_p", self.top_p, "must be above 0, at most 1")


@dataclass(frozen=True)
class CheckpointConfig:
    """What is saved, and what is kept."""

    every: int | str = 250
    """Steps between checkpoints, or a time: '15m', '2h'; 0 saves only after the last step, which is always saved."""
    keep_last: int = 2
    """Newest checkpoints that are kept."""
    keep_best: int = 1
    """Newest checkpoints that are kept of those at which the validation loss was the lowest so far."""
    keep_every: int = 0
    """Checkpoints of steps divisible by this are kept for good; 0 keeps none so."""
    save_best: bool = True
    """Also save whenever the validation loss is the best so far."""
    asynchronous: bool = True
    """Write in the background while training goes on, at the price of host memory for one checkpoint."""

    def __post_init__(self) -> None:
        if isinstance(self.every, str):
            rule = "must be a number of steps, or a time with its unit, such as '90s', '15m' or '1h30m'"
            _require(bool(self.every_seconds) and not self.every.strip()[-1].isdigit(), "checkpoint.every", self.every, rule)
        else:
            _require(self.every >= 0, "checkpoint.every", self.every, "must be at least 0 (0: only at the end)")
        _require(self.keep_last >= 1, "checkpoint.keep_last", self.keep_last, "must be at least 1")
        _require(self.keep_best >= 0, "checkpoint.keep_best", self.keep_best, "must be at least 0 (0: none for its loss)")
        _require(self.keep_every >= 0, "checkpoint.keep_every", self.keep_every, "must be at least 0 (0: none for good)")

    @property
    def every_steps(self) -> int:
        """Steps between checkpoints; 0 where time decides, or only the end."""
        return self.every if isinstance(self.every, int) else 0

    @property
    def every_seconds(self) -> float | None:
        """Seconds between checkpoints; None where steps decide."""
        return duration_seconds(self.every, "checkpoint.every") if isinstance(self.every, str) else None


@dataclass(frozen=True)
class GuardConfig:
    """What is done about bad steps: those whose loss or gradient is no number, or far above that of the steps before."""

    policy: Literal["skip", "rollback", "stop", "off"] = "skip"
    """A bad step's update is left out (skip); or the run goes back to its last checkpoint and passes over the step's windows
    (rollback); or it ends (stop); off looks at nothing."""
    loss_z: float = 10.0
    """Deviations above the recent median from which on a loss is a spike; 0: only a loss that is no number is bad."""
    grad_norm_z: float = 100.0
    """The same for the gradient's norm, whose healthy spikes are higher; clipping tames them."""
    window: int = 100
    """Recent steps that give median and deviation; spikes are looked for once half of them are there."""
    max_skips: int = 10
    """Bad steps in a row that end the run: by then it has diverged."""
    max_rollbacks: int = 5
    """Rollbacks of a run; the next bad step ends it."""

    def __post_init__(self) -> None:
        for name in ("loss_z", "grad_norm_z"):
            value = getattr(self, name)
            _require(0 <= value < _INF, f"guard.{name}", value, "must be at least 0 and finite (0: off)")
        _require(8 <= self.window <= 10_000, "guard.window", self.window, "must be from 8 to 10000")
        _require(self.max_skips >= 1, "guard.max_skips", self.max_skips, "must be at least 1")
        _require(self.max_rollbacks >= 0, "guard.max_rollbacks", self.max_rollbacks, "must be at least 0")


@dataclass(frozen=True)
class MonitorConfig:
    """Services that show a run's figures, besides its own files and the terminal."""

    tensorboard: bool = False
    """Write TensorBoard files into the run folder."""
    wandb: Literal["off", "online", "offline"] = "off"
    """Log to Weights & Biases; offline keeps the record in the run folder until `wandb sync`."""
    wandb_project: str = "bardling"
    """Weights & Biases project."""
    wandb_name: str = ""
    """Name of the run there; empty takes the run folder's."""


@dataclass(frozen=True)
class RunConfig:
    """A whole run."""

    seed: int = 1337
    """Seed of the weights, the order of the data, dropout and samples."""
    device: str = "auto"
    """'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'; auto takes the fastest that is there."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of matrix products; auto takes what the device does well. Weights stay float32."""
    fp8: bool = False
    """Compute the linear layers of blocks in float8 while training, all else in bfloat16; for NVIDIA's Ada, Hopper or newer."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto compiles only when the run is long enough to earn the compilation back."""
    cuda_graphs: bool = False
    """Replay compiled passes as CUDA graphs: for models so small that the GPU waits for the host. Gradients are held twice."""
    attention: Literal["auto", "fa3", "fa4"] = "auto"
    """Attention's kernels on CUDA: PyTorch's own, or FlashAttention 3 (Hopper) or 4 (and Blackwell), installed beside it."""
    deterministic: bool = False
    """On CUDA, use only kernels that repeat to the bit (slower). On a CPU runs always repeat."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    def __post_init__(self) -> None:
        if self.fp8 and self.precision not in ("auto", "bfloat16"):
            raise UserError(
                f"fp8 = True with precision = {self.precision!r}: what is not float8 is bfloat16 then; leave one of them out"
            )
        if self.cuda_graphs and self.compile == "off":
            raise UserError("cuda_graphs = True with compile = 'off': they are made of compiled code; leave one of them out")
        if self.attention != "auto" and self.model.dropout:
            raise UserError(
                f"attention = {self.attention!r} with model.dropout = {self.model.dropout:g}: these kernels know no dropout; "
                "leave one of them out"
            )
        # What the dial derives is not there yet.
        ramps = not self.model.depth and self.train.batch_doublings + self.train.context_doublings(self.model.block_size)
        if ramps and self.train.deadline is not None:
            raise UserError(
                f"train.deadline = {self.train.deadline!r} leaves the number of steps open, of which the stages of "
                "train.batch_start and train.context_start are parts: set train.steps in its place, or leave these out"
            )
        end = self.optim.decay_steps or self.train.steps
        fixed = self.train.deadline is None and not self.model.depth  # with a deadline, steps are known when their speed is
        if fixed and self.optim.schedule != "constant" and self.optim.warmup_steps >= end:
            raise UserError(
                f"optim.warmup_steps = {self.optim.warmup_steps} leaves no step for the decay, which ends at step {end}: "
                f"lower it to at most {max(end - 1, 0)}, or raise train.steps"
            )
