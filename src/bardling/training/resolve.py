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

from bardling.checkpoint.load import Loaded, tokenizer_file
from bardling.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig, TuneConfig
from bardling.config.recipes import changed_settings
from bardling.data.tokens.chatml import with_chatml
from bardling.data.tokens.corpus import holds_conversations, recorded_corpus, source_configs
from bardling.data.tokens.dataset import is_tokenized
from bardling.data.tokens.shards import TokenDataset
from bardling.data.tokens.tokenizer import Tokenizer, build_tokenizer, is_tokenizer_path, load_tokenizer
from bardling.distributed.device import DTYPES, choose_precision, device_name
from bardling.errors import UserError
from bardling.optim.build import resolve_muon_precision
from bardling.planning.batching import TrainPlan, make_plan
from bardling.planning.costs import fp8_layers, parameters
from bardling.planning.depth import apply_depth
from bardling.planning.devices import peak_flops
from bardling.planning.layout import Layout
from bardling.planning.parameter_shapes import adapted_parts
from bardling.training.build import Execution
from bardling.training.compile_choice import choose_compile, run_flops, without_compiler
from bardling.training.facts import Facts
from bardling.training.parallel_choice import decide_layout, idle_stages, with_layout
from bardling.training.recovery.memory import choose_micro_batch
from bardling.training.resolve_data import absolute_paths, with_stages
from bardling.training.schedule_report import check_schedule


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
    schedule: OptimConfig  # `config.optim` with the warmup and decay that the learning rate follows
    reasons: tuple[Reason, ...]
    changes: tuple[str, ...]  # what differs from the previous start, or from what was asked
    tokenizer: Tokenizer | None
    peak_flops: float | None  # of one process's device in this precision (FLOP/s); None when unknown
    warnings: tuple[str, ...] = ()

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
    warnings: list[str] = field(default_factory=list)

    def add(self, setting: str, value: object, why: str, *, from_depth: bool = False) -> None:
        self.reasons.append(Reason(setting, value, why, from_depth))


def resolve(config: RunConfig, facts: Facts) -> ResolvedRun:
    """Decide everything that `config` leaves open.

    Raises:
        UserError: the configuration does not fit the data, the weights to start from, the machine, or the run that it resumes.
    """
    log, device = _Log(), facts.context.device
    config = apply_depth(absolute_paths(config), facts.given, record=partial(log.add, from_depth=True))
    if facts.previous is not None:
        config = _continued(config, facts.previous, facts, log)
    data, asked, optim, train = config.data, config.model, config.optim, config.train
    start, lora = facts.start(asked.init), config.tune.lora_rank > 0
    data = _with_chat_format(_with_models_tokenizer(data, optim, start, facts, log, lora=lora), start, facts, log)
    dataset = facts.dataset(data, asked.block_size if start is None else min(asked.block_size, start.config.context))
    if dataset.manifest.row and train.context_start:
        raise UserError("train.context_start: rows are packed for the whole context: leave this setting out")
    schedule = check_schedule(optim, train, facts, start, log.changes, log.warnings)
    tokenizer, vocab_size = _vocabulary(dataset, asked.vocab_size if start is None else start.config.vocab_size, start, facts)
    model = _model(asked, vocab_size, start, dataset, tokenizer, log, facts.continued or asked.init)
    tune = _adapters(config.tune, model, start, tokenizer, facts, log)

    left_out = fp8_layers(model)[1] if config.fp8 else None
    precision = choose_precision(config.precision, device, fp8_excluded=left_out, measure=facts.bfloat16_speedup)
    log.add("precision", precision.name, precision.why)
    optim = resolve_muon_precision(optim, precision.name)
    peak = _peak_flops(model, precision.name, facts, fp8=config.fp8, tf32=not config.deterministic)

    shaped = replace(config, model=model, optim=optim)
    layout, why = decide_layout(shaped, precision.name, facts)
    if layout.world_size > 1:
        log.add("parallel.layout", str(layout), why)
    plan = make_plan(train, model.block_size, layout.data_size)
    if isinstance(train.micro_batch, int) and plan.micro_batch != train.micro_batch:
        share = f"each of {layout.data_size} processes has {plan.samples_per_step // layout.data_size} sequences per step"
        log.changes.append(f"train.micro_batch: {train.micro_batch} -> {plan.micro_batch}, because {share}")
    data = with_stages(data, plan)
    execution = Execution(precision, False, config.cuda_graphs, config.fp8, train.recompute == "blocks")
    flops, deadline = run_flops(model, tune, plan, execution) / layout.world_size, train.deadline_seconds
    compiles, why = choose_compile(config.compile, config.cuda_graphs, device, flops, peak, plan.shapes, deadline=deadline)
    if (problem := facts.compiler_problem(device, compiles=compiles)) is not None:
        compiles, why = False, without_compiler(problem, config.compile, config.cuda_graphs)
    execution = with_layout(replace(execution, compiled=compiles), shaped, layout, plan, facts)
    compiled: Literal["on", "off"] = "on" if compiles else "off"
    log.add("compile", compiled, why)

    mask = data.document_mask or dataset.manifest.row > 0
    chosen = choose_micro_batch(
        model, optim, train, plan, execution, facts.arranged(layout), tune=tune, tokenizer=tokenizer, document_mask=mask
    )
    resolved = replace(
        config, model=model, data=data, optim=optim, train=train, tune=tune, precision=precision.name, compile=compiled
    )
    run = ResolvedRun(resolved, layout, plan, execution, schedule, (), (), tokenizer, peak)
    if chosen is not None:
        micro, why = chosen
        log.add("train.micro_batch", micro, why)
        log.changes.append(f"train.micro_batch: {train.micro_batch} -> {micro}, {why}")
        run = run.with_micro_batch(micro)
    log.warnings += idle_stages(layout, run.plan)
    return replace(run, reasons=tuple(log.reasons), changes=tuple(log.changes), warnings=tuple(log.warnings))


