"""Measure a model as `bardling eval` does: loss on a text, and tasks.

A model is anything that `checkpoint/load.py` opens. On other text than the run's own, a run gives the same result as its
export. All processes call these functions together; the results are the same in each.
"""

from dataclasses import dataclass, field, replace

import torch

from bardling.checkpoint.load import Loaded, load, run_of, tokenizer_file
from bardling.checkpoint.run_folder import RunFolder
from bardling.config import DataConfig
from bardling.data.batches.assemble import validation_sets
from bardling.data.batches.loader import SlidingSequences
from bardling.data.text.named_datasets import DEFAULTS, is_source_name
from bardling.data.tokens.corpus import reopen_corpus
from bardling.data.tokens.dataset import is_tokenized, open_data
from bardling.data.tokens.documents import begins_documents
from bardling.data.tokens.prepare import EVALUATION_ONLY, SPLIT_RULE
from bardling.data.tokens.shards import TokenDataset
from bardling.distributed.context import Context
from bardling.distributed.device import Precision
from bardling.errors import UserError
from bardling.evaluate.benchmarks import Scores, Subject, open_task
from bardling.evaluate.loss import LossResult, evaluate_loss, weighted_mean
from bardling.generation.weights import Weights, convert_weights
from bardling.model.gpt import GPT
from bardling.monitor.progress import ProgressBar


@dataclass(frozen=True)
class Wanted:
    """What is measured."""

    data: str | None = None  # text, or a dataset; None for the run's own validation split
    reading: DataConfig = field(default_factory=DataConfig)  # encoding, field and separator of the text
    windows: int | None = None  # sequences, evenly spaced; None for all
    stride: int | None = None  # tokens between the beginnings of overlapping sequences; None for sequences that do not overlap
    batch_size: int = 16  # sequences per forward pass
    tasks: tuple[str, ...] = ()
    task_items: int | None = None
    weights: Weights = "float32"


@dataclass(frozen=True)
class Measured:
    """The results of one model."""

    model: str
    run: RunFolder | None
    loss: LossResult | None
    dataset: TokenDataset | None  # on which the loss was measured
    scores: tuple[Scores, ...]


def measure(spec: str, wanted: Wanted, precision: Precision, context: Context, *, best: bool = False) -> Measured:
    """Measure one model.

    Raises:
        UserError: the model, the text or a task cannot be opened, or they do not fit together.
    """
    run = run_of(spec)
    trained = None if run is None else run.trained_config()
    if wanted.data is None and run is None and not wanted.tasks:
        raise UserError(f"{spec}: is not part of a run and has no dataset; give --data FOLDER, --data SOURCE or --tasks")
    count, seed = wanted.task_items, 0
    if trained is not None:
        count, seed = wanted.task_items or trained.eval.task_items, trained.seed
    tasks = [context.on_primary(lambda task=task: open_task(task, count, seed)) for task in wanted.tasks]  # type: ignore[misc]
    loaded = load(spec, best=best)
    model = convert_weights(loaded.build().to(context.device), wanted.weights)
    dataset = loss = None
    if wanted.data is not None or run is not None:
        dataset = _dataset(wanted, loaded, run)
        loss = _loss(wanted, loaded, run, model, dataset, precision, context)
    scores: list[Scores] = []
    for task in tasks:
        tokenizer = loaded.needed_tokenizer()
        task.check(tokenizer, model.config)
        with ProgressBar(unit="items", show=context.is_primary) as bar:
            scores += task.evaluate(Subject(model, tokenizer, precision, context, progress=bar.update))
    return Measured(spec, run, loss, dataset, tuple(scores))


def _loss(
    wanted: Wanted,
    loaded: Loaded,
    run: RunFolder | None,
    model: GPT,
    dataset: TokenDataset,
    precision: Precision,
    context: Context,
) -> LossResult:
    # A run's own validation split is measured as in training.
    trained = None if run is None or wanted.data is not None else run.trained_config()
    tokenizer = dataset.tokenizer or loaded.tokenizer
    masked = trained is not None and trained.data.document_mask
    start = begins_documents(dataset, tokenizer) if masked and tokenizer is not None else None
    dataset.vocab_size = min(dataset.vocab_size, model.config.vocab_size)  # reading refuses ids that the model lacks
    # A run trains on sequences that may be shorter than the model's context.
    length = model.config.block_size if trained is None else min(model.config.block_size, trained.model.block_size)
    sets = validation_sets(dataset, DataConfig() if trained is None else trained.data, length, wanted.windows, start)
    if wanted.stride is not None and dataset.manifest.row:
        raise UserError(f"--stride {wanted.stride}: {dataset.path} holds packed rows, which are evaluated whole: omit it")
    if wanted.stride is not None:
        splits = dataset.splits("val")
        sets = [
            replace(each, sequences=SlidingSequences(split, length, wanted.stride, start))
            for each, (_, split) in zip(sets, splits, strict=True)
        ]
    table = None
    if dataset.tokenizer is not None:
        table = torch.from_numpy(dataset.tokenizer.bytes_per_token()).to(context.device)
    results = []
    for each in sets:
        with ProgressBar(f"evaluating {each.name}".strip(), unit="sequences", show=context.is_primary) as progress:
            result = evaluate_loss(
                model,
                each.sequences,
                batch_size=wanted.batch_size,
                precision=precision,
                context=context,
                bytes_per_token=table,
                progress=progress,
            )
        results.append(result)
    return weighted_mean(results, [each.weight for each in sets], [each.name for each in sets])


def _dataset(wanted: Wanted, loaded: Loaded, run: RunFolder | None) -> TokenDataset:
    """The dataset given by `--data`, else the run's. Text is tokenized with the model's tokenizer."""
    tokenizer = loaded.tokenizer
    if run is not None and wanted.data is None:
        remedy = "name the text to evaluate on with --data"
        config = run.trained_config()
        dataset = reopen_corpus(config.data, run.dataset_record(), run.path, remedy, config.model.block_size)
    else:
        source, spec, rule = wanted.data or "", DataConfig.tokenizer, SPLIT_RULE
        _, val_fraction = DEFAULTS.get(source, ("", DataConfig.val_fraction))
        if not is_tokenized(source):
            tokenizer = loaded.needed_tokenizer()
            spec = tokenizer_file(tokenizer)
            rule = SPLIT_RULE if is_source_name(source) else EVALUATION_ONLY
        cache = "" if run is None else run.trained_config().data.cache
        text = replace(wanted.reading, source=source, tokenizer=spec, val_fraction=val_fraction, cache=cache)
        dataset = open_data(text, rule, loaded.config.block_size)
    if tokenizer is not None and dataset.tokenizer is not None and tokenizer.fingerprint != dataset.tokenizer.fingerprint:
        raise UserError(
            f"{dataset.path}: was prepared with another tokenizer ({dataset.tokenizer.fingerprint}) than the model's "
            f"({tokenizer.fingerprint}): prepare it again with --tokenizer {tokenizer_file(tokenizer)}"
        )
    return dataset
