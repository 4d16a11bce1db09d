"""Training curves: losses of one or more runs over the number of tokens seen.

Drawn with `matplotlib` (the `plot` extra), without a display. The image metadata names `bardling report` as the creator:
drawing again replaces such an image, and no other file is ever overwritten.
"""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bardling.checkpoint.run_folder import open_run
from bardling.errors import UserError
from bardling.files.atomic import atomic_file, os_error_as_user_error, remove_stale_partials
from bardling.monitor.jsonl import metrics, read_jsonl
from bardling.planning.batching import make_plan

_CREATOR = "bardling report"  # in the image metadata
_FORMATS = {".png": ("Software", b"\x89PNG\r\n"), ".svg": ("Creator", b"<?xml"), ".pdf": ("Creator", b"%PDF-")}
"""File name suffix -> the metadata key for the creating program, and the file's first bytes."""
_KINDS = ("training", "validation")  # of each run's two curves
_METADATA_RANGE = 4096  # bytes at the start or end of the file in which matplotlib writes the metadata


def curve(
    records: Sequence[dict[str, Any]], kind: str, tokens_before: Callable[[int], int]
) -> tuple[list[float], list[float], str]:
    """Tokens seen (millions), values and their unit (bits per byte if known); `tokens_before` counts those before a step."""
    chosen = metrics(records, kind)
    in_bits = bool(chosen) and all(record.get("bits_per_byte") is not None for record in chosen)
    tokens = [tokens_before(record["step"]) / 1e6 for record in chosen]
    values = [record["bits_per_byte"] if in_bits else record["loss"] for record in chosen]
    return tokens, values, "bits per byte" if in_bits else "nats per token"


def smooth(values: Sequence[float], span: int = 10) -> list[float]:
    """Bias-corrected exponential moving average over about `span` values; non-finite values are skipped."""
    decay, average, weight, out = 1 - 1 / span, 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            average, weight = decay * average + (1 - decay) * value, decay * weight + (1 - decay)
        out.append(average / weight if weight else value)
    return out


def draw_curves(runs: Sequence[Path], out: Path, *, marks: dict[str, float] | None = None) -> None:
    """Draw the training and validation curves of `runs` into `out` (.png, .svg or .pdf).

    Args:
        marks: named horizontal lines in bits per byte, such as what a compressor reaches on the same text.

    Raises:
        UserError: a run has no metrics yet, matplotlib is missing, or `out` cannot be used (see `check_image_path`).
    """
    check_image_path(out)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("drawing a figure needs the package matplotlib: pip install 'bardling[plot]'") from None
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    names = distinct_names(runs)
    drawn = [_draw_run(axes, path, f"C{number}") for number, path in enumerate(runs)]
    highest = [value for values, _ in drawn for value in values[len(values) // 20 :]]
    for name, value in (marks or {}).items():
        axes.axhline(value, color="0.4", linestyle=":", linewidth=1)
        axes.annotate(name, (0.005, value), xycoords=("axes fraction", "data"), ha="left", va="bottom", fontsize=9, color="0.3")
    if highest:
        axes.set_ylim(top=max(highest) * 1.05)
    axes.set_xlabel("tokens seen (millions)")
    axes.set_ylabel(" / ".join(sorted({unit for _, unit in drawn})))
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    legend = axes.legend(frameon=False)
    for text, label in zip(legend.get_texts(), (f"{name}: {kind}" for name in names for kind in _KINDS), strict=True):
        text.set_parse_math(False)  # a name is no formula, and may begin with an underscore, which hides a label given earlier
        text.set_text(_drawable(label))
    suffix = out.suffix.lower()
    remove_stale_partials(out)
    with os_error_as_user_error(out, "write"), atomic_file(out) as file:
        figure.savefig(file, format=suffix[1:], dpi=120, metadata={_FORMATS[suffix][0]: _CREATOR})


def _draw_run(axes: Any, path: Path, colour: str) -> tuple[list[float], str]:
    """Draw one run's curves; returns its training values and their unit."""
    run = open_run(path)
    config = run.config()
    records = read_jsonl(run.metrics_file) if run.metrics_file.exists() else []
    if not records:
        raise UserError(f"{path}: has no metrics yet: train the run first")
    plan = make_plan(config.train, config.model.block_size, 1)
    tokens, values, unit = curve(records, "train", plan.tokens_before)
    axes.plot(tokens, values, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(tokens, smooth(values), color=colour, linewidth=1.5, label=_KINDS[0])
    tokens, validation, _ = curve(records, "val", plan.tokens_before)
    style = {"markersize": 4, "linewidth": 1, "markerfacecolor": "white"}
    axes.plot(tokens, validation, "o-", color=colour, **style, label=_KINDS[1])
    return values, unit


def distinct_names(runs: Sequence[Path]) -> list[str]:
    """The names of run folders, with as many parent folders as tell them apart."""
    paths = [Path(os.path.abspath(path)) for path in runs]  # noqa: PTH100  keeps links, removes "."
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    return names


def _drawable(label: str) -> str:
    """`label`, with an escape sequence for each character that the font lacks."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    known = get_font(findfont(FontProperties())).get_charmap()
    return "".join(c if ord(c) in known else c.encode("unicode_escape").decode() for c in label)


def check_image_path(out: Path) -> None:
    """Raise a `UserError` unless `out` has the suffix of an image format and is new, or was drawn by `bardling report`."""
    suffix = out.suffix.lower()
    if suffix not in _FORMATS:
        raise UserError(f"{out}: is not an image file name: use a name that ends in {', '.join(_FORMATS)}")
    if not out.exists():
        return
    if out.is_file():
        with os_error_as_user_error(out, "read"), out.open("rb") as file:
            start = file.read(_METADATA_RANGE)
            file.seek(-min(_METADATA_RANGE, out.stat().st_size), 2)
            if start.startswith(_FORMATS[suffix][1]) and _CREATOR.encode() in start + file.read():
                return
    raise UserError(f"{out}: already exists and was not drawn by `{_CREATOR}`: remove it, or choose another --out")
