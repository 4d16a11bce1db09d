"""`bardling report RUN...`: draw training curves, and show what the runs have generated."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from bardling.cli.parse import parse
from bardling.cli.paths import refuse_existing_file


@dataclass(frozen=True)
class ReportOptions:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, drawn in one figure."""
    out: Path | None = None
    """Image to write (.png, .svg, .pdf); default: curve.png in the first run's folder. Replaces an image that this command
    drew earlier, and refuses to overwrite any other file."""
    compressors: bool = False
    """Also draw lines for what gzip -9 and xz -9 reach on the first run's validation text."""
    data: Path | None = None
    """Page (.html) to create about the data of the first run: sizes, lengths, frequent tokens and random sequences."""


def run(argv: Sequence[str]) -> None:
    options = parse(ReportOptions, argv, prog="bardling report", description="Draw the training curves of one or more runs.")
    from bardling.errors import UserError
    from bardling.report.curve import check_image_path, draw_curves

    if not options.runs:
        raise UserError("report: no run given; name at least one run folder")
    out = options.out or options.runs[0] / "curve.png"
    check_image_path(out)  # before anything slow
    refuse_existing_file(options.data)
    marks = {}
    if options.compressors:
        from bardling.checkpoint.run_folder import open_run
        from bardling.data.tokens.corpus import reopen_corpus
        from bardling.report.compression import compressor_bits_per_byte

        run = open_run(options.runs[0])
        trained = run.trained_config()
        record, context = run.dataset_record(), trained.model.block_size
        marks = compressor_bits_per_byte(reopen_corpus(trained.data, record, run.path, "omit --compressors", context))
    draw_curves(options.runs, out, marks=marks)
    for path in options.runs:
        _show_samples(path)
    print(out)
    if options.data is not None:
        _draw_data(options.runs[0], options.data)
        print(options.data)


def _draw_data(path: Path, out: Path) -> None:
    """Write a page about the data of a run."""
    from bardling.checkpoint.run_folder import open_run
    from bardling.data.tokens.corpus import reopen_corpus
    from bardling.files.atomic import write_atomically
    from bardling.report.data_page import data_page
    from bardling.tools.data_check import dataset_report

    run = open_run(path)
    config = run.trained_config()
    dataset = reopen_corpus(config.data, run.dataset_record(), run.path, "omit --data", config.model.block_size)
    write_atomically(out, data_page(dataset_report(dataset, seed=0)).encode())


def _show_samples(path: Path) -> None:
    """Print what a run has generated first and last for each of its prompts."""
    from bardling.checkpoint.run_folder import open_run
    from bardling.files.streams import escape_unprintable
    from bardling.monitor.jsonl import read_jsonl

    run = open_run(path)
    records = read_jsonl(run.samples_file) if run.samples_file.exists() else []
    by_prompt: dict[str, list[tuple[int, str]]] = {}
    for record in records:
        match record:
            case {"prompt": str(prompt), "step": int(step), "texts": [str(text), *_]}:
                by_prompt.setdefault(prompt, []).append((step, text))
    for prompt, samples in by_prompt.items():
        print(f"{escape_unprintable(str(path))}: {prompt!r}")
        for step, text in dict([samples[0], samples[-1]]).items():
            print(f"  step {step:,}: {text.strip()!r}")
