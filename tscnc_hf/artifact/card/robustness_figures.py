"""Figures of robustness: accuracy over the radius of the attack, and adversarial examples beside their images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tscnc_hf.artifact.card.figures import (
    BLUE,
    GREEN,
    GREY,
    INK,
    MUTED,
    ORANGE,
    PERCENT,
    WIDTH,
    finish_panel,
    literal,
)
from tscnc_hf.artifact.card.formatting import attack_label, format_percent, format_pixels


if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor


NORMS = {"linf": "L-infinity", "l2": "L2"}


def curve_figure(curve: Mapping[str, Any], dense: Mapping[str, Any] | None = None) -> Figure:
    """Accuracy over epsilon with 95 % bands, from `SecurityCurve.to_dict()`; `dense` is that of a dense twin."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(WIDTH, 3.6), facecolor="white", layout="constrained")
    axes = fig.subplots()
    lines = [(curve, BLUE, "o", "this model")]
    if dense is not None:
        lines.insert(0, (dense, GREY, "s", "dense"))
    for data, colour, marker, label in lines:
        radii = [255 * point["epsilon"] for point in data["points"]]
        low, high = ([point[side] for point in data["points"]] for side in ("low", "high"))
        axes.fill_between(radii, low, high, color=colour, alpha=0.15, lw=0)
        shown = [point["accuracy"] for point in data["points"]]
        axes.plot(radii, shown, color=colour, lw=1.8, marker=marker, ms=5, label=label)
    for point in curve["points"]:
        at = dict(xytext=(3, 6), textcoords="offset points", fontsize=8, color=INK)
        axes.annotate(format_percent(point["accuracy"]), (255 * point["epsilon"], point["accuracy"]), **at)
    axes.set_ylim(-0.03, 1.08)
    axes.set_yticks(*PERCENT)
    label = f"radius of the attack ({NORMS.get(curve['norm'], curve['norm'])}), in steps of 1/255"
    title = f"accuracy under {attack_label(curve['attack'])}, {curve['n']} images"
    finish_panel(axes, title, label, legend=dense is not None)
    return fig


def examples_figure(
    clean: Tensor,
    adversarial: Tensor,
    truth: Sequence[str],
    guesses: Sequence[str],
    attack: str,
    norm: str,
    epsilon: float,
) -> Figure:
    """
    One column an image: clean, under attack, and what was added, its full range stretched over black to white.

    Args:
        clean, adversarial (`Tensor`): pixels (k, c, h, w) in [0, 1], one or three channels, k at least 1.
        truth, guesses (`Sequence[str]`): names of the true class, and of the one predicted under attack.
    """
    from matplotlib.figure import Figure

    count = len(clean)
    fig = Figure(figsize=(WIDTH, 4.4 if count > 4 else 5.6), facecolor="white", layout="constrained")
    grid = fig.subplots(3, count, squeeze=False)
    change = adversarial - clean
    largest = max(float(change.abs().max()), 1e-12)
    rows = (("clean", clean), ("under attack", adversarial), ("what was added", 0.5 + change / (2 * largest)))
    for row, (label, images) in zip(grid, rows, strict=True):
        for axes, image in zip(row, images, strict=True):
            pixels = image.clamp(0, 1).permute(1, 2, 0).numpy()
            grey = pixels.shape[-1] == 1
            axes.imshow(pixels[..., 0] if grey else pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
        row[0].set_ylabel(label, fontsize=9, color=MUTED)
    for column, (true, guess) in enumerate(zip(truth, guesses, strict=True)):
        grid[0][column].set_title(literal(true), fontsize=9, color=INK)
        grid[1][column].set_title(literal(guess), fontsize=9, color=GREEN if guess == true else ORANGE)
    ball = NORMS.get(norm, norm)
    held = sum(true == guess for true, guess in zip(truth, guesses, strict=True))
    title = f"{attack_label(attack)} within {format_pixels(epsilon)}, {ball}: {held} of {count} still named correctly"
    fig.suptitle(title, fontsize=10.5, fontweight="bold", color=INK, x=0.01, ha="left")
    return fig
