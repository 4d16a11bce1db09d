"""`bardling eval MODEL...`: loss, perplexity and bits per byte on text, compared with gzip and xz; scores on tasks."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from bardling.cli.parse import parse, require_options
from bardling.cli.tables import columns, print_rows, show_table
from bardling.config import DataConfig
from bardling.errors import UserError

if TYPE_CHECKING:
    from bardling.checkpoint.run_folder import RunFolder
    from bardling.data.tokens.shards import TokenDataset
    from bardling.tools.scores import Measured, Wanted

Rows = list[tuple[str, str]]


@dataclass(frozen=True)
class EvalOptions:
    models: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="MODEL [MODEL ...]")]]
    """A run, a checkpoint (RUN@step-000400, RUN@best; RUN@all: each of them), a model folder, gpt2 or USER/REPO on the hub, or
    a nanoGPT or nano-gpt checkpoint. Several models make a table."""
    data: str | None = None
    """Text to evaluate on: whole files, or the validation split of a named or prepared dataset; default: that of the run."""
    encoding: Annotated[str, tyro.conf.arg(aliases=["--data.encoding"])] = ""
    """Encoding of the text files of --data without a byte order mark, such as cp1252; default: UTF-8."""
    field: Annotated[str, tyro.conf.arg(aliases=["--data.field"])] = ""
    """Field of the rows of --data that contains the text, or a template such as '{title}\\n\\n{body}'; default: text."""
    separator: Annotated[str, tyro.conf.arg(aliases=["--data.separator"])] = ""
    """What separates the documents in text files of --data; default: each file is one document."""
    windows: int | None = None
    """Number of sequences to use, evenly spaced; default: all."""
    stride: int | None = None
    """Sliding-window evaluation: sequences begin this many tokens apart, and each token is scored once, with at least the
    model's context minus this many tokens before it; default: sequences that do not overlap."""
    batch_size: int = 16
    """Sequences per forward pass."""
    tasks: tuple[str, ...] = ()
    """Tasks: 'hellaswag', JSON Lines or JSON files in the same format, lm-eval:NAME for a task of the language model
    evaluation harness (or the YAML file of one), core:FOLDER for DCLM's CORE."""
    task_items: int | None = None
    """Number of items per task, a random but fixed subset; default: those that a run measures in training, else all."""
    out: Path | None = None
    """With several checkpoints of runs: also draw their scores over the steps into this image (.png, .svg, .pdf)."""
    device: str = "auto"
    """'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of matrix multiplications."""
    weights: Literal["auto", "float32", "bfloat16", "int8"] = "float32"
    """Dtype of the weights: int8 or bfloat16 as `sample --weights` computes; auto: the fastest here."""
    best: bool = False
    """Use the checkpoint with the lowest validation loss instead of the latest."""


def run(argv: Sequence[str]) -> None:
    options = parse(EvalOptions, argv, prog="bardling eval", description="Evaluate models on validation text and on tasks.")
    require_options(1, options, "windows", "stride", "batch_size", "task_items")
    from bardling.checkpoint.load import checkpoint_specs
    from bardling.distributed.context import distributed
    from bardling.distributed.device import choose_precision
    from bardling.evaluate.benchmarks import check_spec
    from bardling.generation.weights import choose_weights
    from bardling.tools.scores import Wanted, measure

    if not options.models:
        raise UserError("missing MODEL (see --help)")
    if options.stride is not None and options.windows is not None:
        raise UserError(f"--windows {options.windows}: cannot be combined with --stride, which covers the whole text: omit one")
    for task in options.tasks:
        check_spec(task)
    names = [name for model in options.models for name in checkpoint_specs(model)]
    steps = _steps(options, names)
    wanted = Wanted(
        options.data,
        DataConfig(encoding=options.encoding, field=options.field, separator=options.separator),
        options.windows,
        options.stride,
        options.batch_size,
        options.tasks,
        options.task_items,
        options.weights,
    )
    with distributed(options.device) as context:
        precision = choose_precision(options.precision, context.device)
        weights, why = choose_weights(options.weights, context.device)
        found = [measure(name, wanted, precision, context, best=options.best) for name in names]
        if not context.is_primary:
            return
        rows = _rows(found[0]) if len(found) == 1 else []
        if len(found) > 1:
            _print_table(found)
        rows += _about_data(found, wanted)
        rows.append(("precision", f"{precision.name} ({precision.why})"))
        print_rows(rows if options.weights == "float32" else [*rows, ("weights", f"{weights} ({why})")])
        if options.out is not None:
            _draw(options.out, found, steps)


def _steps(options: EvalOptions, names: Sequence[str]) -> dict[str, int]:
    """The steps of the models that are checkpoints of a run, if they are to be drawn."""
    if options.out is None:
        return {}
    from bardling.checkpoint.load import step_of
    from bardling.report.curve import check_image_path

    check_image_path(options.out)  # before anything slow
    known = {name: step for name in names if (step := step_of(name, best=options.best)) is not None}
    if len(known) < 2:
        raise UserError(f"--out {options.out}: needs several checkpoints of a run: name them, or use RUN@all")
    return known


