"""`bardling prepare SOURCE --out DIR`: tokenize text into a dataset folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from bardling.cli.parse import parse
from bardling.config import DataConfig
from bardling.files.streams import tell


@dataclass(frozen=True)
class PrepareOptions:
    source: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="SOURCE")]]
    """hf:NAME[:CONFIG][:SPLIT][:FIELD], 'stdlib', 'shakespeare', 'shakespeare-char', 'openwebtext', 'fineweb-edu', a file
    (text, JSON, CSV, Parquet, Arrow, tar or zip, compressed or not) or FILE:FIELD, a folder, a glob, a URL such as
    s3://BUCKET/FILE, or '-' for standard input."""
    out: Path
    """Folder to create; it must not exist."""
    tokenizer: str | None = None
    """'byte', 'char', 'bpe:SIZE' (trained on the source), 'gpt2', or the path of a tokenizer.json; default: the usual one for a
    named dataset, else 'byte'."""
    val_fraction: float | None = None
    """Fraction of the text to use for validation; default: the usual one for a named dataset, else 0.05."""
    encoding: Annotated[str, tyro.conf.arg(aliases=["--data.encoding"])] = ""
    """Encoding of text files without a byte order mark, such as cp1252; default: UTF-8."""
    field: Annotated[str, tyro.conf.arg(aliases=["--data.field"])] = ""
    """Field of rows (JSON, CSV, Parquet, Arrow) with the text, or a template such as '{title}\\n\\n{body}'; default: text."""
    separator: Annotated[str, tyro.conf.arg(aliases=["--data.separator"])] = ""
    """What separates the documents of a text file, such as '<|endoftext|>' or '\\n\\n'; default: each file is one document."""
    stream: Annotated[bool, tyro.conf.arg(aliases=["--data.stream"])] = False
    """Read a dataset on the hub over the network each time, and keep no copy of its files on disk."""
    workers: int | None = None
    """Tokenizer processes; default: one per core for long text, up to a limit. The result does not depend on it."""
    shard: Annotated[str | None, tyro.conf.arg(metavar="I/N")] = None
    """Prepare part I of N, with I from 1 to N, of the source, for example on another machine; `bardling data merge` joins the
    parts."""


def run(argv: Sequence[str]) -> None:
    options = parse(PrepareOptions, argv, prog="bardling prepare", description="Tokenize text into a dataset folder.")
    from bardling.cli.info import show_dataset
    from bardling.data.text.named_datasets import DEFAULTS
    from bardling.data.text.parts import parse_shard
    from bardling.data.text.standard_input import standard_input
    from bardling.data.tokens.dataset import reading
    from bardling.data.tokens.journal import work_folder
    from bardling.data.tokens.prepare import prepare

    tokenizer, val_fraction = DEFAULTS.get(options.source, (DataConfig.tokenizer, DataConfig.val_fraction))
    config = DataConfig(
        source=options.source,
        tokenizer=tokenizer if options.tokenizer is None else options.tokenizer,
        val_fraction=val_fraction if options.val_fraction is None else options.val_fraction,
        encoding=options.encoding,
        field=options.field,
        separator=options.separator,
        stream=options.stream,
    )
    settings = {**reading(config), "val_fraction": config.val_fraction, "workers": options.workers}
    settings["shard"] = None if options.shard is None else parse_shard(options.shard)
    try:
        with standard_input(config.source) as source:
            dataset = prepare(source, options.out, config.tokenizer, **settings)
    except KeyboardInterrupt:
        if work_folder(options.out).exists():
            tell(f"partial work is kept in {work_folder(options.out)}: run the same command to continue")
        raise
    show_dataset(dataset)
