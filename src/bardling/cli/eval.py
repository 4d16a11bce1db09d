"""`bardling eval RUN`: loss, perplexity and bits per byte on the held-out split, beside what compressors reach there."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from bardling.cli.parse import parse
from bardling.cli.progress import Progress
from bardling.config import DataConfig

if TYPE_CHECKING:
    from bardling.checkpoint.runfolder import RunFolder
    from bardling.data.shards import TokenDataset
    from bardling.data.tokenizer import Tokenizer
    from bardling.distributed.context import Context
    from bardling.distributed.device import Precision
    from bardling.model.gpt import GPT

# Compressing more than this takes minutes; beyond it the comparison is left out.
LARGEST_COMPRESSED = 64 << 20  # bytes


@dataclass(frozen=True)
class EvalOptions:
    """Options of `bardling eval`."""

    model: tyro.conf.Positional[str]
    """A run, a checkpoint, a model folder, gpt2 or USER/REPO on the hub, or a checkpoint of nanoGPT or nano-gpt."""
    data: str | None = None
    """Another dataset: a prepared folder, or a source as in data.source. Unset takes the run's own."""
    windows: int | None = None
    """Windows to measure on, evenly spread; unset takes the whole held-out split."""
    batch_size: int = 16
    """Windows in a forward pass."""
    tasks: tuple[str, ...] = ()
    """Multiple-choice tasks: 'hellaswag', or JSONL files in its form."""
    task_items: int | None = None
    """Items of each task, drawn at random but the same every time; unset takes all."""
    device: str = "auto"
    """'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of matrix products."""
    best: bool = False
    """Use the checkpoint with the best validation loss instead of the newest."""


def run(argv: Sequence[str]) -> None:
    """Parse, measure, print."""
    options = parse(EvalOptions, argv, prog="bardling eval", description="Measure a model on held-out text and on tasks.")
    from rich.console import Console
    from rich.table import Table

    from bardling.checkpoint.load import load, run_of
    from bardling.distributed.context import distributed
    from bardling.distributed.device import choose_precision
    from bardling.errors import UserError
    from bardling.evaluate.tasks import check_task

    for task in options.tasks:
        check_task(task)
    owner = run_of(Path(options.model))
    if options.data is None and owner is None and not options.tasks:
        raise UserError(f"{options.model}: belongs to no run, so say what to measure on: --data FOLDER or SOURCE, or --tasks")
    rows = Table(box=None, show_header=False, pad_edge=False)
    with distributed(options.device) as context:
        loaded = load(options.model, best=options.best)
        precision = choose_precision(options.precision, context.device)
        model = loaded.build().to(context.device)
        if options.data is not None or owner is not None:
            dataset = _dataset(options, loaded.tokenizer, owner)
            # As the run kept documents apart, or not.
            masked = owner is not None and owner.config().data.document_mask
            tokenizer = (loaded.tokenizer or dataset.tokenizer) if masked else None
            start = None if tokenizer is None else tokenizer.eot_id
            for name, value in _measure_loss(options, model, dataset, start, precision, context):
                rows.add_row(name, value)
        for task in options.tasks:
            if loaded.tokenizer is None:
                raise UserError(f"{options.model}: has no tokenizer: put its tokenizer.json into the model's folder")
            for name, value in _measure_task(options, task, model, loaded.tokenizer, precision, context):
                rows.add_row(name, value)
        rows.add_row("precision", f"{precision.name} ({precision.why})")
        if context.is_primary:
            Console().print(rows)


Rows = list[tuple[str, str]]


