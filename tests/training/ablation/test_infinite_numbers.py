"""Figures that are infinite, or that a model has nothing for, go through rows, tables, pages and the terminal."""

import json
import math
import time

import pytest
import torch
from torch import nn

from recipes.ablation import say
from tscnc_hf.artifact.card.formatting import format_kappa, format_number
from tscnc_hf.artifact.card.tables import results_table
from tscnc_hf.evaluation.page import comparison_table
from tscnc_hf.evaluation.run import evaluate
from tscnc_hf.training.ablation.comparison import comparison_markdown
from tscnc_hf.training.ablation.grid import _mean


class Pixels:
    image_mean, image_std = [0.0], [1.0]


class Scaled(nn.Module):
    """Two classes, and no matrix at all."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x):
        bright = x.flatten(1).mean(1, keepdim=True) - 0.5
        return torch.cat([-bright, bright], 1) * self.scale


DATA = [{"pixel_values": torch.rand(1, 4, 4), "labels": place % 2} for place in range(12)]


@pytest.mark.parametrize(
    "value, number, kappa",
    [
        ("inf", "∞", "∞"), ("-inf", "-∞", "-∞"), (None, "n/a", "n/a"), ("nan", "n/a", "n/a"), (math.inf, "∞", "∞"),
        (1234.5, "1234", "1,234"), (2.0, "2", "2"), (1e7, "1e+07", "1e7"),
    ],
)  # fmt: skip
def test_one_formatter(value, number, kappa):
    assert format_number(value) == number and format_kappa(value) == kappa


@pytest.mark.parametrize("kappa", ["inf", None, 3.5])
def test_rows_are_said_and_compared_whatever_their_kappa(kappa, capsys):
    row = {
        "model": "m", "arm": "plain", "sparsity": 0.99, "split": "test", "accuracy": {"clean": 0.5, "pgd-20": 0.25},
        "median_kappa": kappa, "max_kappa": "inf", "lost_ranks": 3, "empty_matrices": 1, "seconds": 3.0,
    }  # fmt: skip
    say(row | {"seed": 0, "collapsed": True}, 1, 2, time.perf_counter(), 0)
    assert f"median kappa {format_kappa(kappa)}, 3 ranks lost" in (said := capsys.readouterr().out)
    assert "collapsed" in said
    table = comparison_markdown([row | {"seed": seed} for seed in (0, 1)], "pgd-20")
    assert f"| {format_number(kappa, '.3g')} | ∞ | 3 | 1 |" in table


def test_the_mean_of_infinite_or_no_values_is_json():
    assert _mean([1.0, 3.0]) == 2 and _mean([1.0, math.inf]) == "inf" and _mean([]) is None


def test_a_model_without_matrices_is_evaluated_to_the_end(tmp_path):
    results = evaluate(
        Scaled(), DATA, epsilon=0.1, attacks=("clean", "pgd-2"), processing_class=Pixels, folder=tmp_path,
        progress=False, model_name="scaled", page=True,
    )  # fmt: skip
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results, allow_nan=False))
    assert results["spectrum"]["median_effective_condition_number"] is None
    assert "n/a" in comparison_table({"scaled": results}) and (tmp_path / "robustness.md").is_file()
    reports = {name: results.get(name) for name in ("robustness", "sparsity", "spectrum", "lipschitz")}
    cells = dict(results_table(reports, {}))
    assert cells["Median effective condition number"] == ["n/a"]
    results["lipschitz"] |= {"local_median": "inf", "product_log10": "-inf"}
    cells = dict(results_table(reports, {}))
    assert cells["Local Lipschitz constant, median"] == ["at least ∞"]
    assert cells["Product of spectral norms, log10"] == ["-∞"] and "∞" in comparison_table({"scaled": results})
