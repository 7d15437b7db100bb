"""Figures of a pruned model: its layers, and how it was trained. Drawn on bare `Figure` objects, never pyplot."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tscnc_hf.artifact.card.formatting import by_layer, format_kappa, format_percent, number, one_line
from tscnc_hf.artifact.files.atomic import atomic_file


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Okabe and Ito's palette: told apart under every common colour blindness, and here also by shape.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY, INK, MUTED, GREY, LIGHT, BAND = "#A9D3EE", "#1F2933", "#66727F", "#97A1AB", "#C9D0D8", "#F4F6F8"
PERCENT = [0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"]  # ticks and what they say
DASHED: dict[str, Any] = dict(color=BLUE, lw=1, ls=(0, (4, 3)), alpha=0.6)
HALO = dict(fc="white", ec="none", pad=0.8, alpha=0.85)  # keeps a line from crossing the letters
LINES = (BLUE, ORANGE, GREEN, PURPLE, INK, MUTED)
WIDTH = 10.0  # inches


def literal(text: str) -> str:
    """A text of somebody else's, such as the name of a class, that matplotlib is not to take for mathematics."""
    return one_line(text).replace("$", r"\$")


def short_names(names: Sequence[str], limit: int = 36) -> list[str]:
    """Readable layer names: without ".weight", the leading parts and the last part that most layers share.

    The names stay unique and in order; a part in front of a block number is kept ("layers.0", not "0").
    """
    plain = [name.removesuffix(".weight") for name in names]
    parts = [name.split(".") for name in plain]
    while heads := Counter(p[0] for p in parts if len(p) > 1):
        first, count = heads.most_common(1)[0]
        shared = [p for p in parts if p[0] == first and len(p) > 1]
        if 2 * count <= len(parts) or any(p[1].isdigit() for p in shared):
            break
        parts = [p[1:] if p[0] == first and len(p) > 1 else p for p in parts]
    last, count = Counter(p[-1] for p in parts).most_common(1)[0]
    if 2 * count > len(parts) > 1 and not last.isdigit():
        parts = [p[:-1] if p[-1] == last and len(p) > 1 else p for p in parts]
    short = [".".join(p) for p in parts]
    short = short if len(set(short)) == len(short) else plain
    cut = [s if len(s) <= limit else f"{s[: limit // 2 - 1]}…{s[-(limit // 2) :]}" for s in short]
    return cut if len(set(cut)) == len(cut) else short


def layer_figure(
    sparsity: Mapping[str, Any], spectrum: Mapping[str, Any], dense: Mapping[str, Any] | None = None
) -> Figure:
    """One line a layer: effective condition number of its matrices (log axis), and its fraction of zeros.

    Args:
        sparsity: a sparsity report as a dict: `rows` with `name` and `sparsity` (fraction of zeros), and totals.
        spectrum: a spectral report as a dict; rows named "x[0]", "x[1]" ... are drawn on the line of layer "x".
        dense: the `{"sparsity", "spectrum"}` of a dense twin, drawn in grey behind.

    Raises:
        ValueError: if neither report has a row.
    """
    from matplotlib.figure import Figure

    rows = {row["name"]: row for row in sparsity["rows"]}
    matrices, twin = by_layer(spectrum), by_layer((dense or {}).get("spectrum"))
    names = [*rows, *(name for name in matrices if name not in rows)]
    if not names:
        raise ValueError("no layer to draw: both reports have empty `rows`; give those of a model with weights")
    labels, count = short_names(names), len(names)
    tall_figure = count > 30
    pitch, top, bottom = (0.215, 1.36, 0.62) if tall_figure else (0.27, 1.16, 0.62)  # inches
    height = top + bottom + pitch * count
    left, right, gap = 0.4 + 0.066 * max(map(len, labels)), 0.85, 0.34
    wide, narrow = (share * (WIDTH - left - right - gap) for share in (0.64, 0.36))
    fig = Figure(figsize=(WIDTH, height), facecolor="white")
    low, tall = bottom / height, pitch * count / height
    kappa = fig.add_axes((left / WIDTH, low, wide / WIDTH, tall), label="condition")
    zeros = fig.add_axes(((left + wide + gap) / WIDTH, low, narrow / WIDTH, tall), label="zeros")
    for axes in (kappa, zeros):
        _prepare(axes, labels, ticks_on_top=tall_figure)
    _draw_condition_numbers(kappa, names, matrices, twin)
    median = number(spectrum.get("median_effective_condition_number"))
    if math.isfinite(median) and median > 0:
        kappa.axvline(median, zorder=1.5, **DASHED)
    kappa.set_yticks(range(count), list(map(literal, labels)), fontsize=8.5, color=INK)
    kappa.set_xlabel("effective condition number (log scale)", fontsize=9, color=MUTED)

    drawn = [i for i, name in enumerate(names) if name in rows]
    values = [rows[names[i]]["sparsity"] for i in drawn]
    zeros.barh(drawn, values, height=0.62, color=SKY, zorder=2, label="zeros")
    zeros.set_xlim(0, 1)
    zeros.set_xticks(*PERCENT)
    zeros.set_xlabel("weights that are zero", fontsize=9, color=MUTED)
    zeros.axvline(sparsity["sparsity"], zorder=2.5, label="median / overall", **DASHED)
    for i, value in zip(drawn, values, strict=True):
        # a column beside the panel, where no bar can run into it; 48 points is the width of "100.0 %" and some air
        at = dict(xytext=(48, 0), textcoords="offset points", ha="right", va="center", annotation_clip=False)
        zeros.annotate(format_percent(value), (1, i), fontsize=8, color=INK, **at)
    for i in set(range(count)) - set(drawn):
        zeros.text(0.02, i, "not pruned", va="center", fontsize=8, color=MUTED)

    _headline(fig, sparsity, spectrum, dense, height)
    look = dict(frameon=False, fontsize=8.5, labelcolor=INK, handletextpad=0.4, columnspacing=1.6, borderaxespad=0)
    corner = (0.2 / WIDTH, 1 - 0.78 / height)
    fig.legend(loc="upper left", bbox_to_anchor=corner, ncols=5, borderpad=0, **look)
    return fig


