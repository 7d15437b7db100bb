"""Rank correlations of cells: Pearson of ranks, and intervals that cover a known one as often as they say."""

import math

import numpy as np
import pytest

from tscnc_hf.training.ablation.correlation import correlation_markdown, rank_correlation


def row(arm, seed, robust, sparsity=0.99, model="net", **measured):
    usual = {"median_kappa": 2.0 + seed, "max_kappa": 9.0, "lost_ranks": seed}
    return {"model": model, "arm": arm, "sparsity": sparsity, "seed": seed, "accuracy": {"pgd-20": robust}} | (
        usual | measured
    )


def test_ties_share_their_rank_and_infinity_is_the_largest():
    a, b = [3.0, 1.0, 2.0, 2.0, 5.0], [30.0, 10.0, 10.0, 40.0, math.inf]
    ranks = [4, 1, 2.5, 2.5, 5], [3, 1.5, 1.5, 4, 5]
    assert rank_correlation(a, b).rho == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert rank_correlation(a, a) == rank_correlation(b, b) and rank_correlation(a, a).low == 1


def test_an_interval_covers_the_true_value_as_often_as_it_says():
    draws = np.random.default_rng(0)
    true = 6 / math.pi * math.asin(0.6 / 2)  # Spearman's rho of two normal variables with a correlation of 0.6
    covered = 0
    for _ in range(600):
        pairs = draws.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], size=30)
        found = rank_correlation(*pairs.T)
        assert found.low < found.rho < found.high and found.count == 30
        covered += found.low <= true <= found.high
    assert 0.93 <= covered / 600 <= 0.98


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1, 2, 3], [1, 2, 3], "3 and 3 values: .* four at least"),
        ([1, 2, 3, 4], [1, 2, 3], "4 and 3 values"),
        ([1, 1, 1, 1], [1, 2, 3, 4], "nothing to rank"),
    ],
)
def test_what_cannot_be_ranked_is_refused(a, b, message):
    with pytest.raises(ValueError, match=message):
        rank_correlation(a, b)


def test_a_line_for_each_sparsity_with_cells_enough():
    rows = [row(arm, seed, 0.2 + 0.01 * seed, median_kappa=9.0 - seed) for arm in "ab" for seed in range(4)]
    rows += [row("a", 0, 0.3, sparsity=0.0), row("dense", 0, 0.3, sparsity=0.0)]  # dense cells are not compared
    rows += [row("a", seed, 0.2, sparsity=0.5) for seed in range(5)]  # too few
    rows[0] |= {"local_lipschitz": 2.0}  # not measured in all
    (line,) = correlation_markdown(rows, "pgd-20").splitlines()[2:]
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells == ["net", "99 %", "8", "-1.00 (-1.00 to -1.00)", "", "+1.00 (+1.00 to +1.00)", ""]
    assert correlation_markdown(rows[-5:], "pgd-20") == ""
