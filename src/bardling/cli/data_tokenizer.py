"""`bardling data tokenizer SOURCE --tokenizer SPEC`: train a tokenizer on a sample of a source, or measure an existing one."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from bardling.cli.data_check import token_rows
from bardling.cli.parse import parse
from bardling.cli.paths import refuse_existing_file
from bardling.cli.tables import print_rows, show
from bardling.config import DataConfig
from bardling.errors import UserError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


@dataclass(frozen=True)
class TokenizerOptions:
    source: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="SOURCE")]]
    """What data.source accepts."""
    tokenizer: str
    """bpe:SIZE and char are built from the sample; byte, gpt2, a tokenizer.json or a SentencePiece .model are measured."""
    out: Path | None = None
    """File to create with the tokenizer, for data.tokenizer."""
    sample: str = "200MB"
    """The most text to train on, such as 50MB; it is chosen by hashes of the documents of the training split."""
    encoding: Annotated[str, tyro.conf.arg(aliases=["--data.encoding"])] = ""
    """Encoding of text files without a byte order mark, such as cp1252; default: UTF-8."""
    field: Annotated[str, tyro.conf.arg(aliases=["--data.field"])] = ""
    """Field of rows (JSON, CSV, Parquet, Arrow) with the text, or a template such as '{title}\\n\\n{body}'; default: text."""
    separator: Annotated[str, tyro.conf.arg(aliases=["--data.separator"])] = ""
    """What separates the documents of a text file, such as '<|endoftext|>' or '\\n\\n'; default: each file is one document."""
    compare: str = ""
    """Another tokenizer, whose bytes per token are shown too; default: GPT-2's, if this machine has it."""


def run(argv: Sequence[str]) -> None:
    description = "Train a tokenizer on a sample of a source, or measure one."
    options = parse(TokenizerOptions, argv, prog="bardling data tokenizer", description=description)
    from bardling.data.tokens.token_report import local_gpt2
    from bardling.data.tokens.tokenizer import build_tokenizer, check_tokenizer_spec
    from bardling.files.atomic import write_atomically
    from bardling.monitor.progress import ProgressBar
    from bardling.tools.data_tokenizer import Sample, compare

    refuse_existing_file(options.out)
    for spec in filter(None, (options.tokenizer, options.compare)):
        check_tokenizer_spec(spec)
    with ProgressBar(unit="bytes") as bar:
        reading = DataConfig(encoding=options.encoding, field=options.field, separator=options.separator)
        sample = Sample(replace(reading, source=options.source), _bytes(options.sample), bar.update)
        tokenizer = build_tokenizer(options.tokenizer, sample.texts())
        other = build_tokenizer(options.compare, sample.texts()) if options.compare else local_gpt2()
        report = compare(tokenizer, other, sample.measured())
    rows = token_rows(report)
    if other is not None:
        rows.insert(2, ("", f"{report['other_bytes_per_token']:.3f} with {other.name} on the same text"))
    else:
        remedy = (
            "--compare PATH/tokenizer.json compares with a copy of GPT-2's, which `bardling prepare --tokenizer gpt2` fetches"
        )
        rows.insert(2, ("", remedy))
    rows.append(("longest tokens", " ".join(repr(each["text"]) for each in report["longest"])))
    rows += [(f"number {number}", " | ".join(parts) or "not encodable") for number, parts in report["numbers"].items()]
    print_rows(rows, f"tokenizer {options.tokenizer} on {options.source}")
    if options.out is not None:
        write_atomically(options.out, json.dumps(tokenizer.content, ensure_ascii=True).encode() + b"\n")
        show(f"next: bardling prepare {options.source} --tokenizer {options.out} --out DATASET")


def _bytes(text: str) -> int:
    """`50MB` -> 50,000,000."""
    match = re.fullmatch(r"(\d{1,12})\s*([kmg]?)b?", text.strip().lower())
    if not match or not int(match[1]):
        raise UserError(f"--sample {text!r}: must be a size such as 200MB")
    return int(match[1]) * _UNITS[match[2]]