def _prepare(axes: Axes, labels: Sequence[str], ticks_on_top: bool) -> None:
    axes.set_ylim(len(labels) - 0.5, -0.5)  # the first layer on top, as the image meets it
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=8.5, labelcolor=MUTED, labeltop=ticks_on_top, which="both")
    axes.grid(axis="x", color=LIGHT, lw=0.6)
    axes.set_axisbelow(True)
    end = -0.5
    for index, (_, block) in enumerate(groupby(labels, lambda label: re.sub(r"(\.\d+)\..*", r"\1", label))):
        start, end = end, end + len(list(block))
        if index % 2:  # a light band behind every other block, so that the eye keeps its line
            axes.axhspan(start, end, color=BAND, lw=0, zorder=0)


def _draw_condition_numbers(axes: Axes, names: Sequence[str], matrices: Mapping, twin: Mapping) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log")
    seen, notes, twins, whole, short = [], [], [], [], []
    for i, name in enumerate(names):
        before = [number(row["effective_condition_number"]) for row in twin.get(name, ())]
        now = [(number(row["effective_condition_number"]), row) for row in matrices.get(name, ())]
        finite = [value for value in (*before, *(v for v, _ in now)) if math.isfinite(value) and value > 0]
        seen += finite
        if before and now and len(finite) > 1:
            axes.plot([min(finite), max(finite)], [i, i], color=LIGHT, lw=2.2, solid_capstyle="round", zorder=2)
        lacking = [row for _, row in now if row["rank"] < row["full_rank"]]
        twins += [(value, i) for value in before]
        for value, row in now:
            (short if row in lacking else whole).append((value, i))
        if lacking:
            worst = min(lacking, key=lambda row: row["rank"] / row["full_rank"])
            text = f"rank {worst['rank']}/{worst['full_rank']}" if worst["rank"] else "all zero"
            text += f", {len(lacking)} of {len(now)} blocks" if len(now) > 1 else ""
            notes.append((i, max(finite, default=0.0), text))
    for points, label, look in (
        (whole, "full rank", dict(marker="o", ms=6.5, color=BLUE, mec="white", mew=0.8, zorder=5)),
        (short, "rank deficient (over the non-zero part)", dict(marker="D", ms=6, mfc="white", mec=ORANGE, mew=1.6)),
        (twins, "dense", dict(marker="o", ms=4.5, color=GREY, zorder=3)),
    ):
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **{"ls": "", "zorder": 5} | look)
    low, high = (min(seen), max(seen)) if seen else (1.0, 10.0)
    low, high = math.floor(math.log10(low) * 4 - 0.3) / 4, math.log10(high) + 0.08
    high = max(high, low + 1)  # a decade at least, or the axis has no number on it
    if notes:  # room for the notes to the right of the last marker
        high += 0.28 * (high - low) * max(len(text) for *_, text in notes) / 16
    axes.set_xlim(10**low, 10**high)
    for i, x, text in notes:
        at = dict(xytext=(8, 0), textcoords="offset points", va="center", zorder=4, bbox=HALO)
        axes.annotate(text, (max(x, 10**low), i), fontsize=7.5, color="#A34700", **at)
    axes.xaxis.set_major_locator(
        LogLocator(subs=(1, 2, 5) if high - low < 1.6 else (1, 3) if high - low < 3 else (1,))
    )
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: format_kappa(x)))


