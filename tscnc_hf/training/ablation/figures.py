"""Figures of an ablation: accuracy and condition numbers over sparsity, and one over the other."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

from tscnc_hf.artifact.card.figures import INK, LINES, WIDTH, finish_panel
from tscnc_hf.artifact.card.formatting import format_kappa, number


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure


MARKERS = "osD^vPX*<>"


def over_sparsity_figure(rows: Sequence[Mapping], value: Callable[[Mapping], float], title: str, log: bool) -> Figure:
    """
    One panel a model, one line an arm: the mean over seeds of `value(row)` at each sparsity, every seed as a dot.

    Args:
        rows: of `tscnc_hf.training.ablation.grid`, those of pruned models.
        log: a logarithmic axis, for condition numbers.
    """
    fig, panels, arms = _panels(rows)
    for axes, model, own, levels in panels:
        for index, (arm, theirs) in enumerate(_by(own, "arm").items()):
            shift, style = 0.06 * (index - len(arms) / 2), arms[arm]
            points = {i: [value(row) for row in theirs if row["sparsity"] == level] for i, level in enumerate(levels)}
            points = {i + shift: values for i, values in points.items() if values}
            means = [statistics.fmean(values) for values in points.values()]
            means = [mean if math.isfinite(mean) else math.nan for mean in means]
            axes.plot(list(points), means, lw=1.6, ms=5, label=arm, **style)
            for x, values in points.items():
                axes.scatter([x] * len(values), values, s=9, color=style["color"], alpha=0.45, lw=0)
        axes.set_xticks(range(len(levels)), [f"{100 * level:g} %" for level in levels])
        axes.set_yscale("log" if log else "linear")
        missing = sum(not math.isfinite(value(row)) for row in own)
        label = "zeros among the prunable weights" + (f" ({missing} runs without a finite value)" if missing else "")
        _finish(axes, f"{title}: {model}", label, axes.yaxis if log else None)
    _legend(fig)
    return fig


def scatter_figure(
    rows: Sequence[Mapping], x: Callable[[Mapping], float], y: Callable[[Mapping], float], title: str, label: str
) -> Figure:
    """One panel a model, one dot a run: `y(row)` over `x(row)`, on a logarithmic axis; larger dots are sparser."""
    fig, panels, arms = _panels(rows)
    for axes, model, own, levels in panels:
        for arm, theirs in _by(own, "arm").items():
            style = {key: arms[arm][key] for key in ("color", "marker")}
            shown = [(x(row), y(row), 16 + 16 * levels.index(row["sparsity"])) for row in theirs]
            shown = [point for point in shown if math.isfinite(point[0]) and point[0] > 0]
            if shown:
                axes.scatter(*zip(*shown, strict=True), alpha=0.8, lw=0, label=arm, **style)
        axes.set_xscale("log")
        _finish(axes, f"{title}: {model}", f"{label} (larger: sparser)", axes.xaxis)
    _legend(fig)
    return fig


def own_rows(rows: Iterable[Mapping]) -> list[Mapping]:
    """The rows of pruned models."""
    return [row for row in rows if row["sparsity"] > 0]


def kappa(row: Mapping) -> float:
    return number(row["median_kappa"])


def _panels(rows: Sequence[Mapping]) -> tuple[Figure, list[tuple], dict[str, dict]]:
    """The figure; (axes, model, its rows, their sparsities) of each panel; the style of each arm."""
    from matplotlib.figure import Figure

    models, names = (_by(own_rows(rows), key) for key in ("model", "arm"))
    fig = Figure(figsize=(WIDTH, 3.8), facecolor="white", layout="constrained")
    axes = fig.subplots(1, len(models), squeeze=False)[0]
    panels = [(*one, sorted(_by(one[-1], "sparsity"))) for one in zip(axes, models, models.values(), strict=True)]
    looks = zip(names, cycle(LINES), cycle(MARKERS), strict=False)
    return fig, panels, {name: {"color": color, "marker": marker} for name, color, marker in looks}


def _by(rows: Iterable[Mapping], key: str) -> dict[str, list[Mapping]]:
    groups: dict[str, list[Mapping]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def _legend(fig: Figure) -> None:
    """One for all panels, below them: among many arms there is no free corner."""
    found = {}
    for axes in fig.axes:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    fig.legend(
        found.values(), found.keys(), loc="outside lower center", ncols=5, frameon=False, fontsize=8.5, labelcolor=INK
    )


def _finish(axes: Axes, title: str, label: str, condition_numbers: Axis | None = None) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    finish_panel(axes, title, label)
    if condition_numbers is not None:  # as numbers, where powers of ten would stand
        condition_numbers.set_major_locator(LogLocator(subs=(1, 2, 5)))
        condition_numbers.set_major_formatter(lambda kappa, _: format_kappa(kappa))
        condition_numbers.set_minor_formatter(NullFormatter())
