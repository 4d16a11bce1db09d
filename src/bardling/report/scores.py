"""Scores of several checkpoints over the steps: one panel per metric, one line per run, with standard errors."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bardling.report.curve import add_legend, check_image_path, distinct_names, new_figure, save_figure, set_plain, style_axes

_COLUMNS = 3


class Point(NamedTuple):
    """One metric of one checkpoint."""

    metric: str
    run: Path
    step: int
    value: float
    stderr: float | None


def draw_scores(points: Sequence[Point], out: Path) -> None:
    """Draw `points` into `out` (.png, .svg or .pdf).

    Raises:
        UserError: matplotlib is missing, or `out` cannot be used (see `check_image_path`).
    """
    check_image_path(out)
    metrics, runs = (list(dict.fromkeys(names)) for names in zip(*((point.metric, point.run) for point in points), strict=True))
    across = min(len(metrics), _COLUMNS)
    down = -(-len(metrics) // across)
    figure = new_figure(4.5 * across + 1, 3.2 * down + 0.5)
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for axes in panels[len(metrics) :]:
        axes.set_visible(False)
    for axes, metric in zip(panels, metrics, strict=False):
        drawn = []
        for number, run in enumerate(runs):
            own = sorted(point for point in points if (point.metric, point.run) == (metric, run))
            if own:
                steps, values = [point.step for point in own], [point.value for point in own]
                errors = [point.stderr or 0.0 for point in own]
                axes.errorbar(steps, values, errors, fmt="o-", color=f"C{number}", markersize=4, capsize=2, label="run")
                drawn.append(run)
        axes.set_xlabel("step")
        set_plain(axes.set_ylabel("metric"), metric)
        style_axes(axes)
        if len(runs) > 1:
            add_legend(axes, [distinct_names(runs)[runs.index(run)] for run in drawn])
    save_figure(figure, out)
