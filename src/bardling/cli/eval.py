"""`bardling eval MODEL`: loss, perplexity and bits per byte on text, compared with gzip and xz; task accuracy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from bardling.cli.parse import Model, parse, require_options
from bardling.cli.tables import print_rows
from bardling.config import DataConfig
from bardling.errors import UserError
from bardling.monitor.progress import ProgressBar

if TYPE_CHECKING:
    from bardling.checkpoint.load import Loaded
    from bardling.checkpoint.run_folder import RunFolder
    from bardling.data.tokens.shards import TokenDataset
    from bardling.data.tokens.tokenizer import Tokenizer
    from bardling.distributed.context import Context
    from bardling.distributed.device import Precision
    from bardling.model.gpt import GPT

Rows = list[tuple[str, str]]


@dataclass(frozen=True)
class EvalOptions:
    model: Model
    """A run, a checkpoint, a model folder, gpt2 or USER/REPO on the hub, or a nanoGPT or nano-gpt checkpoint."""
    data: str | None = None
    """Text to evaluate on: whole files, or the validation split of a named or prepared dataset; default: that of the run."""
    encoding: Annotated[str, tyro.conf.arg(aliases=["--data.encoding"])] = ""
    """Encoding of the text files of --data without a byte order mark, such as cp1252; default: UTF-8."""
    windows: int | None = None
    """Number of sequences to use, evenly spaced; default: all."""
    batch_size: int = 16
    """Sequences per forward pass."""
    tasks: tuple[str, ...] = ()
    """Multiple-choice tasks: 'hellaswag', or JSON Lines or JSON files in the same format."""
    task_items: int | None = None
    """Number of items per task, a random but fixed subset; default: those that a run measures in training, else all."""
    device: str = "auto"
    """'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of matrix multiplications."""
    weights: Literal["auto", "float32", "bfloat16", "int8"] = "float32"
    """Dtype of the weights: int8 or bfloat16 as `sample --weights` computes; auto: the fastest here."""
    best: bool = False
    """Use the checkpoint with the lowest validation loss instead of the latest."""


def run(argv: Sequence[str]) -> None:
    options = parse(EvalOptions, argv, prog="bardling eval", description="Evaluate a model on validation text and on tasks.")
    require_options(1, options, "windows", "batch_size", "task_items")
    from bardling.checkpoint.load import load, run_of
    from bardling.data.batches.packing import begins_documents
    from bardling.distributed.context import distributed
    from bardling.distributed.device import choose_precision
    from bardling.evaluate.tasks import check_task
    from bardling.generation.weights import choose_weights, convert_weights

    for task in options.tasks:
        check_task(task)
    run_folder = run_of(options.model)
    if options.data is None and run_folder is None and not options.tasks:
        advice = "give --data FOLDER, --data SOURCE or --tasks"
        raise UserError(f"{options.model}: is not part of a run and has no dataset; {advice}")
    rows: Rows = []
    with distributed(options.device) as context:
        loaded = load(options.model, best=options.best)
        precision = choose_precision(options.precision, context.device)
        weights, why = choose_weights(options.weights, context.device)
        model = convert_weights(loaded.build().to(context.device), weights)
        if options.data is not None or run_folder is not None:
            dataset = _dataset(options, loaded, run_folder)
            # Its own validation split is measured as in training; on other text, a run gives the same result as its export.
            trained = None if run_folder is None or options.data is not None else run_folder.trained_config()
            masked = trained is not None and trained.data.document_mask
            tokenizer = dataset.tokenizer or loaded.tokenizer
            start = begins_documents(dataset, tokenizer) if masked and tokenizer is not None else None
            dataset.vocab_size = min(dataset.vocab_size, model.config.vocab_size)  # reading refuses ids that the model lacks
            # A run trains on sequences that may be shorter than the model's context.
            length = model.config.block_size if trained is None else min(model.config.block_size, trained.model.block_size)
            rows += _measure_loss(options, model, dataset, length, start, precision, context)
            if options.data is not None and run_folder is not None and context.is_primary:
                rows.append(("overlap", _overlap(dataset, run_folder)))
        for task in options.tasks:
            rows += _measure_task(options, task, run_folder, model, loaded.needed_tokenizer(), precision, context)
        if context.is_primary:
            rows.append(("precision", f"{precision.name} ({precision.why})"))
            print_rows(rows if options.weights == "float32" else [*rows, ("weights", f"{weights} ({why})")])