def _measure_loss(
    options: EvalOptions,
    model: "GPT",
    dataset: "TokenDataset",
    document_start: int | None,
    precision: "Precision",
    context: "Context",
) -> Rows:
    import torch

    from bardling.data.loader import EvalWindows
    from bardling.evaluate.loss import evaluate_loss

    tokenizer = dataset.tokenizer
    table = None if tokenizer is None else torch.from_numpy(tokenizer.bytes_per_token()).to(context.device)
    with Progress("evaluating", unit="windows", show=context.is_primary) as progress:
        result = evaluate_loss(
            model,
            EvalWindows(dataset.split("val"), model.config.block_size, options.windows, document_start),
            batch_size=options.batch_size,
            precision=precision,
            context=context,
            bytes_per_token=table,
            progress=progress,
        )
    rows = [("loss", f"{result.loss:.4f} nats a token"), ("perplexity", f"{result.perplexity:.2f}")]
    if result.bits_per_byte is not None:
        rows.append(("bits per byte", f"{result.bits_per_byte:.4f}"))
    if options.windows is None and context.is_primary:
        rows += [(f"  {name}", f"{bits:.4f} bits per byte on the same text") for name, bits in compressors(dataset).items()]
    return [*rows, ("measured on", f"{result.tokens:,} tokens of {dataset.path}")]


def _measure_task(
    options: EvalOptions, task: str, model: "GPT", tokenizer: "Tokenizer", precision: "Precision", context: "Context"
) -> Rows:
    from bardling.evaluate.multiple_choice import evaluate_choices
    from bardling.evaluate.tasks import draw_items, load_items, task_name

    if context.is_primary:
        load_items(task)  # downloads it if need be, once
    context.barrier()
    items = draw_items(load_items(task), options.task_items)
    name = task_name(task)
    with Progress(name, unit="items", show=context.is_primary) as progress:
        result = evaluate_choices(model, tokenizer, items, precision=precision, task=name, context=context, progress=progress)
    rows = [
        (name, f"{result.accuracy_norm:.4f} ± {result.stderr_norm:.4f} accuracy, each ending's loss divided by its tokens"),
        ("", f"{result.accuracy:.4f} ± {result.stderr:.4f} accuracy, plain"),
        ("", f"{result.accuracy_chars:.4f} ± {result.stderr_chars:.4f} accuracy, divided by its characters"),
        ("", f"{result.total:,} items, {result.items_per_second:.1f} items/s"),
    ]
    if result.cut_contexts or result.cut_endings:
        rows.append(("", f"{result.cut_contexts} contexts and {result.cut_endings} endings were cut to the model's context"))
    return rows


def _dataset(options: EvalOptions, own: "Tokenizer | None", owner: "RunFolder | None") -> "TokenDataset":
    """The dataset that was asked for, or the one that the run was trained on."""
    import dataclasses

    from bardling.data.datasets import DEFAULTS
    from bardling.data.download import cache_root
    from bardling.errors import UserError
    from bardling.interop.dataset import open_data

    config = DataConfig() if owner is None else owner.config().data
    if options.data is not None:
        tokenizer, val_fraction = DEFAULTS.get(options.data, (DataConfig.tokenizer, config.val_fraction))
        prepared = (Path(options.data) / "manifest.json").is_file()
        if own is not None and not prepared:  # text becomes tokens as the model knows them
            place = cache_root() / "tokenizers" / own.fingerprint
            place.mkdir(parents=True, exist_ok=True)
            own.save(place)
            tokenizer = str(place / "tokenizer.json")
        config = dataclasses.replace(config, source=options.data, tokenizer=tokenizer, val_fraction=val_fraction)
    dataset = open_data(config)
    if own is not None and dataset.tokenizer is not None and own.fingerprint != dataset.tokenizer.fingerprint:
        raise UserError(
            f"{dataset.path}: was made with another tokenizer ({dataset.tokenizer.fingerprint}) than the model's "
            f"({own.fingerprint}): prepare it again with --tokenizer {options.model}/tokenizer.json"
        )
    return dataset


def compressors(dataset: "TokenDataset") -> dict[str, float]:
    """Bits per byte of `gzip -9` and `xz -9` on the held-out text, all documents together; empty when it is too long."""
    import gzip
    import lzma

    split = dataset.split("val")
    tokenizer = dataset.tokenizer
    if tokenizer is None or len(split) > LARGEST_COMPRESSED:
        return {}
    ids = split.read(0, len(split))
    text = tokenizer.decode([int(token) for token in ids if token != tokenizer.eot_id]).encode()
    if not text or len(text) > LARGEST_COMPRESSED:
        return {}
    packed = {"gzip -9": gzip.compress(text, 9), "xz -9": lzma.compress(text, preset=9)}
    return {name: 8 * len(data) / len(text) for name, data in packed.items()}