def _rows(measured: "Measured") -> Rows:
    """What one model has reached."""
    rows: Rows = []
    if (loss := measured.loss) is not None:
        rows += [("loss", f"{loss.loss:.4f} nats per token"), ("perplexity", f"{loss.perplexity:.2f}")]
        if loss.bits_per_byte is not None:
            rows.append(("bits per byte", f"{loss.bits_per_byte:.4f}"))
        for name, one in loss.sources.items():
            bits = "" if one.bits_per_byte is None else f", {one.bits_per_byte:.4f} bits per byte"
            rows.append((f"  {name}", f"{one.loss:.4f} nats per token{bits}"))
    for scores in measured.scores:
        name = scores.task
        for metric in scores.metrics:
            error = "" if metric.stderr is None else f" ± {metric.stderr:.4f}"
            rows.append((name, f"{metric.value:.4f}{error} {metric.note}"))
            name = ""
        rows += [("", note) for note in scores.notes]
    return rows


def _metrics(measured: "Measured") -> "dict[str, tuple[float, float | None]]":
    """Every result of a model with its standard error, by the name of its column."""
    found: dict[str, tuple[float, float | None]] = {}
    if (loss := measured.loss) is not None:
        found |= {"loss": (loss.loss, None), "perplexity": (loss.perplexity, None)}
        if loss.bits_per_byte is not None:
            found["bits per byte"] = (loss.bits_per_byte, None)
    for scores in measured.scores:
        named = [metric for metric in scores.metrics if metric.name]
        found |= {f"{scores.task} {metric.name}": (metric.value, metric.stderr) for metric in named}
    return found


def _print_table(found: "Sequence[Measured]") -> None:
    results = [_metrics(measured) for measured in found]
    names = list(dict.fromkeys(name for result in results for name in result))
    table = columns("model", *names)
    for measured, result in zip(found, results, strict=True):
        cells = []
        for name in names:
            value, error = result.get(name, (None, None))
            cells.append("" if value is None else f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}"))
        table.add_row(measured.model, *cells)
    show_table(table)


def _about_data(found: "Sequence[Measured]", wanted: "Wanted") -> Rows:
    """On what the losses were measured, and what compressors reach there."""
    from bardling.report.compression import compressor_bits_per_byte

    rows: Rows = []
    datasets = {_identity(measured.dataset): measured for measured in found if measured.dataset is not None}
    for number, measured in enumerate(datasets.values()):
        dataset, loss = measured.dataset, measured.loss
        assert dataset is not None
        assert loss is not None
        whole = wanted.windows is None and not dataset.manifest.holds_conversations  # measured in their answers
        if whole and (number == 0 or wanted.data is None):  # else it is the same text in other tokens
            indent, baselines = "  " if len(found) == 1 else "", compressor_bits_per_byte(dataset).items()
            rows += [(f"{indent}{name}", f"{bits:.4f} bits per byte on the same text") for name, bits in baselines]
        rows.append(("measured on", f"{loss.tokens:,} tokens of {dataset.validation_title}"))
        if wanted.data is not None and measured.run is not None:
            rows.append(("overlap", _overlap(dataset, measured.run)))
    return rows


def _identity(dataset: "TokenDataset") -> tuple[str, ...]:
    """What tells validation texts apart; mixtures of other files may have the same names."""
    from bardling.data.tokens.corpus import parts_of

    return (dataset.validation_title, *(part.dataset.fingerprint for part in parts_of(dataset, "val")))


def _draw(out: Path, found: "Sequence[Measured]", steps: dict[str, int]) -> None:
    from bardling.report.scores import Point, draw_scores

    points = [
        Point(name, measured.run.path if measured.run is not None else Path(), steps[measured.model], *value)
        for measured in found
        if measured.model in steps
        for name, value in _metrics(measured).items()
        if name != "perplexity"
    ]
    draw_scores(points, out)
    print(out)


def _overlap(dataset: "TokenDataset", run: "RunFolder") -> str:
    """How much of the text was also training text of the run that the model belongs to."""
    from bardling.data.tokens.corpus import recorded_corpus
    from bardling.evaluate.overlap import MOST_TOKENS, training_overlap

    trained = recorded_corpus(run.trained_config().data, run.dataset_record())
    if trained is None:
        return f"unknown, because the training tokens of {run.path} are gone"
    training = trained.split("train")
    if training.row:  # documents are in another order there, and long ones are cut
        return f"unknown, because the training text of {run.path} is packed into rows"
    part = "" if len(training) <= MOST_TOKENS else f" (in its first {MOST_TOKENS:,} tokens)"
    return f"{training_overlap(dataset.split('val'), training):.1%} of this text is also training text of {run.path}{part}"