def _measure_loss(
    options: EvalOptions,
    model: "GPT",
    dataset: "TokenDataset",
    length: int,
    start: int | None,
    precision: "Precision",
    context: "Context",
) -> Rows:
    import torch

    from bardling.data.batches.loader import EvalSequences
    from bardling.evaluate.loss import evaluate_loss
    from bardling.report.compression import compressor_bits_per_byte

    tokenizer = dataset.tokenizer
    table = None if tokenizer is None else torch.from_numpy(tokenizer.bytes_per_token()).to(context.device)
    with ProgressBar("evaluating", unit="sequences", show=context.is_primary) as progress:
        result = evaluate_loss(
            model,
            EvalSequences(dataset.split("val"), length, options.windows, start),
            batch_size=options.batch_size,
            precision=precision,
            context=context,
            bytes_per_token=table,
            progress=progress,
        )
    rows = [("loss", f"{result.loss:.4f} nats per token"), ("perplexity", f"{result.perplexity:.2f}")]
    if result.bits_per_byte is not None:
        rows.append(("bits per byte", f"{result.bits_per_byte:.4f}"))
    if options.windows is None and context.is_primary:
        baselines = compressor_bits_per_byte(dataset).items()
        rows += [(f"  {name}", f"{bits:.4f} bits per byte on the same text") for name, bits in baselines]
    return [*rows, ("measured on", f"{result.tokens:,} tokens of {dataset.path}")]


def _measure_task(
    options: EvalOptions,
    task: str,
    run_folder: "RunFolder | None",
    model: "GPT",
    tokenizer: "Tokenizer",
    precision: "Precision",
    context: "Context",
) -> Rows:
    from bardling.evaluate.multiple_choice import evaluate_choices
    from bardling.evaluate.tasks import draw_items, load_items, task_name

    run, name = None if run_folder is None else run_folder.trained_config(), task_name(task)
    count, seed = (options.task_items, 0) if run is None else (options.task_items or run.eval.task_items, run.seed)
    found = context.on_primary(lambda: load_items(task))
    items = draw_items(found, count, seed)
    with ProgressBar(name, unit="items", show=context.is_primary) as progress:
        result = evaluate_choices(model, tokenizer, items, precision=precision, task=name, context=context, progress=progress)
    rows = [
        (name, f"{result.accuracy('tokens'):.4f} ± {result.stderr('tokens'):.4f} accuracy, ending losses normalised by tokens"),
        ("", f"{result.accuracy('sum'):.4f} ± {result.stderr('sum'):.4f} accuracy, not normalised"),
        ("", f"{result.accuracy('characters'):.4f} ± {result.stderr('characters'):.4f} accuracy, normalised by characters"),
        ("", f"{result.total:,} of {len(found):,} items, {result.items_per_second:.1f} items/s"),
    ]
    if result.cut_contexts or result.cut_endings:
        rows.append(("", f"{result.cut_contexts} contexts and {result.cut_endings} endings truncated to the model's context"))
    return rows


def _dataset(options: EvalOptions, loaded: "Loaded", run_folder: "RunFolder | None") -> "TokenDataset":
    """The dataset given by `--data`, else the run's. Text is tokenized with the model's tokenizer."""
    from bardling.checkpoint.load import tokenizer_file
    from bardling.data.text.named_datasets import DEFAULTS, is_source_name
    from bardling.data.tokens.dataset import is_tokenized, open_data, open_recorded
    from bardling.data.tokens.prepare import EVALUATION_ONLY, SPLIT_RULE

    tokenizer = loaded.tokenizer
    if run_folder is not None and options.data is None:
        remedy = "name the text to evaluate on with --data"
        config = run_folder.trained_config().data
        dataset = open_recorded(config, run_folder.dataset_record(), run_folder.path, remedy)
    else:
        source, spec, rule = options.data or "", DataConfig.tokenizer, SPLIT_RULE
        _, val_fraction = DEFAULTS.get(source, ("", DataConfig.val_fraction))
        if not is_tokenized(source):
            tokenizer = loaded.needed_tokenizer()
            spec = tokenizer_file(tokenizer)
            rule = SPLIT_RULE if is_source_name(source) else EVALUATION_ONLY
        cache = "" if run_folder is None else run_folder.trained_config().data.cache
        config = DataConfig(source, spec, val_fraction, cache=cache, encoding=options.encoding)
        dataset = open_data(config, rule)
    if tokenizer is not None and dataset.tokenizer is not None and tokenizer.fingerprint != dataset.tokenizer.fingerprint:
        raise UserError(
            f"{dataset.path}: was prepared with another tokenizer ({dataset.tokenizer.fingerprint}) than the model's "
            f"({tokenizer.fingerprint}): prepare it again with --tokenizer {tokenizer_file(tokenizer)}"
        )
    return dataset


def _overlap(dataset: "TokenDataset", run: "RunFolder") -> str:
    """How much of the text was also training text of the run that the model belongs to."""
    from bardling.data.tokens.dataset import recorded_tokens
    from bardling.evaluate.overlap import MOST_TOKENS, training_overlap

    trained = recorded_tokens(run.trained_config().data, run.dataset_record())
    if trained is None:
        return f"unknown, because the training tokens of {run.path} are gone"
    training = trained.split("train")
    part = "" if len(training) <= MOST_TOKENS else f" (in its first {MOST_TOKENS:,} tokens)"
    return f"{training_overlap(dataset.split('val'), training):.1%} of this text is also training text of {run.path}{part}"
