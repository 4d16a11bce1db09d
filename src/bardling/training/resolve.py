"""The one place where every open setting of a configuration gets a value.

`resolve` decides, in this order: what a resumed run keeps, the sizes that follow from `model.depth`, absolute paths, the
vocabulary, the architecture of weights to start from, precision, the layout of processes, batch arithmetic, compilation, and
the size of forward passes. Each decision is recorded with its reason. Nothing after it asks for `auto` or an unset value: the
result is written to the run folder and is itself a recipe.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from bardling.checkpoint.load import Loaded
from bardling.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from bardling.config.recipes import changed_settings
from bardling.data.tokens.shards import TokenDataset
from bardling.data.tokens.tokenizer import Tokenizer
from bardling.distributed.device import DTYPES, choose_precision, device_name
from bardling.errors import UserError
from bardling.optim.build import resolve_muon_precision
from bardling.planning.batching import TrainPlan, make_plan
from bardling.planning.costs import flops_per_token, fp8_layers, recomputed_flops_per_token
from bardling.planning.depth import apply_depth
from bardling.planning.devices import peak_flops
from bardling.planning.layout import Layout
from bardling.training.build import Execution
from bardling.training.compile_choice import choose_compile
from bardling.training.facts import Facts
from bardling.training.recovery.memory import choose_micro_batch


@dataclass(frozen=True)
class Reason:
    setting: str  # dotted name
    value: object
    why: str
    from_depth: bool = False  # whether it follows from model.depth

    def __str__(self) -> str:
        return f"{self.setting} = {self.value}  ({self.why})"


@dataclass(frozen=True)
class ResolvedRun:
    config: RunConfig  # every open setting filled in; itself a recipe
    layout: Layout
    plan: TrainPlan
    execution: Execution
    reasons: tuple[Reason, ...]
    changes: tuple[str, ...]  # what differs from the previous start, or from what was asked
    tokenizer: Tokenizer | None
    peak_flops: float | None  # of one process's device in this precision (FLOP/s); None when unknown

    def why(self, setting: str) -> str:
        return next(reason.why for reason in self.reasons if reason.setting == setting)

    def with_micro_batch(self, micro_batch: int) -> "ResolvedRun":
        """The same run in forward passes of another size; the planned number of steps stays."""
        train = replace(self.config.train, micro_batch=micro_batch)
        plan = make_plan(train, self.plan.block_size, self.plan.data_size)
        return replace(self, config=replace(self.config, train=train), plan=replace(plan, horizon=self.plan.horizon))


@dataclass
class _Log:
    reasons: list[Reason] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)

    def add(self, setting: str, value: object, why: str, *, from_depth: bool = False) -> None:
        self.reasons.append(Reason(setting, value, why, from_depth))


def resolve(config: RunConfig, facts: Facts) -> ResolvedRun:
    """Decide everything that `config` leaves open.

    Raises:
        UserError: the configuration does not fit the data, the weights to start from, the machine, or the run that it resumes.
    """
    log, device = _Log(), facts.context.device
    config = apply_depth(config, facts.given, record=partial(log.add, from_depth=True))
    optim, train = config.optim, config.train
    data, asked = _absolute_paths(config.data, config.model)
    previous = facts.previous
    if previous is not None:
        asked, optim, train = _keep(asked, optim, train, previous.model, previous.train, previous.precision)
        kept: dict[str, Any] = {
            key: getattr(previous, key) for key in ("precision", "compile") if getattr(config, key) == "auto"
        }
        config = replace(config, **kept)
        old_data, old_model = _absolute_paths(previous.data, previous.model)
        before = replace(previous, data=old_data, model=old_model)
        now = replace(config, data=data, model=asked, optim=optim, train=train)
        log.changes += _checked_changes(changed_settings(before, now))

    dataset = facts.dataset(data)
    start = facts.start(asked.init)
    _check_steps(train, facts, start)
    tokenizer, vocab_size = _vocabulary(dataset, asked.vocab_size if start is None else start.config.vocab_size, start, facts)
    model = _model(asked, vocab_size, start, dataset, tokenizer, log)

    left_out = fp8_layers(model)[1] if config.fp8 else None
    precision = choose_precision(config.precision, device, fp8_excluded=left_out, measure=facts.bfloat16_speedup)
    log.add("precision", precision.name, precision.why)
    optim = resolve_muon_precision(optim, precision.name)
    if device.type == "cpu":
        peak: float | None = facts.matmul_flops(device, DTYPES[precision.name])
    else:
        fp8_model = model if config.fp8 else None
        peak = peak_flops(device_name(device), precision.name, tf32=not config.deterministic, fp8=fp8_model)

    layout = Layout(replicate=facts.context.world_size)
    plan = make_plan(train, model.block_size, layout.data_size)
    execution = Execution(precision, False, config.cuda_graphs, config.fp8, train.recompute == "blocks")
    flops, deadline = _run_flops(model, plan, execution) / layout.data_size, train.deadline_seconds
    compiles, why = choose_compile(config.compile, config.cuda_graphs, device, flops, peak, plan.shapes, deadline=deadline)
    execution = replace(execution, compiled=compiles)
    compiled: Literal["on", "off"] = "on" if compiles else "off"
    log.add("compile", compiled, why)

    mask = data.document_mask
    chosen = choose_micro_batch(model, optim, train, plan, execution, facts.context, tokenizer=tokenizer, document_mask=mask)
    resolved = replace(config, model=model, data=data, optim=optim, train=train, precision=precision.name, compile=compiled)
    run = ResolvedRun(resolved, layout, plan, execution, (), (), tokenizer, peak)
    if chosen is not None:
        micro, why = chosen
        log.add("train.micro_batch", micro, why)
        log.changes.append(f"train.micro_batch: {train.micro_batch} -> {micro}, {why}")
        run = run.with_micro_batch(micro)
    return replace(run, reasons=tuple(log.reasons), changes=tuple(log.changes))


def _absolute_paths(data: DataConfig, model: ModelConfig) -> tuple[DataConfig, ModelConfig]:
    """Make paths absolute, so that the run can be resumed from any folder."""

    def absolute(spec: str) -> str:
        path = Path(spec.split(":", 1)[0])
        is_path = bool(spec) and (path.exists() or any(sign in spec for sign in "*?["))
        return str(Path.cwd() / spec) if is_path and not path.is_absolute() else spec

    cache = data.cache and str(Path(data.cache).expanduser().absolute())
    return (
        replace(data, source=absolute(data.source), tokenizer=absolute(data.tokenizer), cache=cache),
        replace(model, init=absolute(model.init)),
    )


def _keep(
    model: ModelConfig, optim: OptimConfig, train: TrainConfig, old: ModelConfig, old_train: TrainConfig, precision: str
) -> tuple[ModelConfig, OptimConfig, TrainConfig]:
    """Keep what was decided when the run started, for settings that the resumed run leaves open."""
    ramp = train.ramp
    if ramp == old_train.ramp and (train.batch_start or train.context_start):
        # More steps leave the stages of batch and context where they were, unless the run ends before them.
        ramp = min(1.0, ramp * old_train.steps / train.steps)
    micro_batch = old_train.micro_batch if train.micro_batch == "auto" else train.micro_batch
    return (
        replace(model, vocab_size=model.vocab_size or old.vocab_size).resolved(),
        resolve_muon_precision(optim, precision),
        replace(train, ramp=ramp, micro_batch=micro_batch),
    )


# A trained model, its optimizer and the data order depend on these. Other changes take effect and are reported.
_FIXED = ("seed", "data.source", "data.tokenizer", "data.val_fraction", "optim.name")


def _checked_changes(changed: Mapping[str, tuple[object, object]]) -> list[str]:
    """Describe what changed since the run started ("train.steps: 100 -> 200").

    Raises:
        UserError: a change is incompatible with the trained weights or the data order.
    """
    for key, (old, new) in changed.items():
        if key in _FIXED or (key.startswith("model.") and key != "model.dropout"):
            raise UserError(f"{key} = {new!r}: a run that has started keeps {old!r}; start a new run for another value")
    return [f"{key}: {old} -> {new}" for key, (old, new) in changed.items()]


def _check_steps(train: TrainConfig, facts: Facts, start: Loaded | None) -> None:
    """Refuse to end a run before its current step: its steps so far would not fit the schedule.

    With a deadline the number of steps is planned during the run, so any number is accepted.
    """
    done, where = (0, "")
    if facts.checkpoint is not None:
        done, where = facts.checkpoint.training["step"], str(facts.folder.path)
    elif facts.continued and start is not None:
        done, where = start.step, facts.continued
    if train.deadline is None and train.steps < done:
        raise UserError(f"train.steps = {train.steps}: {where} has already completed {done} steps; set it to at least that")


def _vocabulary(dataset: TokenDataset, vocab_size: int, start: Loaded | None, facts: Facts) -> tuple[Tokenizer | None, int]:
    """The tokenizer and the vocabulary size of the dataset; tokens of unknown origin are taken to fit an existing model.

    A nanoGPT folder without a meta.pkl is taken to have nanoGPT's vocabulary: GPT-2's, rounded up to a multiple of 64.
    If the model has exactly GPT-2's vocabulary, ids must be below its size (each read checks them), and its tokenizer is used.

    Args:
        vocab_size: of the existing model; 0 if there is none.
    """
    tokenizer, own = dataset.tokenizer, facts.own_tokenizer if start is None else start.tokenizer
    if tokenizer is not None and own is not None and own.fingerprint == tokenizer.fingerprint:
        if own.eot_id == tokenizer.eot_id:
            tokenizer = own  # the model's files may say more than the dataset's about what surrounds a text
        if 0 < vocab_size < dataset.vocab_size:  # a token that the tokenizer has and the model lacks may never occur
            dataset.limit_vocabulary(vocab_size)
    if tokenizer is not None or dataset.vocab_size != -(-vocab_size // 64) * 64:
        return tokenizer, dataset.vocab_size
    dataset.vocab_size = vocab_size
    return None if own is not None and own.vocab_size < vocab_size else own, vocab_size


def _model(
    asked: ModelConfig, vocab_size: int, start: Loaded | None, dataset: TokenDataset, tokenizer: Tokenizer | None, log: _Log
) -> ModelConfig:
    """The architecture with its vocabulary size: the recipe's, or that of the weights to start from.

    With such weights, only the context, which may be shorter, and dropout follow the recipe.
    """
    if asked.vocab_size and asked.vocab_size < vocab_size:
        raise UserError(
            f"model.vocab_size = {asked.vocab_size} is smaller than the tokenizer's {vocab_size}: leave it out, or set it to "
            "at least that"
        )
    if start is None:
        if not asked.vocab_size:
            log.add("model.vocab_size", vocab_size, "the tokenizer's")
        return replace(asked, vocab_size=asked.vocab_size or vocab_size).resolved()
    own = start.tokenizer
    if own is not None and tokenizer is not None and own.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{dataset.path}: its tokenizer ({tokenizer.fingerprint}) is not the model's ({own.fingerprint}): use the model's "
            "tokenizer.json as data.tokenizer"
        )
    if start.config.vocab_size < dataset.vocab_size:
        raise UserError(
            f"{dataset.path}: has a vocabulary of {dataset.vocab_size} tokens, but the model only {start.config.vocab_size}: "
            "prepare the text with the model's tokenizer"
        )
    block_size = min(asked.block_size, start.config.block_size)
    model = replace(start.config, block_size=block_size, dropout=asked.dropout, init=asked.init).resolved()
    requested = asked.resolved()
    for key in ("n_layer", "n_head", "n_embd", "block_size", "bias", "gelu", "norm", "positions", "mlp"):
        before, after = getattr(requested, key), getattr(model, key)
        if before != after:
            log.add(f"model.{key}", after, "as in the initial weights")
            log.changes.append(f"model.{key}: {before} -> {after}, as in the initial weights")
    return model


def _run_flops(model: ModelConfig, plan: TrainPlan, execution: Execution) -> float:
    """FLOPs of the whole run, over all processes."""
    flops = plan.cost(partial(flops_per_token, model))
    if execution.recompute:
        name, kind = execution.precision.name, execution.precision.device_type
        cost = partial(recomputed_flops_per_token, model, precision=name, device_type=kind, fp8=execution.fp8)
        flops += plan.cost(cost)
    return flops
