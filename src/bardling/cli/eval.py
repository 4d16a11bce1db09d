"""`bardling eval RUN`: loss, perplexity and bits per byte on the held-out split, beside what compressors reach there."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from bardling.cli.parse import parse

if TYPE_CHECKING:
    from bardling.data.shards import TokenDataset
    from bardling.data.tokenizer import Tokenizer

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
    device: str = "auto"
    """'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of matrix products."""
    best: bool = False
    """Use the checkpoint with the best validation loss instead of the newest."""


def run(argv: Sequence[str]) -> None:
    """Parse, measure, print."""
    options = parse(EvalOptions, argv, prog="bardling eval", description="Measure a model on held-out text.")
    import torch
    from rich.console import Console
    from rich.table import Table

    from bardling.checkpoint.load import load
    from bardling.cli.progress import Progress
    from bardling.data.loader import EvalWindows
    from bardling.distributed.context import distributed
    from bardling.distributed.device import choose_precision
    from bardling.evaluate.loss import evaluate_loss

    with distributed(options.device) as context:
        loaded = load(options.model, best=options.best)
        dataset = _dataset(options, loaded.tokenizer)
        precision = choose_precision(options.precision, context.device)
        model = loaded.build().to(context.device)
        tokenizer = dataset.tokenizer
        table = None if tokenizer is None else torch.from_numpy(tokenizer.bytes_per_token()).to(context.device)
        with Progress("evaluating", show=context.is_primary) as progress:
            result = evaluate_loss(
                model,
                EvalWindows(dataset.split("val"), model.config.block_size, options.windows),
                batch_size=options.batch_size,
                precision=precision,
                context=context,
                bytes_per_token=table,
                progress=progress,
            )
        if not context.is_primary:
            return
        rows = Table(box=None, show_header=False, pad_edge=False)
        rows.add_row("loss", f"{result.loss:.4f} nats a token")
        rows.add_row("perplexity", f"{result.perplexity:.2f}")
        if result.bits_per_byte is not None:
            rows.add_row("bits per byte", f"{result.bits_per_byte:.4f}")
        for name, bits in compressors(dataset).items() if options.windows is None else ():
            rows.add_row(f"  {name}", f"{bits:.4f} bits per byte on the same text")
        rows.add_row("measured on", f"{result.tokens:,} tokens of {dataset.path}")
        rows.add_row("precision", f"{precision.name} ({precision.why})")
        Console().print(rows)


def _dataset(options: EvalOptions, own: "Tokenizer | None") -> "TokenDataset":
    """The dataset that was asked for, or the one that the run was trained on."""
    import dataclasses

    from bardling.checkpoint.load import run_of
    from bardling.config import DataConfig
    from bardling.errors import UserError
    from bardling.interop.dataset import open_data

    owner = run_of(Path(options.model))
    if options.data is None and owner is None:
        raise UserError(f"{options.model}: belongs to no run, so say what to measure on: --data FOLDER or SOURCE")
    config = DataConfig() if owner is None else owner.config().data
    if options.data is not None:
        config = dataclasses.replace(config, source=options.data)
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
