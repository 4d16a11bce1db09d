"""The training curve: losses of one or several runs over the tokens they have seen.

Drawn with `matplotlib` (the `plot` extra), without a display. A picture says within itself who drew it, so that drawing
the same curve again replaces it, and nothing else is ever overwritten.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bardling.checkpoint.runfolder import open_run
from bardling.errors import UserError
from bardling.files import remove_abandoned, replacing, told_plainly
from bardling.monitor.jsonl import figures, read_jsonl
from bardling.train.plan import make_plan

_DRAWN_BY = "bardling report"  # in a picture's metadata
_KINDS = {".png": ("Software", b"\x89PNG\r\n"), ".svg": ("Creator", b"<?xml"), ".pdf": ("Creator", b"%PDF-")}
"""For each kind of picture the metadata's name for the program, and how a file begins."""
_ENDS = 4096  # bytes at a picture's beginning or end in which matplotlib writes the metadata


def curve(
    records: Sequence[dict[str, Any]], kind: str, tokens_before: Callable[[int], int]
) -> tuple[list[float], list[float], str]:
    """Points of one run: tokens (millions), values, and the values' unit (bits per byte where known, else nats a token).

    Args:
        tokens_before: tokens that so many steps have seen.
    """
    chosen = figures(records, kind)
    in_bits = bool(chosen) and all(record.get("bits_per_byte") is not None for record in chosen)
    tokens = [tokens_before(record["step"]) / 1e6 for record in chosen]
    values = [record["bits_per_byte"] if in_bits else record["loss"] for record in chosen]
    return tokens, values, "bits per byte" if in_bits else "nats a token"


def smooth(values: Sequence[float], span: int = 10) -> list[float]:
    """Exponential moving average over about `span` values, without the bias of its start; gaps (NaN) are stepped over."""
    decay, average, weight, out = 1 - 1 / span, 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            average, weight = decay * average + (1 - decay) * value, decay * weight + (1 - decay)
        out.append(average / weight if weight else value)
    return out


def draw_curves(runs: Sequence[Path], out: Path, *, marks: dict[str, float] | None = None) -> None:
    """Draw the training and validation curves of `runs` into `out` (.png, .svg or .pdf).

    Args:
        marks: horizontal lines by name, in bits per byte: what a compressor reaches on the same text, say.

    Raises:
        UserError: no figures yet, matplotlib is missing, or `out` is no place for the picture (`check_picture`).
    """
    check_picture(out)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("figures need matplotlib: pip install 'bardling[plot]'") from None
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    units = set()
    highest: list[float] = []
    for number, path in enumerate(runs):
        run = open_run(path)
        config = run.config()
        records = list(read_jsonl(run.metrics_file)) if run.metrics_file.exists() else []
        if not records:
            raise UserError(f"{path}: has no figures yet")
        plan = make_plan(config.train, config.model.block_size, 1)
        colour = f"C{number}"
        tokens, values, unit = curve(records, "train", plan.tokens_before)
        axes.plot(tokens, values, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(tokens, smooth(values), color=colour, linewidth=1.5, label=f"{path.name}: training")
        seen, validation, _ = curve(records, "val", plan.tokens_before)
        axes.plot(
            seen,
            validation,
            "o-",
            color=colour,
            markersize=4,
            linewidth=1,
            markerfacecolor="white",
            label=f"{path.name}: held out",
        )
        units.add(unit)
        highest += values[len(values) // 20 :]
    for name, value in (marks or {}).items():
        axes.axhline(value, color="0.4", linestyle=":", linewidth=1)
        axes.annotate(name, (0.005, value), xycoords=("axes fraction", "data"), ha="left", va="bottom", fontsize=9, color="0.3")
    if highest:
        axes.set_ylim(top=max(highest) * 1.05)
    axes.set_xlabel("tokens seen (millions)")
    axes.set_ylabel(" / ".join(sorted(units)))
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    kind = out.suffix.lower()
    remove_abandoned(out)
    with told_plainly(out, "write"), replacing(out) as file:
        figure.savefig(file, format=kind[1:], dpi=120, metadata={_KINDS[kind][0]: _DRAWN_BY})


def check_picture(out: Path) -> None:
    """Make sure that a picture can be written to `out` and overwrites at most one that was drawn here.

    Raises:
        UserError: its name's ending is of no kind of picture, or what is there was not drawn by `bardling report`.
    """
    kind = out.suffix.lower()
    if kind not in _KINDS:
        raise UserError(f"{out}: is no name for a picture: let --out end in {', '.join(_KINDS)}")
    if not out.exists():
        return
    if out.is_file():
        with told_plainly(out, "read"), out.open("rb") as file:
            begin = file.read(_ENDS)
            file.seek(-min(_ENDS, out.stat().st_size), 2)
            if begin.startswith(_KINDS[kind][1]) and _DRAWN_BY.encode() in begin + file.read():
                return
    raise UserError(f"{out}: exists already and was not drawn by `{_DRAWN_BY}`: remove it, or choose another --out")