def _headline(fig: Figure, sparsity: Mapping, spectrum: Mapping, dense: Mapping | None, height: float) -> None:
    median = format_kappa(spectrum.get("median_effective_condition_number"))
    title = f"{format_percent(sparsity['sparsity'])} sparse, median effective condition number {median}"
    before = ((dense or {}).get("spectrum") or {}).get("median_effective_condition_number")
    if before is not None:
        title += f" (dense: {format_kappa(before)})"
    facts = [
        f"{len(spectrum['rows'])} matrices in {len(by_layer(spectrum))} layers",
        f"largest effective condition number {format_kappa(spectrum.get('max_effective_condition_number'))}",
        f"{spectrum.get('rank_deficient', 0)} rank deficient",
        f"{format_percent(sparsity['parameter_sparsity'])} of all {sparsity['parameters']:,} parameters are zero",
    ]
    fig.text(0.2 / WIDTH, 1 - 0.16 / height, title, fontsize=12.5, fontweight="bold", color=INK, va="top")
    fig.text(0.2 / WIDTH, 1 - 0.46 / height, "  ·  ".join(facts), fontsize=9, color=MUTED, va="top")


def training_figure(log_history: Iterable[Mapping[str, Any]]) -> Figure | None:
    """Loss terms, accuracies and sparsity over optimiser steps, from `trainer.state.log_history`.

    Returns:
        a figure with a panel for each of the three that was logged, or None when none was.
    """
    from matplotlib.figure import Figure

    series: dict[str, list[tuple[float, float]]] = {}
    for entry in log_history:
        for key, value in entry.items():
            if "step" in entry and isinstance(value, int | float) and math.isfinite(value):
                series.setdefault(key, []).append((entry["step"], value))
    terms = [k for k in series if k == "loss" or k.endswith("_loss") and not k.startswith(("eval_", "train_"))]
    accuracies = [k for k in series if k.startswith("eval_") and k.endswith("accuracy")]
    panels = [("loss terms", terms), ("accuracy", accuracies), ("sparsity", [k for k in series if k == "sparsity"])]
    panels = [(title, keys) for title, keys in panels if keys]
    if not panels:
        return None

    fig = Figure(figsize=(WIDTH, 0.5 + 2.3 * len(panels)), facecolor="white", layout="constrained")
    fig.get_layout_engine().set(h_pad=0.1, hspace=0.06)
    grid = fig.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, keys) in zip(grid, panels, strict=True):
        values = [value for key in keys for _, value in series[key]]
        for i, key in enumerate(keys):
            x, y = zip(*series[key], strict=True)
            label = key.removeprefix("eval_").replace("_", " ").removesuffix(" loss")
            mark = "os^DvP"[i % 6] if len(x) <= 40 else None
            axes.plot(x, y, color=LINES[i % 6], lw=1.8, marker=mark, ms=4, label=literal(label))
        if title == "loss terms":
            if min(values) > 0 and max(values) > 50 * min(values):
                axes.set_yscale("log")
        else:
            axes.set_ylim(-0.03, 1.03)
            axes.set_yticks(*PERCENT)
        finish_panel(axes, title, legend=len(keys) > 1)
    grid[-1].set_xlabel("optimiser step", fontsize=9, color=MUTED)
    return fig


def finish_panel(axes: Axes, title: str, label: str = "", legend: bool = False) -> None:
    """The look of a panel with curves, its title and the label of its x axis."""
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK)
    axes.set_xlabel(label, fontsize=9, color=MUTED)
    if legend:  # beside the panel, where no curve can run under it
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=9, labelcolor=INK)
    axes.grid(color=LIGHT, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LIGHT)
    axes.tick_params(which="both", length=0, labelsize=8.5, labelcolor=MUTED)


def save_figure(fig: Figure, path: str | os.PathLike[str], photographs: bool = False) -> Path:
    """
    Write `fig` as a PNG (150 dots per inch); the file appears whole or not at all. Returns the path. One without
    photographs gets the 256 colours that suit it best, which makes the file a third as large.
    """
    with atomic_file(path) as temporary:
        fig.savefig(temporary, format="png", dpi=150)
        if not photographs:
            from PIL import Image

            with Image.open(temporary) as drawn:
                few = drawn.convert("RGB").quantize(256, dither=Image.Dither.NONE)
            few.save(temporary, format="png", optimize=True)
    return Path(path)
