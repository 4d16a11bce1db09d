"""Training curves: losses of one or more runs over the number of tokens seen.

All are drawn in bits per byte if all runs have recorded that, else in nats per token: one axis has one unit.
Drawn with `matplotlib` (the `plot` extra), without a display. The image metadata names `bardling report` as the creator:
drawing again replaces such an image, and no other file is ever overwritten.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bardling.checkpoint.run_folder import open_run
from bardling.errors import UserError
from bardling.files.atomic import atomic_file, check_place, os_error_as_user_error, remove_stale_partials
from bardling.monitor.jsonl import metrics, read_jsonl

_CREATOR = "bardling report"  # in the image metadata
_FORMATS = {".png": ("Software", b"\x89PNG\r\n"), ".svg": ("Creator", b"<?xml"), ".pdf": ("Creator", b"%PDF-")}
"""File name suffix -> the metadata key for the creating program, and the file's first bytes."""
_KINDS = ("training", "validation")  # of each run's two curves
_METADATA_RANGE = 4096  # bytes at the start or end of the file in which matplotlib writes the metadata


class Curve(NamedTuple):
    """One line of a figure."""

    tokens: list[float]  # seen (millions)
    values: list[float]


def curve(records: Sequence[dict[str, Any]], kind: str, in_bits: bool) -> Curve:
    """The losses of the records of a kind, in bits per byte or in nats per token.

    A record that does not say how many tokens the run had seen lies between training steps that do.
    """
    trained, chosen = metrics(records, "train"), metrics(records, kind)
    known = sorted((record["step"], record["tokens"]) for record in trained if "tokens" in record)
    steps, seen = zip((0, 0), *known, strict=True)
    tokens = [record.get("tokens", float(np.interp(record["step"], steps, seen))) / 1e6 for record in chosen]
    return Curve(tokens, [record["bits_per_byte" if in_bits else "loss"] for record in chosen])


def has_bits(records: Sequence[dict[str, Any]]) -> bool:
    """Whether every loss is also known in bits per byte, in the current version of that metric."""
    losses = [*metrics(records, "train"), *metrics(records, "val")]
    return bool(losses) and all("bits_per_byte" in record for record in losses)


def smooth(values: Sequence[float], span: int = 10) -> list[float]:
    """Average over about `span` values on each side, weighted exponentially; non-finite values are skipped.

    It fits a line to the weighted values around each place (local linear regression) and takes its value there. An average over
    the values before a place would lag behind a falling loss, and start from a single noisy value; one over all values would be
    biased at the ends, where there are values on one side only.
    """
    if not values:
        return []
    given = np.asarray(values, np.float64)
    known = np.isfinite(given)
    offsets = np.arange(-6 * span, 6 * span + 1)  # beyond, weights are below 0.2%
    weights = (1 - 1 / span) ** np.abs(offsets)

    def moment(power: int, of: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Sum over j of weight(j) j^power of[i + j], for each i."""
        return np.convolve(of, (weights * offsets**power)[::-1], "full")[6 * span : 6 * span + len(given)]

    ones, filled = known.astype(np.float64), np.where(known, given, 0.0)
    s0, s1, s2 = (moment(power, ones) for power in range(3))
    t0, t1 = (moment(power, filled) for power in range(2))
    spread = s0 * s2 - s1 * s1
    line = spread > 1e-9 * s0 * s2  # two values or more
    with np.errstate(divide="ignore", invalid="ignore"):
        fitted = np.where(line, (s2 * t0 - s1 * t1) / spread, t0 / s0)
    return [float(value) for value in np.where(s0 > 0, fitted, given)]


def draw_curves(runs: Sequence[Path], out: Path, *, marks: dict[str, float] | None = None) -> None:
    """Draw the training and validation curves of `runs` into `out` (.png, .svg or .pdf).

    Args:
        marks: named horizontal lines in bits per byte, such as what a compressor reaches on the same text.

    Raises:
        UserError: a run has no metrics yet, matplotlib is missing, or `out` cannot be used (see `check_image_path`).
    """
    check_image_path(out)
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    records, names = [_records(path) for path in runs], distinct_names(runs)
    in_bits = all(map(has_bits, records))
    if marks and not in_bits:
        raise UserError(f"--compressors: not all of {', '.join(map(str, runs))} have bits per byte: omit it, or draw new runs")
    drawn = [_draw_run(axes, own, in_bits, f"C{number}") for number, own in enumerate(records)]
    highest = [value for values in drawn for value in values[len(values) // 20 :]]
    for name, value in (marks or {}).items():
        axes.axhline(value, color="0.4", linestyle=":", linewidth=1)
        axes.annotate(name, (0.005, value), xycoords=("axes fraction", "data"), ha="left", va="bottom", fontsize=9, color="0.3")
    if highest:
        axes.set_ylim(top=max(highest) * 1.05)
    axes.set_xlabel("tokens seen (millions)")
    axes.set_ylabel("bits per byte" if in_bits else "nats per token")
    style_axes(axes)
    add_legend(axes, [f"{name}: {kind}" for name in names for kind in _KINDS])
    save_figure(figure, out)


def new_figure(width: float, height: float) -> Any:
    """A figure of this size (inches); a `UserError` if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("drawing a figure needs the package matplotlib: pip install 'bardling[plot]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def style_axes(axes: Any) -> None:
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)


def add_legend(axes: Any, labels: Sequence[str]) -> None:
    """A legend with `labels` for the labelled lines, in their order."""
    for text, label in zip(axes.legend(frameon=False).get_texts(), labels, strict=True):
        set_plain(text, label)


def set_plain(text: Any, label: str) -> None:
    """Let a text of a figure show a name as it is."""
    text.set_parse_math(False)  # a name is no formula, and may begin with an underscore, which hides a label given earlier
    text.set_text(_drawable(label))


def save_figure(figure: Any, out: Path) -> None:
    """Write a figure to `out`, which has passed `check_image_path`."""
    suffix = out.suffix.lower()
    remove_stale_partials(out)
    with os_error_as_user_error(out, "write"), atomic_file(out) as file:
        figure.savefig(file, format=suffix[1:], dpi=120, metadata={_FORMATS[suffix][0]: _CREATOR})


def _records(path: Path) -> list[dict[str, Any]]:
    run = open_run(path)
    records = read_jsonl(run.metrics_file) if run.metrics_file.exists() else []
    if not any("tokens" in record for record in metrics(records, "train")):
        raise UserError(f"{path}: has no metrics yet: train the run first")
    return records


def _draw_run(axes: Any, records: Sequence[dict[str, Any]], in_bits: bool, colour: str) -> list[float]:
    """Draw one run's curves; returns its training values."""
    training, validation = (curve(records, kind, in_bits) for kind in ("train", "val"))
    axes.plot(*training, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(training.tokens, smooth(training.values), color=colour, linewidth=1.5, label=_KINDS[0])
    style = {"markersize": 4, "linewidth": 1, "markerfacecolor": "white"}
    axes.plot(*validation, "o-", color=colour, **style, label=_KINDS[1])
    return training.values


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
    check_place(out)
    if not out.exists():
        return
    if out.is_file():
        with os_error_as_user_error(out, "read"), out.open("rb") as file:
            start = file.read(_METADATA_RANGE)
            file.seek(-min(_METADATA_RANGE, out.stat().st_size), 2)
            if start.startswith(_FORMATS[suffix][1]) and _CREATOR.encode() in start + file.read():
                return
    raise UserError(f"{out}: already exists and was not drawn by `{_CREATOR}`: remove it, or choose another --out")
