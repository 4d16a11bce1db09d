"""What a run will need, before it starts: parameters, tokens, FLOPs, memory, disk space and time.

Method: for one recipe, this module combines batch sizes (`planning/batching.py`), FLOPs (`planning/costs.py`), memory
(`planning/memory.py`), peak speeds (`planning/devices.py`) and compute-optimal sizes (`planning/scaling_laws.py`), without
torch.

Limits: time is FLOPs, including recomputation, divided by the speed at the given fraction of the peak; start-up, compilation,
sampling and saving come on top. Memory has the limits of `planning/memory.py`.
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bardling.config import ModelConfig, RunConfig
from bardling.config.checks import INF, require
from bardling.errors import UserError
from bardling.planning.batching import TrainPlan, make_plan
from bardling.planning.costs import (
    Component,
    block_parameters,
    flops_per_token,
    fp8_layers,
    palm_flops_per_token,
    parameter_table,
    parameters,
    recomputed_flops_per_token,
)
from bardling.planning.depth import apply_depth, expected_vocab_size
from bardling.planning.devices import device_memory as known_memory
from bardling.planning.devices import peak_flops as known_peak
from bardling.planning.layout import Layout, check_context, check_pipeline, choose_layout, sharded_bytes
from bardling.planning.memory import MemoryPlan, memory_plan
from bardling.planning.parameter_shapes import adapter_shapes
from bardling.planning.scaling_laws import FITTED_FLOPS, Comparison, compare

if TYPE_CHECKING:
    from bardling.data.tokens.manifest import Manifest

_PER_NODE = 8  # devices of a machine
MAX_USEFUL_EPOCHS = 4  # Muennighoff et al. 2023 (arXiv:2305.16264): up to four epochs are nearly as good as new data


@dataclass(frozen=True)
class Plan:
    """What a run will need. Bytes are per process; FLOPs are for all processes together."""

    config: RunConfig  # the recipe, with `model.depth` applied
    model: ModelConfig  # with its vocabulary size
    batch: TrainPlan  # steps, forward passes and tokens
    dataset_tokens: int | None  # in the training split; None if unknown
    flops_training: int  # forward and backward passes of the whole run
    flops_recomputed: int  # by `train.recompute` in the whole run; these do not count as the model's FLOPs
    layout: Layout  # of the processes
    layout_why: str
    memory: MemoryPlan  # of a process that holds the whole model
    precision: str
    device_name: str
    device_type: str
    device_memory: int | None  # bytes; None if unknown
    peak_flops: float | None  # of one device (FLOP/s); None if unknown
    mfu: float  # expected fraction of the peak, including recomputation
    comparison: Comparison
    notes: tuple[str, ...] = ()  # assumptions and warnings, one sentence each

    @property
    def components(self) -> tuple[Component, ...]:
        return parameter_table(self.model)

    @property
    def parameters(self) -> int:
        """Trainable parameters, without vocabulary padding."""
        return parameters(self.model)

    @property
    def block_parameters(self) -> int:
        return block_parameters(self.model)

    @property
    def total_tokens(self) -> int:
        """Tokens trained on, including repetitions."""
        return self.batch.tokens_before(self.batch.steps)

    @property
    def epochs(self) -> float | None:
        """Passes over the dataset; None if its size is unknown."""
        return None if self.dataset_tokens is None else self.total_tokens / self.dataset_tokens

    @property
    def flops_per_token(self) -> int:
        """Training FLOPs per token, from the table of matmuls."""
        return flops_per_token(self.model, tune=self.config.tune)

    @property
    def palm_flops_per_token(self) -> int:
        """Training FLOPs per token by PaLM's 6N + 12LHQT."""
        return palm_flops_per_token(self.model)

    @property
    def flops_per_step(self) -> int:
        """Training FLOPs per step at the full batch size and context."""
        return self.flops_per_token * self.batch.tokens_per_step

    @property
    def flops_validation(self) -> int:
        """Forward passes of all validations; a forward pass is a third of forward and backward."""
        sequences = _occurrences(self.batch.steps, self.config.eval.every) * self.config.eval.windows
        return sequences * self.model.block_size * (flops_per_token(self.model) // 3)

    @property
    def flops(self) -> int:
        """FLOPs of the whole run, including validation but not recomputation."""
        return self.flops_training + self.flops_validation

    @property
    def checkpoint_bytes(self) -> int:
        """Size of a checkpoint's tensors; headers, configuration and tokenizer add a little."""
        return self.memory.trained + self.memory.optimizer + self.memory.ema

    @property
    def checkpoints_kept(self) -> int:
        """Maximum number of checkpoints on disk at once, including the one being written."""
        steps, config = self.batch.steps, self.config.checkpoint
        saved = steps if config.every_seconds else _occurrences(steps, config.every_steps)
        saved += _occurrences(steps, self.config.eval.every) if config.save_best else 0
        periodic = steps // config.keep_every if config.keep_every else 0
        return min(saved, config.keep_last + config.keep_best + periodic + 1)

    @property
    def disk_bytes(self) -> int:
        """Maximum disk space for checkpoints."""
        return self.checkpoint_bytes * self.checkpoints_kept

    @property
    def flops_per_second(self) -> float | None:
        """Expected speed of all devices together (FLOP/s); None if the peak is unknown."""
        return None if self.peak_flops is None else self.peak_flops * self.mfu * self.layout.world_size

    @property
    def seconds(self) -> float | None:
        """Time of the whole run; None if the peak is unknown."""
        return None if self.flops_per_second is None else (self.flops + self.flops_recomputed) / self.flops_per_second

    @property
    def tokens_per_second(self) -> float | None:
        """Training speed of all devices together; None if the peak is unknown."""
        return None if self.flops_per_second is None else self.flops_per_second * self.model_fraction / self.flops_per_token

    @property
    def model_fraction(self) -> float:
        """Fraction of the training FLOPs that MFU counts: less than 1 with recomputation."""
        return self.flops_training / (self.flops_training + self.flops_recomputed)


def plan(
    config: RunConfig,
    *,
    world_size: int = 1,
    device_name: str = "",
    device_type: str = "cuda",
    device_memory: int | None = None,
    precision: str | None = None,
    peak_flops: float | None = None,
    mfu: float = 0.4,
    dataset_tokens: int | None = None,
    budget_flops: float | None = None,
    budget_seconds: float | None = None,
) -> Plan:
    """Estimate what a run needs.

    Args:
        world_size: processes, one per device.
        device_name: the driver's, or a short name in `planning/devices.py`; empty if unknown. device_type: cpu, cuda or mps.
        device_memory, peak_flops: of one device (bytes, FLOP/s); None for the table's.
        precision: dtype of matmuls; None for the recipe's, with 'auto' as bfloat16.
        mfu: expected fraction of the peak, including recomputation.
        dataset_tokens: tokens in the training split, to compute epochs; None for those of a prepared folder.
        budget_flops, budget_seconds: find the compute-optimal model for this many FLOPs, or for this much time on these
            devices (s), instead of the recipe's FLOPs.

    Raises:
        UserError: a value is out of range, the batch does not divide evenly, or a budget of time needs an unknown peak.
    """
    _check(world_size, mfu, peak_flops, dataset_tokens, budget_flops, budget_seconds)
    config = apply_depth(config)
    model, notes = resolve_vocabulary(config)
    precision = precision or ("bfloat16" if config.precision == "auto" else config.precision)
    device_memory = known_memory(device_name) if device_memory is None else device_memory
    if peak_flops is None:
        peak_flops = known_peak(device_name, precision, tf32=not config.deterministic, fp8=model if config.fp8 else None)
    layout, batch, memory, why = _layout(config, model, world_size, precision, device_type, device_memory)
    flops = batch.cost(partial(flops_per_token, model, tune=config.tune))
    recomputed = _recomputed_flops(config, model, batch, precision, device_type)
    if budget_seconds is not None:
        budget_flops = budget_seconds * _speed(peak_flops, mfu, world_size, device_name) * flops / (flops + recomputed)
    result = Plan(
        config=config,
        model=model,
        batch=batch,
        dataset_tokens=dataset_tokens or _train_tokens(config),
        flops_training=flops,
        flops_recomputed=recomputed,
        layout=layout,
        layout_why=why,
        memory=memory,
        precision=precision,
        device_name=device_name,
        device_type=device_type,
        device_memory=device_memory,
        peak_flops=peak_flops,
        mfu=mfu,
        comparison=_comparison(model, batch, flops, budget_flops),
    )
    return dataclasses.replace(result, notes=(*notes, *_notes(result)))


def _comparison(model: ModelConfig, batch: TrainPlan, flops: int, budget_flops: float | None) -> Comparison:
    tokens = batch.tokens_before(batch.steps)
    return compare(parameters(model, positions=False), tokens, flops / batch.steps, budget_flops)


def _train_tokens(config: RunConfig) -> int | None:
    """Tokens in the training splits of prepared folders; None if a source is none."""
    found = _manifests(config)
    return None if None in found else sum(manifest.train.tokens for manifest in found if manifest is not None)


def _layout(
    config: RunConfig, model: ModelConfig, processes: int, precision: str, device_type: str, device_memory: int | None
) -> tuple[Layout, TrainPlan, MemoryPlan, str]:
    """The layout that a run would choose on machines of eight devices, its batches and memory, and why."""
    micro_batch = config.train.micro_batch if isinstance(config.train.micro_batch, int) else 1
    needed = memory_plan(config, model, micro_batch, precision, device_type)
    per_node = min(processes, _PER_NODE)
    layout, why = choose_layout(config.parallel, processes, per_node, needed, device_memory, model)
    check_pipeline(model, layout)
    check_context(model, layout)
    batch = make_plan(config.train, model.block_size, layout.data_size)
    return layout, batch, memory_plan(config, model, batch.micro_batch, precision, device_type), why


def _check(world_size: int, mfu: float, peak: float | None, tokens: float | None, *budgets: float | None) -> None:
    require(world_size >= 1, "gpus", world_size, "must be at least 1")
    require(0 < mfu <= 1, "mfu", mfu, "must be a fraction of the peak, above 0 and at most 1 (0.4 is typical)")
    if None not in budgets:
        raise UserError("the budget is given in FLOPs and in time: give one of them")
    for name, value in zip(("peak", "dataset_tokens", "budget", "budget"), (peak, tokens, *budgets), strict=True):
        require(value is None or 0 < value < INF, name, value, "must be above 0 and finite")


def _speed(peak: float | None, mfu: float, world_size: int, device_name: str) -> float:
    """Expected speed of all devices together (FLOP/s)."""
    if peak is None:
        raise UserError(f"a budget of time needs the peak of {device_name or 'the device'}, which is unknown; give its peak")
    return peak * mfu * world_size


def _recomputed_flops(config: RunConfig, model: ModelConfig, batch: TrainPlan, precision: str, device_type: str) -> int:
    if config.train.recompute != "blocks":
        return 0
    # 'auto' nearly always compiles on CUDA.
    compiled = config.compile == "on" or (config.compile == "auto" and device_type == "cuda")
    per_token = partial(recomputed_flops_per_token, model, precision=precision, device_type=device_type)
    return batch.cost(partial(per_token, fp8=config.fp8, compiled=compiled))


def _notes(result: Plan) -> list[str]:
    """Assumptions and warnings about a plan."""
    config, notes = result.config, []
    if result.peak_flops is None:
        dtype = "float8" if config.fp8 else result.precision
        notes.append(
            f"No {dtype} peak is known for {result.device_name or 'the device'}, so time is not estimated: give its dense peak."
        )
    if config.tune.lora_rank:
        trained = sum(map(math.prod, adapter_shapes(result.model, config.tune).values()))
        notes.append(
            f"LoRA of rank {config.tune.lora_rank} trains {trained:,} parameters beside those of the model, which stay as they "
            "are: FLOPs per token leave out their gradients."
        )
    if config.fp8 and (excluded := fp8_layers(result.model)[1]):
        notes.append(f"Sizes of {', '.join(excluded)} are not multiples of 16: these layers stay in {result.precision}.")
    if result.epochs is not None and result.epochs > MAX_USEFUL_EPOCHS:
        notes.append(
            f"{result.epochs:.1f} epochs: beyond about {MAX_USEFUL_EPOCHS}, repeated tokens improve the model less and less."
        )
    if result.device_memory is not None and sharded_bytes(result.memory, result.layout) > result.device_memory:
        notes.append(f"The run does not fit into the device's memory: {_remedy(result, result.device_memory)}")
    low, high = FITTED_FLOPS
    if not low <= result.comparison.flops <= high:
        notes.append(
            f"The scaling fits are based on {low:.0e} to {high:.0e} FLOPs; {result.comparison.flops:.1e} is an extrapolation."
        )
    return notes


def _remedy(result: Plan, device_memory: int) -> str:
    """What reduces memory enough: a smaller micro-batch that divides the batch, recomputation, or both."""
    batch, config = result.batch, result.config
    per_process = batch.micro_batch * batch.accumulation
    divisors = [size for size in range(batch.micro_batch, 0, -1) if per_process % size == 0]

    def fits(size: int, recompute: str) -> bool:
        needed = memory_plan(config, result.model, size, result.precision, result.device_type, recompute)
        return sharded_bytes(needed, result.layout) <= device_memory

    kept = next((size for size in divisors if fits(size, config.train.recompute)), None)
    recomputed = next((size for size in divisors if config.train.recompute != "blocks" and fits(size, "blocks")), None)
    remedies = [] if kept is None else [f"--train.micro_batch {kept}"]
    if recomputed is not None and (kept is None or recomputed > kept):
        size = "" if recomputed == batch.micro_batch else f" --train.micro_batch {recomputed}"
        remedies.append(f"--train.recompute blocks{size} (25% more time)")
    if remedies:
        return f"use {' or '.join(remedies)}."
    return "not even one sequence fits; choose a smaller model, a shorter context or a larger device."


def _occurrences(steps: int, every: int) -> int:
    """Number of times that something happens every `every` steps (0: never) and after the last step."""
    return -(-steps // every) if every else 1


def resolve_vocabulary(config: RunConfig) -> tuple[ModelConfig, list[str]]:
    """Fill in `model.vocab_size` if unset, from a prepared folder or the tokenizer; also return assumptions as notes.

    Raises:
        UserError: `data.tokenizer` is not a tokenizer, or a file cannot be read.
    """
    if config.model.vocab_size:
        return config.model, []
    manifest, spec, notes = _manifests(config)[0], config.data.tokenizer, []
    if manifest is not None:
        size = manifest.vocab_size
    elif spec in ("byte", "char", "gpt2"):
        size = expected_vocab_size(spec)
        if spec == "char":
            notes.append(f"A character vocabulary depends on the text: {size} entries are assumed (or set --model.vocab_size).")
    else:
        # Imported here, because most plans need no tokenizer library.
        from bardling.data.tokens.tokenizer import check_tokenizer_spec, load_tokenizer

        trained = check_tokenizer_spec(spec)
        size = load_tokenizer(spec).vocab_size if trained is None else trained
    return dataclasses.replace(config.model, vocab_size=size), notes


def _manifests(config: RunConfig) -> "list[Manifest | None]":
    """The manifest of each source that is a prepared folder; None for another."""
    from bardling.data.text.named_datasets import is_source_name
    from bardling.data.tokens.manifest import read_manifest

    sources = [source.source for source in config.data.sources] or [config.data.source]
    paths = [Path(source) / "manifest.json" for source in sources]
    prepared = [not is_source_name(source) and path.is_file() for source, path in zip(sources, paths, strict=True)]
    return [read_manifest(path) if found else None for path, found in zip(paths, prepared, strict=True)]