def _peak_flops(model: ModelConfig, precision: str, facts: Facts, *, fp8: bool, tf32: bool) -> float | None:
    """The peak of one process's device (FLOP/s); None when unknown."""
    device = facts.context.device
    if device.type == "cpu":
        return facts.matmul_flops(device, DTYPES[precision])
    return peak_flops(device_name(device), precision, tf32=tf32, fp8=model if fp8 else None)


def _continued(config: RunConfig, previous: RunConfig, facts: Facts, log: _Log) -> RunConfig:
    """The configuration of a resumed run, which keeps what `previous` decided; the changes are checked and recorded."""
    model, optim, train = _keep(config.model, config.optim, config.train, previous.model, previous.train, previous.precision)
    kept: dict[str, Any] = {key: getattr(previous, key) for key in ("precision", "compile") if getattr(config, key) == "auto"}
    before, data = absolute_paths(previous), config.data
    if model.init and data.tokenizer == DataConfig.tokenizer:  # a run from initial weights recorded their tokenizer
        data = replace(data, tokenizer=before.data.tokenizer)
    if str(Path.cwd() / data.source) == before.data.source:  # the relative path of a file that is gone
        data = replace(data, source=before.data.source)
    data = with_stages(data, make_plan(replace(previous.train, micro_batch=None), previous.model.block_size, 1))
    now = replace(config, data=data, model=model, optim=optim, train=train, **kept)
    # Tokens may have moved, and text too if it is needed to prepare them again; both must have the recorded digest.
    moved = bool(data.source) and data.source != before.data.source
    moved = moved and (is_tokenized(data.source) or recorded_corpus(data, facts.folder.dataset_record()) is None)
    log.changes += _checked_changes(changed_settings(before, now), moved=moved)
    return now


def _keep(
    model: ModelConfig, optim: OptimConfig, train: TrainConfig, old: ModelConfig, old_train: TrainConfig, precision: str
) -> tuple[ModelConfig, OptimConfig, TrainConfig]:
    """Keep what was decided when the run started, for settings that the resumed run leaves open."""
    ramp = train.ramp
    if ramp == old_train.ramp and (train.batch_start or train.context_start):
        # More steps leave the stages of batch and context where they were, unless the run ends before them.
        ramp = min(1.0, ramp * old_train.steps / train.steps)
    micro_batch = old_train.micro_batch if train.micro_batch == "auto" else train.micro_batch
    positions = model.max_positions or (old.max_positions if model.init else None)
    return (
        replace(model, vocab_size=model.vocab_size or old.vocab_size, max_positions=positions).resolved(),
        resolve_muon_precision(optim, precision),
        replace(train, ramp=ramp, micro_batch=micro_batch),
    )


# A trained model, its optimizer and the data order depend on these. Other changes take effect and are reported.
_FIXED_DATA = ("source", "sources", "stages", "tokenizer", "val_fraction", "val_source", "packing", "format", "too_long")
_FIXED = ("seed", "optim.name", *(f"data.{name}" for name in _FIXED_DATA))


