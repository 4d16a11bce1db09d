"""`bardling data check PATH`: describe a source or dataset, and list what should not be in it."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from bardling.cli.parse import parse
from bardling.cli.paths import refuse_existing_file
from bardling.cli.tables import print_rows, show, styled
from bardling.config import DataConfig
from bardling.monitor.format import count, percent, size_bytes

if TYPE_CHECKING:
    from bardling.data.tokens.split_text import SplitText

_SHOWN = 5  # examples of a finding
_STYLES = {"serious": "bold red", "check": "bold yellow", "note": "bold"}


@dataclass(frozen=True)
class CheckOptions:
    source: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="PATH")]]
    """What data.source accepts: a text file, a folder, a glob, FILE.jsonl[:FIELD], a name, or a prepared dataset."""
    tasks: tuple[str, ...] = ()
    """Look for the items of these tasks in the training text: names or files as for `bardling eval --tasks`."""
    tokenizer: str = ""
    """Also describe the tokens of a sample: byte, char, bpe:SIZE (trained on the sample), gpt2, or a file. A prepared dataset
    has its own."""
    val_fraction: float = DataConfig.val_fraction
    """Fraction of a text that is for validation."""
    encoding: Annotated[str, tyro.conf.arg(aliases=["--data.encoding"])] = ""
    """Encoding of text files without a byte order mark, such as cp1252; default: UTF-8."""
    field: Annotated[str, tyro.conf.arg(aliases=["--data.field"])] = ""
    """Field of rows (JSON, CSV, Parquet, Arrow) with the text, or a template such as '{title}\\n\\n{body}'; default: text."""
    separator: Annotated[str, tyro.conf.arg(aliases=["--data.separator"])] = ""
    """What separates the documents of a text file, such as '<|endoftext|>' or '\\n\\n'; default: each file is one document."""
    dedup: Path | None = None
    """Folder to create with the documents that are no copies of others (documents.jsonl), and a list of those removed."""
    json: Path | None = None
    """File to create with the whole report as JSON."""
    page: Path | None = None
    """File to create with the report as a web page."""
    seed: int = 0
    """Chooses the sequences to decode."""


def run(argv: Sequence[str]) -> None:
    description = "Describe training data, and list what should not be in it."
    options = parse(CheckOptions, argv, prog="bardling data check", description=description)
    from bardling.data.text.standard_input import standard_input
    from bardling.data.tokens.tokenizer import check_tokenizer_spec
    from bardling.files.atomic import write_atomically
    from bardling.monitor.progress import ProgressBar
    from bardling.report.data_page import data_page
    from bardling.tools.data_check import describe, start_check
    from bardling.tools.data_dedup import check_dedup_path, write_clean

    for path in (options.json, options.page):
        refuse_existing_file(path)
    if options.dedup is not None:
        check_dedup_path(options.dedup)
    if options.tokenizer:
        check_tokenizer_spec(options.tokenizer)
    started = time.monotonic()
    with ProgressBar(unit="bytes") as bar, standard_input(options.source) as source:
        check = start_check(_open(options, source), options.tasks, bar.update)
        report: dict[str, Any] = {"source": options.source, **describe(check, options.tokenizer, options.seed)}
        report["seconds"] = round(time.monotonic() - started, 2)
        show_report(report)
        if options.dedup is not None:
            kept, removed = write_clean(check, options.dedup)
            show(f"{options.dedup}: {kept:,} documents, without {removed:,} copies (removed.jsonl lists them)")
    if options.json is not None:
        write_atomically(options.json, json.dumps(report, indent=1, ensure_ascii=False).encode() + b"\n")
    if options.page is not None:
        write_atomically(options.page, data_page(report).encode())
        show(f"page: {options.page}")
    show(_next_step(report, options))


def _open(options: CheckOptions, source: str) -> "SplitText":
    """The text of a source, a dataset or a run."""
    from bardling.data.tokens.split_text import decoded_text, open_split_text

    if (Path(source) / "config.toml").is_file():
        from bardling.checkpoint.run_folder import open_run
        from bardling.data.tokens.corpus import reopen_corpus

        run = open_run(Path(source))
        config = run.trained_config()
        remedy = "check the text itself"
        return decoded_text(reopen_corpus(config.data, run.dataset_record(), run.path, remedy, config.model.block_size))
    reading = DataConfig(encoding=options.encoding, field=options.field, separator=options.separator)
    return open_split_text(replace(reading, source=source, val_fraction=options.val_fraction))


def show_report(report: dict[str, Any]) -> None:
    """Print a report: what was found, and then what the data is."""
    for found in report["findings"]:
        show(styled(f"{found['severity']}: {found['title']}", _STYLES[found["severity"]]))
        show(f"  {found['advice']}")
        for example in found["examples"][:_SHOWN]:
            show("    " + example_line(example)[:200])
        if (more := len(found["examples"][_SHOWN:])) > 0:
            show(f"    ... ({more} more in --json and --page)" if found["count"] > _SHOWN else "")
    if not report["findings"]:
        show("nothing found that should not be in the data")
    print_rows(_facts(report), f"data {report['source']}")


def example_line(example: dict[str, Any]) -> str:
    """`a.txt:12 (as in b.txt): text`."""
    place = example.get("document", "")
    place += f":{example['line']}" if "line" in example else ""
    place += f" (as in {example['twin']})" if example.get("twin") else ""
    return f"{place}: {example['text']}" if place else str(example["text"])


def _facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for split, sizes in report["sizes"].items():
        tokens = f", {report['token_sizes'][split]:,} tokens" if "token_sizes" in report else ""
        documents = f"{sizes['documents']:,} document{'s' * (sizes['documents'] != 1)}"
        text = f"{documents}, {size_bytes(sizes['bytes'])}, {count(sizes['words'])} words{tokens}"
        rows.append(("training" if split == "train" else "validation", text))
    lengths = report["lengths"]
    median, high = count(lengths["median"]), count(lengths["p95"])
    text = f"median about {median}, 95% up to about {high}, longest {lengths['longest']:,} characters"
    rows.append(("documents", text))
    kinds = [f"{kind['name']} {percent(kind['share'])}" for kind in report["kinds"] if kind["share"] >= 0.0005]
    rows.append(("characters", ", ".join(kinds)))
    languages = report["languages"]
    if "missing" in languages:
        rows.append(("languages", languages["missing"]))
    else:
        names = ", ".join(f"{language_name(code)} {percent(share)}" for code, share in languages["shares"])
        rows.append(("languages", f"{names} (a guess for each of {languages['excerpts']:,} excerpts)"))
    if "tokens" in report:
        rows += token_rows(report["tokens"])
    return rows


def token_rows(tokens: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows about the tokens of a text (`token_report`)."""
    of = f" of a sample of {tokens['tokens']:,} tokens" if tokens.get("sample") else ""
    rows = [("tokenizer", f"{tokens['tokenizer']}, {tokens['vocabulary']:,} entries, of which {tokens['used']:,} occur{of}")]
    if tokens["bytes_per_token"]:
        rows.append(("bytes per token", f"{tokens['bytes_per_token']:.3f}"))
    if tokens.get("refused"):
        rows.append(("not encodable", f"{tokens['refused']:,} excerpts; the first: {tokens['reason']}"))
    rows.append(("unknown tokens", f"{tokens['unknown']:.3%}; single bytes of characters {tokens['byte_tokens']:.3%}"))
    rows.append(("frequent tokens", " ".join(repr(each["text"]) for each in tokens["frequent"])))
    return rows


def language_name(code: str) -> str:
    return "no language (code, numbers)" if code == "zxx" else code


def _next_step(report: dict[str, Any], options: CheckOptions) -> str:
    """The last line: what to do next."""
    from bardling.tools.data_dedup import DOCUMENTS

    titles = " ".join(found["title"] for found in report["findings"] if found["severity"] != "note")
    if options.dedup:
        return f"next: bardling data check {options.dedup / DOCUMENTS}"
    if "copies" in titles or "near-duplicates" in titles:
        return f"next: bardling data check {options.source} --dedup CLEAN, then train with --data.source CLEAN/documents.jsonl"
    if titles:
        return "next: remove what is listed above from the text, then check it again"
    if "token_sizes" in report:
        return f"next: bardling train quickstart --data.source {options.source}"
    return f"next: bardling prepare {options.source} --out DATASET"
