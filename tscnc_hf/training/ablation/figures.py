"""Figures of an ablation: accuracy and condition numbers of the arms at each sparsity, and one over the other."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

from tscnc_hf.artifact.card.figures import BLUE, DASHED, INK, LINES, WIDTH, finish_panel
from tscnc_hf.artifact.card.formatting import format_kappa, number
from tscnc_hf.training.ablation.rows import DENSE


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure


MARKERS = "osD^vPX*<>"


def arms_figure(rows: Sequence[Mapping], value: Callable[[Mapping], float], label: str, log: bool) -> Figure:
    """
    One panel a model, one line an arm, under a heading for each sparsity: every seed as a dot, in front of them their
    mean, on a logarithmic axis their median; dashed what the dense network has.

    Args:
        rows: of `tscnc_hf.training.ablation.grid`; those of the shared dense training give the dashed line.
        log: a logarithmic axis, for condition numbers.
    """
    from matplotlib.figure import Figure

    models = _by(own_rows(rows), "model")
    lines = {model: _lines(own) for model, own in models.items()}
    height = 0.9 + 0.2 * max(len(found) for found in lines.values())  # inches
    fig = Figure(figsize=(WIDTH, height), facecolor="white", layout="constrained")
    centre, word = (statistics.median, "median") if log else (statistics.fmean, "mean")
    for axes, (model, found) in zip(fig.subplots(1, len(models), squeeze=False)[0], lines.items(), strict=True):
        dense = _finite(value(row) for row in rows if row["model"] == model and row["arm"] == DENSE)
        if dense:
            axes.axvline(centre(dense), zorder=1, **DASHED)
        for place, (_, theirs) in enumerate(found):
            if values := _finite(map(value, theirs)):
                axes.scatter(values, [place] * len(values), s=14, color=BLUE, alpha=0.4, lw=0, zorder=2)
                axes.scatter(centre(values), place, s=60, color=BLUE, marker="|", lw=2, zorder=3)
        axes.set_yticks(range(len(found)), [text for text, _ in found], fontsize=8.5, color=INK)
        for name, (_, theirs) in zip(axes.get_yticklabels(), found, strict=True):
            name.set_fontweight("normal" if theirs else "bold")
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.set_xscale("log" if log else "linear")
        missing = sum(not math.isfinite(value(row)) for row in models[model])
        shown = f"{label}\n(seeds, {word}" + ("; dashed: dense" if dense else "")
        shown += f"; {missing} runs without a finite value)" if missing else ")"
        _finish(axes, model, shown, axes.xaxis if log else None)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
    return fig


def scatter_figure(
    rows: Sequence[Mapping], x: Callable[[Mapping], float], y: Callable[[Mapping], float], title: str, label: str
) -> Figure:
    """One panel a model, one dot a run: `y(row)` over `x(row)`, on a logarithmic axis; larger dots are sparser."""
    from matplotlib.figure import Figure

    models, arms = (_by(own_rows(rows), key) for key in ("model", "arm"))
    looks = {arm: {"color": color, "marker": marker} for arm, color, marker in zip(arms, cycle(LINES), cycle(MARKERS))}
    fig = Figure(figsize=(WIDTH, 3.8), facecolor="white", layout="constrained")
    for axes, (model, own) in zip(fig.subplots(1, len(models), squeeze=False)[0], models.items(), strict=True):
        levels = sorted(_by(own, "sparsity"))
        for arm, theirs in _by(own, "arm").items():
            shown = [(x(row), y(row), 16 + 16 * levels.index(row["sparsity"])) for row in theirs]
            shown = [point for point in shown if math.isfinite(point[0]) and point[0] > 0]
            if shown:
                axes.scatter(*zip(*shown, strict=True), alpha=0.8, lw=0, label=arm, **looks[arm])
        axes.set_xscale("log")
        _finish(axes, f"{title}: {model}", f"{label} (larger: sparser)", axes.xaxis)
    _legend(fig)
    return fig


def own_rows(rows: Iterable[Mapping]) -> list[Mapping]:
    """The rows of pruned models."""
    return [row for row in rows if row["sparsity"] > 0]


def kappa(row: Mapping) -> float:
    return number(row["median_kappa"])


def _lines(rows: Sequence[Mapping]) -> list[tuple[str, list[Mapping]]]:
    """What stands on each line, and whose rows it shows: none for the headings."""
    lines: list[tuple[str, list[Mapping]]] = []
    for sparsity, theirs in sorted(_by(rows, "sparsity").items()):
        lines += [(f"{100 * sparsity:g} % zeros", []), *_by(theirs, "arm").items()]
    return lines


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


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
        low, high = condition_numbers.get_view_interval()
        steps = (1, 2, 5) if high < 300 * low else (1,)  # in between there is no room for more
        condition_numbers.set_major_locator(LogLocator(subs=steps))
        condition_numbers.set_major_formatter(lambda kappa, _: format_kappa(kappa))
        condition_numbers.set_minor_formatter(NullFormatter())
