"""What a run will need, worked out before it is started: parameters, tokens, FLOPs, memory, disk and time.

Method: the batch comes from `train/plan.py`, the model's costs from `model/arithmetic.py`, peak speeds from `model/peaks.py`,
and what is optimal from `model/scaling.py`; here they are put together for one recipe. Torch is not imported.

Limits: time is arithmetic, recomputed activations included, divided by the speed that the given part of the peak promises;
start-up, compilation, sampling and saving come on top. Memory is that of one process of plain data parallelism, where each
process holds the whole model.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bardling.config import CheckpointConfig, ModelConfig, RunConfig
from bardling.errors import UserError
from bardling.interop.shapes import parameter_shapes
from bardling.model.activations import ActivationBytes, activation_bytes
from bardling.model.arithmetic import (
    Component,
    block_parameters,
    flops_per_token,
    fp8_layers,
    palm_flops_per_token,
    parameter_table,
    parameters,
    recomputed_flops_per_token,
    weight_bytes,
)
from bardling.model.depth import without_dial
from bardling.model.peaks import device_memory as known_memory
from bardling.model.peaks import peak_flops as known_peak
from bardling.model.scaling import APPROACH_3, FITTED_FLOPS, Optimum, approach_2_tokens, chinchilla_optimal
from bardling.optim.kinds import optimizer_bytes
from bardling.train.plan import TrainPlan, make_plan

if TYPE_CHECKING:
    from bardling.data.manifest import Manifest

ASSUMED_CHARACTERS = 128
GPT2_VOCABULARY = 50257
BYTE_VOCABULARY = 257  # 256 byte values and the end of text
GOOD_EPOCHS = 4  # Muennighoff et al. 2023 (arXiv:2305.16264): up to four passes are nearly worth new data


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of one process while it trains (bytes)."""

    weights: int
    gradients: int
    optimizer: int
    activations: ActivationBytes
    ema: int = 0
    """The running mean of the weights."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.ema + self.activations.total


@dataclass(frozen=True)
class Comparison:
    """The recipe beside what the scaling fits call optimal."""

    parameters: int
    """N: positions and padding left out."""
    tokens: int
    """D: tokens trained on."""
    flops: float
    """6*N*D, or the budget that was asked about."""
    loss: float
    """Approach 3's prediction for the recipe (nats per token)."""
    optima: tuple[Optimum, ...]
    """The best N and D for `flops`, by each fit."""
    tokens_for_size: tuple[float, float]
    """Tokens that suit the recipe's N, by approach 2 and by approach 3."""
    steps_in_budget: int | None
    """Steps of this recipe that the budget pays for; None without a budget."""

    @property
    def verdict(self) -> str:
        """One line: how the recipe's tokens compare with what suits its size."""
        ratios = sorted(self.tokens / tokens for tokens in self.tokens_for_size)
        spread = " to ".join(dict.fromkeys(f"{ratio:,.0f}" if ratio >= 9.5 else f"{ratio:.2g}" for ratio in ratios))
        if ratios[0] > 1.5:
            judgement = "a larger model would use the same arithmetic better (a small one is cheaper to run later)"
        elif ratios[1] < 1 / 1.5:
            judgement = "a smaller model on more tokens would use the same arithmetic better"
        else:
            judgement = "model and data are in balance"
        return f"trains on {spread} times the tokens that suit its size: {judgement}"