def _checked_changes(changed: Mapping[str, tuple[object, object]], *, moved: bool = False) -> list[str]:
    """Describe what changed since the run started ("train.steps: 100 -> 200"); `moved`: data.source may have changed too.

    Raises:
        UserError: a change is incompatible with the trained weights or the data order.
    """
    for key, (old, new) in changed.items():
        if (key in _FIXED and not (moved and key == "data.source")) or (
            key.startswith(("model.", "tune.")) and key != "model.dropout"
        ):
            raise UserError(f"{key} = {new!r}: a run that has started keeps {old!r}; start a new run for another value")
    return [f"{key}: {old} -> {new}" for key, (old, new) in changed.items()]


def _with_models_tokenizer(
    data: DataConfig, optim: OptimConfig, start: Loaded | None, facts: Facts, log: _Log, *, lora: bool
) -> DataConfig:
    """Tokenize text with the tokenizer of the initial weights, unless the user chose one or the source holds tokens.

    Also warns about learning rates that do not suit these weights; `lora`: they stay as they are.
    """
    if start is None or facts.resumed:
        return data
    if facts.continued is None and not lora:
        learns_to_chat = holds_conversations(data) and parameters(start.config) < _SMALL
        log.warnings += _finetuning_warnings(optim, 10.0 if learns_to_chat else 1.0)
    given = data.tokenizer != DataConfig.tokenizer if facts.given is None else "data.tokenizer" in facts.given
    unknown = start.tokenizer is None and start.find_tokenizer is None
    if given or unknown or all(is_tokenized(each.source) for each in source_configs(data)):
        return data
    tokenizer = start.needed_tokenizer()
    if data.tokenizer == "byte" and tokenizer.fingerprint == build_tokenizer("byte", ()).fingerprint:
        return data
    log.add("data.tokenizer", path := tokenizer_file(tokenizer), "that of the initial weights")
    log.changes.append(f"data.tokenizer: {data.tokenizer} -> that of the initial weights ({_describe(tokenizer)})")
    return replace(data, tokenizer=path)


def _with_chat_format(data: DataConfig, start: Loaded | None, facts: Facts, log: _Log) -> DataConfig:
    """Give a tokenizer without a chat template the one that `data.chat_template` names, with its tokens."""
    if not data.chat_template or facts.resumed or not holds_conversations(data):
        return data
    if is_tokenizer_path(data.tokenizer):
        tokenizer = load_tokenizer(data.tokenizer)
    elif start is not None and start.tokenizer is not None:
        tokenizer = start.tokenizer
    elif data.tokenizer == "char" or data.tokenizer.startswith("bpe:"):
        fault = "is made from text, and cannot be made from conversations"
        raise UserError(f"data.tokenizer = {data.tokenizer!r}: {fault}: use byte, gpt2, a tokenizer.json or model.init")
    else:
        tokenizer = build_tokenizer(data.tokenizer, ())
    if tokenizer.interface.chat_template is not None:
        log.changes.append(f"data.chat_template: {data.chat_template} -> that of the initial weights, which have one")
        return data
    extended = with_chatml(tokenizer)
    log.add("data.tokenizer", path := tokenizer_file(extended), "with the tokens and the template of ChatML")
    log.changes.append(f"data.tokenizer: {_describe(extended)}, with the tokens and the template of ChatML")
    return replace(data, tokenizer=path)


def _describe(tokenizer: Tokenizer) -> str:
    return f"{tokenizer.kind}, {tokenizer.vocab_size:,} tokens, fingerprint {tokenizer.fingerprint}"


_FINETUNING_LR = 3e-5  # AdamW on all weights, as in the recipe finetune-shakespeare
_HIGHEST_LR = {"lr": 1e-4, "muon_lr": 2e-3, "embed_lr": 1e-4, "head_lr": 1e-4}
"""Above these, learning rates are those of training from random weights: GPT-3's largest models took 6e-5 to 1e-4."""
_SMALL = 20_000_000  # parameters of models that learn conversations at ten times these rates


