"""Which weights count and how they are seen as matrices."""

import logging

import pytest
import torch
from torch import nn

from tscnc_hf.method import matrices
from tscnc_hf.method.matrices import register_matrix_view, unknown_weights, weight_matrices


def by_name(model, **options):
    return {record.name: record for record in weight_matrices(model, **options)}


def test_linear_and_convolutions():
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(6, 4),
            "conv": nn.Conv2d(3, 5, (3, 2)),
            "grouped": nn.Conv2d(4, 6, 3, groups=2),
            "depthwise": nn.Conv2d(8, 8, 3, groups=8),
            "conv1d": nn.Conv1d(4, 3, 5),
        }
    )
    records = by_name(model)
    shapes = {name: tuple(record.matrices.shape) for name, record in records.items()}
    assert shapes == {
        "linear.weight": (1, 4, 6),
        "conv.weight": (1, 5, 18),
        "grouped.weight": (2, 3, 18),
        "depthwise.weight": (8, 1, 9),
        "conv1d.weight": (1, 3, 20),
    }


@pytest.mark.parametrize("transpose", [False, True])
def test_a_view_of_a_grouped_convolution_is_the_linear_map_at_one_position(transpose):
    """The blocks of the view, applied to one pixel, give what the layer gives (1x1 kernels: no neighbours)."""
    layer = (nn.ConvTranspose2d if transpose else nn.Conv2d)(4, 6, 1, groups=2, bias=False)
    x = torch.randn(1, 4, 1, 1)
    (record,) = weight_matrices(layer)
    blocks = torch.block_diag(*record.matrices)
    torch.testing.assert_close(blocks @ x.flatten(), layer(x).flatten())


def test_embeddings_norms_biases_and_tokens_do_not_count():
    model = nn.Sequential(nn.Embedding(10, 4), nn.LayerNorm(4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    assert list(by_name(model)) == ["3.weight"]


def test_fused_projections_are_three_matrices():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 24)

    model = Attention()
    records = by_name(model)
    assert records["qkv.weight"].matrices.shape == (3, 8, 8)
    assert torch.equal(records["qkv.weight"].matrices[1], model.qkv.weight[8:16])
    assert records["proj.weight"].matrices.shape == (1, 24, 8)
    attention = by_name(nn.MultiheadAttention(8, 2))
    assert attention["in_proj_weight"].matrices.shape == (3, 8, 8)
    assert attention["out_proj.weight"].matrices.shape == (1, 8, 8)


def test_tied_weights_count_once_and_exclusion_is_by_part_of_the_name():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = nn.ModuleDict({"first": first, "second": second, "head": nn.Linear(4, 2)})
    assert list(by_name(model)) == ["first.weight", "head.weight"]
    assert list(by_name(model, exclude=["head"])) == ["first.weight"]


def test_gradients_flow_through_the_view():
    layer = nn.Conv2d(4, 6, 3, groups=2)
    (record,) = weight_matrices(layer)
    record.matrices.square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, 2 * layer.weight)


def test_an_unknown_layer_is_named_once_and_can_be_registered(caplog, monkeypatch):
    monkeypatch.setattr(matrices, "_VIEWS", dict(matrices._VIEWS))
    monkeypatch.setattr(matrices, "_REPORTED", set())

    class Bilinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 3, 4))

    model = nn.Sequential(Bilinear(), Bilinear())
    with caplog.at_level(logging.WARNING):
        assert by_name(model) == {} and by_name(model) == {}
    assert len(caplog.records) == 1
    assert "Bilinear" in caplog.text and "register_matrix_view(Bilinear" in caplog.text
    register_matrix_view(Bilinear, lambda module, weight: weight)
    assert by_name(model)["1.weight"].matrices.shape == (2, 3, 4)
    with pytest.raises(TypeError, match="torch.nn.Module"):
        register_matrix_view("Bilinear", lambda module, weight: weight)


def test_weights_of_unknown_layers_are_named_whatever_they_are_called(caplog, monkeypatch):
    monkeypatch.setattr(matrices, "_REPORTED", set())
    model = nn.Sequential(nn.GRU(4, 8), nn.Linear(8, 2))
    with caplog.at_level(logging.WARNING):
        assert list(by_name(model)) == ["1.weight"]
    assert "0 (GRU, weight_ih_l0 (24, 4)) is neither constrained nor pruned" in caplog.text
    assert "parameter='weight_ih_l0')" in caplog.text
    assert unknown_weights(model) == dict.fromkeys(
        ["0.weight_ih_l0", "0.weight_hh_l0"], "no matrix view is known for GRU"
    )


def test_a_view_that_fits_no_parameter_or_makes_no_matrices_is_refused(monkeypatch):
    monkeypatch.setattr(matrices, "_VIEWS", dict(matrices._VIEWS))

    class LowRank(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3))

    register_matrix_view(LowRank, lambda module, weight: weight[None], parameter="wieght")
    with pytest.raises(ValueError, match=r"0 \(LowRank\) has no parameter wieght, for which .* it has weight"):
        by_name(nn.Sequential(LowRank()))
    monkeypatch.setitem(matrices._VIEWS, LowRank, {"weight": lambda module, weight: weight})
    with pytest.raises(ValueError, match=r"0.weight: the matrix view of LowRank makes \(4, 3\) of a weight of \(4, 3"):
        _ = by_name(nn.Sequential(LowRank()))["0.weight"].matrices


def test_attention_with_sizes_of_its_own_for_key_and_value():
    attention = by_name(nn.MultiheadAttention(8, 2, kdim=4, vdim=6))
    shapes = {name: tuple(record.matrices.shape) for name, record in attention.items()}
    assert shapes == {
        "q_proj_weight": (1, 8, 8),
        "k_proj_weight": (1, 8, 4),
        "v_proj_weight": (1, 8, 6),
        "out_proj.weight": (1, 8, 8),
    }


def test_a_computed_weight_is_left_out_and_said_so(caplog, monkeypatch):
    monkeypatch.setattr(matrices, "_REPORTED", set())
    model = nn.Sequential(nn.Linear(4, 3), nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    with caplog.at_level(logging.WARNING):
        assert list(by_name(model)) == ["0.weight"]
    assert "1.weight is neither constrained nor pruned: computed from other parameters" in caplog.text


def test_printing_shows_what_takes_part_and_why_the_rest_does_not(monkeypatch):
    monkeypatch.setattr(matrices, "_REPORTED", set())
    tied = nn.Linear(4, 4)
    model = nn.Sequential(
        nn.Linear(4, 4), nn.LayerNorm(4), nn.Embedding(3, 4), nn.Bilinear(2, 2, 2), tied, nn.Linear(4, 9)
    )
    model[4].weight = model[0].weight
    found = weight_matrices(model, exclude=["5."])
    text = str(found)
    assert "  0.weight: (4, 4) as 1 x (4, 4)\nnot:" in text
    for line in (
        "0.bias: (4,), bias, scale, position or token",
        "1.weight: (4,), norm or embedding",
        "2.weight: (3, 4), norm or embedding",
        "3.weight: (2, 2, 2), no matrix view for Bilinear",
        "4.weight: (4, 4), tied to another weight",
        "5.weight: (9, 4), excluded",
    ):
        assert f"  {line}" in text
    assert [record.name for record in found] == ["0.weight"]  # printing did not use it up