@dataclass(frozen=True)
class Plan:
    """Everything that can be said about a run beforehand. Bytes are for one process, FLOPs for all together."""

    model: ModelConfig
    """The model, its vocabulary filled in."""
    batch: TrainPlan
    """Steps, forward passes and tokens."""
    components: tuple[Component, ...]
    """Parameters by part."""
    parameters: int
    """All trainable parameters, vocabulary padding left out."""
    block_parameters: int
    """Those in the transformer blocks."""
    total_tokens: int
    """Tokens trained on, repetitions included."""
    epochs: float | None
    """Passes over the dataset; None where its size is not known."""
    dataset_tokens: int | None
    """Tokens in the training split; None where they are not known."""
    flops_per_token: int
    """Training FLOPs a token, from the list of matrix products."""
    palm_flops_per_token: int
    """The same by 6N + 12LHQT."""
    flops_per_step: int
    """Of the whole batch and context."""
    flops_training: int
    """Forward and backward passes of the whole run."""
    flops_validation: int
    """Forward passes of all validations."""
    flops_recomputed: int
    """Second forward passes through the blocks (`train.recompute`), in the whole run: the device's work, not the model's."""
    checkpoint_bytes: int
    """Tensors of a checkpoint; headers, configuration and tokenizer add a little."""
    checkpoints_kept: int
    """Most checkpoints on disk at once, the one being written included."""
    memory: MemoryPlan
    optimizer: str
    """'adamw' or 'muon'."""
    precision: str
    device_name: str
    device_memory: int | None
    """Bytes; None where it is not known."""
    peak_flops: float | None
    """Peak of one device (FLOP/s); None where it is not known."""
    mfu: float
    """Part of the peak that is assumed to be reached, recomputation included."""
    comparison: Comparison
    notes: tuple[str, ...]
    """Assumptions and warnings, each one sentence."""

    @property
    def flops(self) -> int:
        """FLOPs of the whole run, validation included, without recomputation."""
        return self.flops_training + self.flops_validation

    @property
    def disk_bytes(self) -> int:
        """Disk space for checkpoints at its fullest."""
        return self.checkpoint_bytes * self.checkpoints_kept

    @property
    def flops_per_second(self) -> float | None:
        """Speed of all devices together at the assumed part of their peak (FLOP/s)."""
        return None if self.peak_flops is None else self.peak_flops * self.mfu * self.batch.world_size

    @property
    def seconds(self) -> float | None:
        """Time of the whole run; None where the peak is not known."""
        return None if self.flops_per_second is None else (self.flops + self.flops_recomputed) / self.flops_per_second

    @property
    def tokens_per_second(self) -> float | None:
        """Training speed of all devices together; None where the peak is not known."""
        return None if self.flops_per_second is None else self.flops_per_second * self.model_part / self.flops_per_token

    @property
    def model_part(self) -> float:
        """Part of the training's arithmetic that is the model's, and that its MFU counts: less than 1 with recomputation."""
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
    """Work out what the run `config` needs.

    Args:
        config: The recipe.
        world_size: Processes, one a device.
        device_name: As the driver gives it, or a short name of `model/peaks.py`; empty where it is not known.
        device_type: 'cpu', 'cuda' or 'mps'.
        device_memory: Memory of one device (bytes); unset takes the table's.
        precision: Number format of matrix products; unset takes the recipe's, and bfloat16 for its 'auto'.
        peak_flops: Peak of one device (FLOP/s); unset takes the table's.
        mfu: Part of the peak that the run will reach, recomputation included.
        dataset_tokens: Tokens in the training split, for the number of epochs; unset takes a prepared folder's.
        budget_flops: Ask what is optimal for this many FLOPs in place of the recipe's own.
        budget_seconds: The same as time on these devices.

    Raises:
        UserError: a value is out of range, the batch does not divide, or time is asked of a device of unknown speed.
    """
    _check(world_size, mfu, peak_flops, dataset_tokens, budget_flops, budget_seconds)
    config = without_dial(config)
    model, notes = resolve_vocabulary(config)
    batch = make_plan(config.train, model.block_size, world_size)
    if precision is None:
        precision = "bfloat16" if config.precision == "auto" else config.precision
    if peak_flops is None and device_name:
        peak_flops = known_peak(device_name, precision, tf32=not config.deterministic, fp8=model if config.fp8 else None)
    if peak_flops is None:
        notes.append(
            f"No {'float8' if config.fp8 else precision} peak is known for {device_name or 'the device'}, "
            "so time is not estimated: give its dense peak."
        )
    if config.fp8 and (left := fp8_layers(model)[1]):
        notes.append(f"Sizes of {', '.join(left)} are no multiples of 16: these layers stay in {precision}.")
    if device_memory is None and device_name:
        device_memory = known_memory(device_name)
    total_tokens = batch.samples_before(batch.steps) * model.block_size
    manifest = _manifest(config)
    if dataset_tokens is None and manifest is not None:
        dataset_tokens = manifest.train.tokens
    epochs = None if dataset_tokens is None else total_tokens / dataset_tokens
    if epochs is not None and epochs > GOOD_EPOCHS:
        notes.append(f"{epochs:.1f} passes over the data: beyond about {GOOD_EPOCHS}, repeated tokens teach less and less.")
    weights = weight_bytes(model)

    def needs(micro_batch: int, recompute: str) -> ActivationBytes:
        return activation_bytes(
            model,
            micro_batch,
            precision=precision,
            device_type=device_type,
            recompute=recompute,
            document_mask=config.data.document_mask,
            fp8=config.fp8,
        )

    memory = MemoryPlan(
        weights=weights,
        gradients=weights * (2 if config.cuda_graphs and device_type == "cuda" else 1),  # a graph's own, and their sum
        optimizer=optimizer_bytes(parameter_shapes(model), config.optim),
        ema=weights if config.optim.ema_decay else 0,
        activations=needs(batch.micro_batch, config.train.recompute),
    )
    if device_memory is not None and memory.total > device_memory:
        room = device_memory - (memory.total - memory.activations.total)
        notes.append(f"This does not fit into the device's memory: {_remedy(needs, batch, config.train.recompute, room)}")
    per_token, flops = flops_per_token(model), batch.cost(partial(flops_per_token, model))
    again = 0
    if config.train.recompute == "blocks":
        compiled = config.compile == "on" or (config.compile == "auto" and device_type == "cuda")  # there it nearly always pays
        cost = partial(
            recomputed_flops_per_token, model, precision=precision, device_type=device_type, fp8=config.fp8, compiled=compiled
        )
        again = batch.cost(cost)
    speed = None if peak_flops is None else peak_flops * mfu * world_size
    if budget_seconds is not None:
        if speed is None:
            raise UserError(
                f"a budget of time needs the device's speed, and none is known for {device_name or 'it'}: give its peak"
            )
        budget_flops = budget_seconds * speed * flops / (flops + again)
    saved = batch.steps if config.checkpoint.every_seconds else _times(batch.steps, config.checkpoint.every_steps)
    saved += _times(batch.steps, config.eval.every) if config.checkpoint.save_best else 0
    result = Plan(
        model=model,
        batch=batch,
        components=parameter_table(model),
        parameters=parameters(model),
        block_parameters=block_parameters(model),
        total_tokens=total_tokens,
        epochs=epochs,
        dataset_tokens=dataset_tokens,
        flops_per_token=per_token,
        palm_flops_per_token=palm_flops_per_token(model),
        flops_per_step=per_token * batch.tokens_per_step,
        flops_training=flops,
        # A forward pass is a third of forward and backward.
        flops_validation=_times(batch.steps, config.eval.every) * config.eval.windows * model.block_size * (per_token // 3),
        flops_recomputed=again,
        checkpoint_bytes=memory.weights + memory.optimizer + memory.ema,
        checkpoints_kept=min(saved, _most_kept(config.checkpoint, batch.steps)),
        memory=memory,
        optimizer=config.optim.name,
        precision=precision,
        device_name=device_name,
        device_memory=device_memory,
        peak_flops=peak_flops,
        mfu=mfu,
        comparison=_compare(model, total_tokens, flops / batch.steps, budget_flops),
        notes=(),
    )
    low, high = FITTED_FLOPS
    if not low <= result.comparison.flops <= high:
        notes.append(
            f"The scaling fits were made on {low:.0e} to {high:.0e} FLOPs; {result.comparison.flops:.1e} is an extrapolation."
        )
    return dataclasses.replace(result, notes=tuple(notes))


def _check(
    world_size: int,
    mfu: float,
    peak: float | None,
    dataset_tokens: int | None,
    budget_flops: float | None,
    budget_seconds: float | None,
) -> None:
    if world_size < 1:
        raise UserError(f"gpus = {world_size}: must be at least 1")
    if not 0 < mfu <= 1:
        raise UserError(f"mfu = {mfu}: is a part of the peak, above 0 and at most 1 (0.4 is usual)")
    if budget_flops is not None and budget_seconds is not None:
        raise UserError("a budget is given both in FLOPs and in time: give one of them")
    for name, value in (
        ("peak", peak),
        ("dataset_tokens", dataset_tokens),
        ("budget", budget_flops),
        ("budget", budget_seconds),
    ):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UserError(f"{name} = {value}: must be above 0")


def _times(steps: int, every: int) -> int:
    """How often something happens that is done every `every` steps (0: never) and after the last one."""
    return -(-steps // every) if every else 1


def _most_kept(config: CheckpointConfig, steps: int) -> int:
    """Most checkpoints on disk at once: the newest, the best, those kept for good, and the one being written."""
    return config.keep_last + config.keep_best + (steps // config.keep_every if config.keep_every else 0) + 1


def _remedy(needs: Callable[[int, str], ActivationBytes], batch: TrainPlan, recompute: str, room: int) -> str:
    """What to do about too much memory: the largest micro-batch that fits and divides the batch, activations that are computed
    again, or both; or the truth that nothing helps. `room` is for the activations (bytes)."""
    share = batch.micro_batch * batch.accumulation
    divisors = sorted({k for i in range(1, math.isqrt(share) + 1) if share % i == 0 for k in (i, share // i)}, reverse=True)

    def largest(recompute: str) -> int | None:
        return next((k for k in divisors if k <= batch.micro_batch and needs(k, recompute).total <= room), None)

    found, again = largest(recompute), None if recompute == "blocks" else largest("blocks")
    remedies = [] if found is None else [f"--train.micro_batch {found}"]
    if again is not None and (found is None or again > found):
        passes = "" if again == batch.micro_batch else f" --train.micro_batch {again}"
        remedies.append(f"--train.recompute blocks{passes} (a quarter more time)")
    if remedies:
        return f"{remedies[0]} would{''.join(f', or {other}' for other in remedies[1:])}."
    return "not even one sequence at a time would; choose a smaller model or context, or a larger device."


def _compare(model: ModelConfig, tokens: int, flops_per_step: float, budget: float | None) -> Comparison:
    n = parameters(model, positions=False)
    flops = 6.0 * n * tokens if budget is None else budget
    return Comparison(
        parameters=n,
        tokens=tokens,
        flops=flops,
        loss=APPROACH_3.loss(n, tokens),
        optima=chinchilla_optimal(flops),
        tokens_for_size=(approach_2_tokens(n), APPROACH_3.tokens_for(n)),
        steps_in_budget=None if budget is None else int(budget // flops_per_step),
    )


def resolve_vocabulary(config: RunConfig) -> tuple[ModelConfig, list[str]]:
    """Fill in `model.vocab_size` where the recipe leaves it open; also return what had to be assumed.

    A prepared folder says its vocabulary; before that the tokenizer decides.

    Raises:
        UserError: `data.tokenizer` names no tokenizer, or a file cannot be read.
    """
    if config.model.vocab_size:
        return config.model, []
    manifest = _manifest(config)
    spec = config.data.tokenizer
    notes = []
    if manifest is not None:
        size = manifest.vocab_size
    elif spec == "byte":
        size = BYTE_VOCABULARY
    elif spec == "char":
        size = ASSUMED_CHARACTERS
        notes.append(f"A character vocabulary depends on the text: {size} entries are assumed (or set --model.vocab_size).")
    elif spec == "gpt2":
        size = GPT2_VOCABULARY
    else:
        from bardling.data.tokenizer import check_tokenizer_spec, load_tokenizer  # here: most plans need no tokenizer library

        trained = check_tokenizer_spec(spec)
        size = load_tokenizer(spec).vocab_size if trained is None else trained
    return dataclasses.replace(config.model, vocab_size=size), notes


def _manifest(config: RunConfig) -> "Manifest | None":
    """The manifest of a prepared folder, if that is what `data.source` names."""
    path = Path(config.data.source) / "manifest.json"
    if not path.is_file():
        return None
    from bardling.data.manifest import read_manifest

    return read_manifest(path)
