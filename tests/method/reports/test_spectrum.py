"""The spectral report against numpy and matrices of known spectrum."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from tscnc_hf.method.constraints import condition_number_constraint
from tscnc_hf.method.reports.spectrum import matrix_spectrum, singular_values, spectral_report


def test_known_spectrum():
    u, v = torch.linalg.qr(torch.randn(6, 6))[0], torch.linalg.qr(torch.randn(9, 6))[0]
    row = matrix_spectrum("m", (u * torch.tensor([4.0, 3.0, 2.0, 2.0, 1.0, 0.5])) @ v.T)
    assert row.condition_number == pytest.approx(8, rel=1e-5) == row.effective_condition_number
    assert (row.rank, row.full_rank, row.dead_rows) == (6, 6, 0)
    assert row.stable_rank == pytest.approx((16 + 9 + 4 + 4 + 1 + 0.25) / 16, rel=1e-5)


def test_rank_deficient_dead_and_zero():
    matrix = torch.diag(torch.tensor([2.0, 1.0, 0.0, 0.5]))
    row = matrix_spectrum("m", matrix)
    assert math.isinf(row.condition_number) and row.effective_condition_number == pytest.approx(4)
    assert (row.rank, row.full_rank, row.dead_rows, row.dead_columns) == (3, 4, 1, 1)
    zero = matrix_spectrum("z", torch.zeros(3, 5))
    assert (zero.rank, zero.dead_rows, zero.dead_columns, zero.stable_rank) == (0, 3, 5, 0.0) and math.isinf(
        zero.condition_number
    )


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (9, 9), (1, 5)])
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_cnc_column_is_the_constraint(shape, scale):
    matrix = scale * torch.randn(shape, dtype=torch.float64) * (torch.rand(shape) < 0.3)
    assert matrix_spectrum("m", matrix).cnc == pytest.approx(condition_number_constraint(matrix).item(), abs=1e-9)
    assert matrix_spectrum("z", torch.zeros(shape)).cnc == pytest.approx(
        condition_number_constraint(torch.zeros(shape)).item(), abs=1e-5
    )


@pytest.mark.parametrize("kappa, tolerance", [(10.0, 1e-12), (1e3, 1e-9), (9e5, 1e-3)])
def test_gram_method_agrees_with_the_svd_down_to_the_rank_tolerance(kappa, tolerance):
    u, v = torch.linalg.qr(torch.randn(64, 64).double())[0], torch.linalg.qr(torch.randn(200, 64).double())[0]
    sigma = torch.logspace(0, -math.log10(kappa), 64, dtype=torch.float64)
    for matrix in (7 * (u * sigma) @ v.T, 7 * (v * sigma) @ u.T):
        assert singular_values(matrix, "gram").tolist() == pytest.approx((7 * sigma).tolist(), rel=tolerance)
        fast, exact = matrix_spectrum("m", matrix, "gram"), matrix_spectrum("m", matrix)
        assert fast.rank == exact.rank == 64
        assert fast.condition_number == pytest.approx(kappa, rel=10 * tolerance)
    deficient = torch.cat([matrix, matrix[:, :3]], dim=1).T  # 67 x 200 of rank 64
    assert matrix_spectrum("m", deficient, "gram").rank == matrix_spectrum("m", deficient).rank == 64
    with pytest.raises(ValueError, match="'svd' or 'gram'"):
        singular_values(matrix, "lanczos")


def test_report_of_a_model_agrees_with_numpy():
    model = nn.Sequential(nn.Linear(7, 5), nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(6, 6, 3, groups=6))
    report = spectral_report(model)
    assert [row.name for row in report.rows] == ["0.weight", "1.weight[0]", "1.weight[1]"]
    matrices = [model[0].weight, *model[1].weight.reshape(2, 3, 18)]
    kappas = [np.linalg.cond(matrix.detach().numpy().astype(np.float64)) for matrix in matrices]
    assert [row.condition_number for row in report.rows] == pytest.approx(kappas)
    assert report.median_condition_number == pytest.approx(np.median(kappas))
    assert report.max_condition_number == pytest.approx(max(kappas)) and report.rank_deficient == 0


@pytest.mark.parametrize("method", ["svd", "gram"])
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_named(wrong, method):
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 5))
    with torch.no_grad():
        model[1].weight[2, :2] = wrong
    with pytest.raises(ValueError, match=r"^1.weight: 2 of its 25 values are NaN or infinite, .*lower learning rate"):
        spectral_report(model, method=method)


def test_dict_is_plain_json_and_markdown_has_every_matrix():
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 5))
    with torch.no_grad():
        model[1].weight[2] = 0
    report = spectral_report(model)
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert plain["max_condition_number"] == "inf" and plain["rank_deficient"] == 1
    assert (
        plain["rows"][1]["dead_rows"] == 1
        and plain["rows"][1]["dead_columns"] == 0
        and plain["rows"][0]["shape"] == [5, 7]
    )
    assert report.to_markdown().count("\n") == 3 and "4 of 5" in report.to_markdown()
