"""`bardling data show DATASET`: sequences exactly as the model sees them."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from bardling.cli.parse import parse, require_options
from bardling.cli.tables import printable
from bardling.errors import UserError

if TYPE_CHECKING:
    from bardling.data.batches.order import DataOrder
    from bardling.data.tokens.shards import TokenDataset
    from bardling.data.tokens.tokenizer import Tokenizer
    from bardling.tools.data_show import ShownSequence

_NOT_LEARNED, _LEARNED, _LINE = "\033[2m", "\033[32m", "\033[1;36m"  # dim, green, bold cyan
_END = "\033[0m"


@dataclass(frozen=True)
class ShowOptions:
    source: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="DATASET")]]
    """A prepared dataset, a folder of token files, or a run."""
    step: int = 1
    """The step whose samples are shown. A run knows its samples; for a dataset, --seed, --block_size and --batch_size tell."""
    count: int = 2
    """The most samples to show."""
    seed: int = 1337
    """Of a dataset's data order, as train.seed of a run."""
    block_size: int = 256
    """Tokens of context, for a dataset."""
    batch_size: int = 8
    """Samples of a step, for a dataset."""
    document_mask: bool = False
    """For a dataset: as with data.document_mask, attention does not cross documents."""


def run(argv: Sequence[str]) -> None:
    description = "Print sequences exactly as the model sees them, with document boundaries and masks."
    options = parse(ShowOptions, argv, prog="bardling data show", description=description)
    require_options(1, options, "step", "count", "block_size", "batch_size")
    from bardling.tools.data_show import show_samples

    path = Path(options.source)
    dataset, order, samples, masked = _of_run(path, options) if (path / "config.toml").is_file() else _of_dataset(options)
    reach = "within each document only" if masked or dataset.manifest.row else "across documents"
    shown = f"{min(len(samples), options.count)} of {len(samples):,} samples"
    print(f"{printable(options.source)}, step {options.step:,}: {shown}, attention {reach}")
    print(
        f"{_styled('learned', _LEARNED)}; {_styled(_bracketed('not learned'), _NOT_LEARNED)}: seen by the model, but no target"
    )
    for sequence in show_samples(dataset, order, samples[: options.count], masked=masked):
        _print(sequence, dataset.tokenizer)


def _of_run(path: Path, options: ShowOptions) -> "tuple[TokenDataset, DataOrder, list[int], bool]":
    from bardling.checkpoint.run_folder import open_run
    from bardling.training.recovery.trace import trace_step

    folder = open_run(path)
    seen = trace_step(folder, options.step)
    return (
        seen.dataset,
        seen.order,
        [sequence.sample for sequence in seen.sequences],
        folder.trained_config().data.document_mask,
    )


def _of_dataset(options: ShowOptions) -> "tuple[TokenDataset, DataOrder, list[int], bool]":
    from bardling.config import DataConfig
    from bardling.data.batches.order import SequenceOrder
    from bardling.data.tokens.dataset import is_tokenized, open_data

    if not is_tokenized(options.source):
        remedy = f"bardling prepare {options.source} --out DATASET, then show that"
        raise UserError(f"{options.source}: is neither a run nor a prepared dataset: {remedy}")
    dataset = open_data(DataConfig(source=options.source))
    row = dataset.manifest.row
    order = SequenceOrder(options.seed, len(dataset.split("train")), row - 1 if row else options.block_size, row)
    first = (options.step - 1) * options.batch_size
    return dataset, order, list(range(first, first + options.batch_size)), options.document_mask


def _print(sequence: "ShownSequence", tokenizer: "Tokenizer | None") -> None:
    size = sum(len(span.ids) for span in sequence.spans)
    end = sequence.start + size - 1
    print(
        f"\nsample {sequence.sample:,}: tokens {sequence.start:,} to {end:,} ({printable(sequence.place)}), "
        f"{sequence.learned:,} of {size:,} learned"
    )
    for span in sequence.spans:
        if span.anew:
            print(_styled("\n--- attention begins anew ---", _LINE))
        if span.document is not None:
            before = sequence.start - span.document.begin
            begins = "continues" if before > 0 else "begins"
            print(_styled(f"\n=== {printable(str(span.document))} {begins} ===", _LINE))
        text = str(span.ids.tolist()) if tokenizer is None else _text(tokenizer, span.ids.tolist())
        style = (text, _LEARNED) if span.learned else (_bracketed(text), _NOT_LEARNED)
        print(_styled(*style), end="")
    print()


def _text(tokenizer: "Tokenizer", ids: list[int]) -> str:
    from bardling.files.streams import escape_unprintable

    return escape_unprintable(tokenizer.decode(ids), sys.stdout.encoding or "utf-8")


def _bracketed(text: str) -> str:
    return f"[[{text}]]"


def _styled(text: str, style: str) -> str:
    return f"{style}{text}{_END}" if sys.stdout.isatty() else text
