"""Does what is measured of the matrices go with robustness? Rank correlations over the cells of one sparsity."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import norm, spearmanr

from tscnc_hf.artifact.card.formatting import number
from tscnc_hf.method.reports.report import markdown_table
from tscnc_hf.training.ablation.comparison import by_arm


MEASURES = {
    "median_kappa": "median effective kappa",
    "max_kappa": "largest effective kappa",
    "lost_ranks": "ranks lost",
    "local_lipschitz": "local Lipschitz bound",
}
FEWEST = 6  # cells: with fewer an interval says nothing


@dataclass(frozen=True)
class Correlation:
    """Spearman's rho, in [-1, 1], of `count` pairs, and its 95 % interval [low, high]."""

    rho: float
    low: float
    high: float
    count: int


def rank_correlation(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Correlation:
    """
    Spearman's rho, with ties at their mean rank, and its interval by Fisher's transform with the standard error of
    Bonett and Wright (2000), sqrt((1 + rho^2 / 2) / (n - 3)). Infinite values are the largest.

    Raises:
        ValueError: less than four pairs, not as many of one as of the other, or one that does not vary.
    """
    if len(a) != len(b) or len(a) < 4:
        raise ValueError(f"{len(a)} and {len(b)} values: pairs need as many of both, and four at least")
    if len(set(a)) < 2 or len(set(b)) < 2:
        raise ValueError("all values of a side are the same: there is nothing to rank")
    rho = float(spearmanr(a, b).statistic)
    if abs(rho) >= 1 - 1e-12:
        return Correlation(round(rho), round(rho), round(rho), len(a))
    half = norm.ppf(0.5 + confidence / 2) * math.sqrt((1 + rho**2 / 2) / (len(a) - 3))
    return Correlation(rho, math.tanh(math.atanh(rho) - half), math.tanh(math.atanh(rho) + half), len(a))


def correlation_markdown(rows: Iterable[Mapping], attack: str) -> str:
    """
    One line a model and sparsity of pruned cells, all arms and seeds: rho of the accuracy under `attack` with each of
    MEASURES, with its 95 % interval. Left out: groups of less than six cells, what was not measured in all of one, and
    what does not vary. Cells of an arm resemble each other, so that intervals are too narrow rather than too wide.
    """
    lines = []
    for (model, sparsity), arms in by_arm(rows).items():
        cells = [row for seeds in arms.values() for row in seeds.values()]
        if sparsity == 0 or len(cells) < FEWEST:
            continue
        robust, line = [row["accuracy"][attack] for row in cells], [model, f"{100 * sparsity:g} %", str(len(cells))]
        for key in MEASURES:
            values = [number(row.get(key)) for row in cells]
            if any(map(math.isnan, values)) or len(set(values)) < 2 or len(set(robust)) < 2:
                line.append("")
                continue
            found = rank_correlation(robust, values)
            line.append(f"{found.rho:+.2f} ({found.low:+.2f} to {found.high:+.2f})")
        lines.append(line)
    if not lines:
        return ""
    return markdown_table(("model", "sparsity", "cells", *MEASURES.values()), lines, text=("model",)) + "\n"