def _finetuning_warnings(optim: OptimConfig, factor: float) -> list[str]:
    """A warning if learning rates are too high for pretrained weights; `factor`: by how much more than usual they may be."""
    keys = _HIGHEST_LR if optim.name == "muon" else ("lr",)
    rates = {key: getattr(optim, key) for key in keys}
    high = [f"optim.{key} = {rate:g}" for key, rate in rates.items() if rate is not None and rate > factor * _HIGHEST_LR[key]]
    if not high:
        return []
    remedy = f"--optim.lr {_FINETUNING_LR:g}"
    remedy += f" --optim.min_lr {_FINETUNING_LR / 10:g}" if (optim.min_lr or 0) > _FINETUNING_LR else ""
    remedy += " --optim.name adamw" if optim.name == "muon" else ""
    rates_are = "these are learning rates" if len(high) > 1 else "a learning rate"
    effect = "can destroy what the initial weights have learned"
    return [f"{', '.join(high)}: {rates_are} for random weights, and {effect}: to finetune, try {remedy}"]


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
    asked: ModelConfig,
    vocab_size: int,
    start: Loaded | None,
    dataset: TokenDataset,
    tokenizer: Tokenizer | None,
    log: _Log,
    origin: str,
) -> ModelConfig:
    """The architecture with its vocabulary size: the recipe's, or that of the weights to start from.

    With such weights, which come from `origin`, only the context, which may be shorter, and dropout follow the recipe.
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
    if own is not None and tokenizer is not None and own.fingerprint != tokenizer.fingerprint and not tokenizer.extends(own):
        fault = f"its tokenizer ({_describe(tokenizer)}) is not the model's ({origin}: {_describe(own)})"
        remedy = f"omit data.tokenizer, or prepare the text with --tokenizer {tokenizer_file(own)}"
        raise UserError(f"{dataset.path}: {fault}: {remedy}")
    if own is None and tokenizer is not None and tokenizer.vocab_size != start.config.vocab_size:
        log.warnings.append(
            f"{origin}: has no tokenizer, and {start.config.vocab_size:,} tokens; {dataset.path}, whose tokenizer is "
            f"{_describe(tokenizer)}, is taken to hold its tokens"
        )
    extends = own is not None and tokenizer is not None and tokenizer.vocab_size > own.vocab_size and tokenizer.extends(own)
    if start.config.vocab_size < dataset.vocab_size and not extends:
        raise UserError(
            f"{dataset.path}: has a vocabulary of {dataset.vocab_size} tokens, but the model only {start.config.vocab_size}: "
            "prepare the text with the model's tokenizer"
        )
    longest = start.config.context
    block_size, longer = min(asked.block_size, longest), None
    # Rotary positions beyond the training sequences keep their meaning; learned ones are cropped.
    if start.config.architecture.positions == "rotary" and block_size < longest:
        longer = longest
        log.add("model.max_positions", longest, "the context of the initial weights")
    model = replace(
        start.config,
        block_size=block_size,
        vocab_size=max(start.config.vocab_size, dataset.vocab_size),
        max_positions=longer,
        dropout=asked.dropout,
        init=asked.init,
    ).resolved()
    requested = asked.resolved()
    for key in ("n_layer", "n_head", "n_embd", "block_size", "bias", "gelu", "norm", "positions", "mlp"):
        before, after = getattr(requested, key), getattr(model, key)
        if before != after:
            log.add(f"model.{key}", after, "as in the initial weights")
            log.changes.append(f"model.{key}: {before} -> {after}, as in the initial weights")
    return model


def _adapters(
    tune: TuneConfig, model: ModelConfig, start: Loaded | None, tokenizer: Tokenizer | None, facts: Facts, log: _Log
) -> TuneConfig:
    """The settings of LoRA, with the tokens that are new to the model.

    Raises:
        UserError: there are no weights to adapt, or the model has none of the layers.
    """
    if not tune.lora_rank or facts.previous is not None:
        return tune
    if facts.continued or start is None:
        remedy = "name weights to adapt with --model.init"
        raise UserError(f"tune.lora_rank = {tune.lora_rank}: {remedy}{', not --continue_from' if facts.continued else ''}")
    adapted_parts(model, tune)
    known = start.config.vocab_size if start.tokenizer is None else start.tokenizer.vocab_size
    if not any(tune.new_tokens) and tokenizer is not None and known < tokenizer.vocab_size:
        tune = replace(tune, new_tokens=(known, tokenizer.vocab_size))
        log.add("tune.new_tokens", tune.new_tokens, "those that the chat template adds")
    if tune.new_tokens[1] > model.vocab_size:
        raise UserError(f"tune.new_tokens = {tune.new_tokens}: the model has {model.vocab_size:,} tokens")
    return tune
