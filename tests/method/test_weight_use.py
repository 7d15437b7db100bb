"""Layers that multiply with other numbers than they store are told apart, and left out wherever weights count."""

import copy
import types
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from timm.layers import Linear as TimmLinear
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from transformers.models.bit.modeling_bit import WeightStandardizedConv2d
from transformers.models.efficientnet.modeling_efficientnet import EfficientNetDepthwiseConv2d

from tscnc_hf import flops_report, sparsity_report, spectral_report
from tscnc_hf.method import matrices
from tscnc_hf.method.matrices import computed_weights, register_matrix_view, weight_matrices
from tscnc_hf.method.pruning.unit_allocation import unit_allocation
from tscnc_hf.method.reports.lipschitz import lipschitz_product
from tscnc_hf.method.units.gates import attach_gates
from tscnc_hf.method.units.sites import gate_sites
from tscnc_hf.method.units.slimming import cut_dead_units


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        return weight.sign()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Binary(nn.Linear):
    def forward(self, x):
        return F.linear(x, Sign.apply(self.weight), self.bias)


class Scaled(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight * 0.5, self.bias)


class Cosine(nn.Linear):
    def forward(self, x):
        return F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))


class Masked(nn.Conv2d):
    def forward(self, x):
        self.weight.data[:, :, -1] = 0
        return super().forward(x)


class ConvForward(nn.Conv1d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean((1, 2), keepdim=True), bias)


class LowRank(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.down, self.up = nn.Parameter(torch.randn(2, sizes[0])), nn.Parameter(torch.zeros(sizes[1], 2))

    def forward(self, x):
        return super().forward(x) + x @ self.down.mT @ self.up.mT


class Fails(nn.Linear):
    def forward(self, x, scale):
        return super().forward(x) * scale


class FusedActivation(nn.Linear):
    def forward(self, x):
        return F.relu(super().forward(x)) * 2


class Transposed(nn.Linear):
    def forward(self, x):
        return (self.weight.double().view(self.weight.shape) @ x.double().mT).mT.to(x) + self.bias


class Standing(nn.ConvTranspose2d):
    def forward(self, x):
        return F.conv_transpose2d(x, F.softmax(self.weight, 0))


def replaced():
    layer = nn.Linear(4, 3)
    layer.forward = types.MethodType(lambda self, x: F.linear(x, self.weight.tanh()), layer)
    return layer


def harmless():
    layer = nn.Linear(4, 3)
    layer.forward = types.MethodType(lambda self, x: F.linear(x, self.weight, self.bias), layer)
    return layer


def pruned_by_torch():
    layer = nn.Linear(4, 3)
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


COMPUTED = {
    "StdConv2d": lambda: StdConv2d(4, 3, 3),
    "StdConv2dSame": lambda: StdConv2dSame(4, 3, 3),
    "ScaledStdConv2d": lambda: ScaledStdConv2d(4, 3, 3),
    "ScaledStdConv2dSame": lambda: ScaledStdConv2dSame(4, 3, 3),
    "WeightStandardizedConv2d": lambda: WeightStandardizedConv2d(4, 3, 3),
    "binary": lambda: Binary(4, 3),
    "scaled": lambda: Scaled(4, 3, 3),
    "cosine": lambda: Cosine(4, 3),
    "masked": lambda: Masked(4, 3, 3),
    "in _conv_forward": lambda: ConvForward(4, 3, 3),
    "low rank": lambda: LowRank(4, 3),
    "transposed convolution": lambda: Standing(4, 3, 3),
    "takes something else": lambda: Fails(4, 3),
    "replaced forward": replaced,
    "parametrized": lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Conv2d(4, 3, 3)),
    "old weight norm": lambda: nn.utils.weight_norm(nn.Linear(4, 3)),
    "old spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(4, 3)),
    "torch's pruning": pruned_by_torch,
}
AS_THEY_ARE = {
    "Linear": lambda: nn.Linear(4, 3),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2, padding="same"),
    "Conv2dSame": lambda: Conv2dSame(4, 3, 3, stride=2),
    "timm's Linear": lambda: TimmLinear(4, 3),
    "EfficientNet": lambda: EfficientNetDepthwiseConv2d(4, 1, 3),
    "activation": lambda: FusedActivation(4, 3),
    "other dtype and product": lambda: Transposed(4, 3),
    "replaced forward": harmless,
    "parametrized bias": lambda: parametrize.register_parametrization(nn.Linear(4, 3), "bias", nn.Tanh()),
    "half": lambda: TimmLinear(4, 3).to(torch.bfloat16),
    "transposed convolution": lambda: nn.ConvTranspose2d(4, 3, 3),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", COMPUTED)
def test_a_layer_that_computes_its_weight_is_left_out_with_the_reason(kind):
    layer = COMPUTED[kind]()
    state, training = copy.deepcopy(layer.state_dict()), layer.training
    model = nn.Sequential(layer, nn.Linear(4, 3))
    assert [record.name for record in weight_matrices(model)] == ["1.weight"]
    assert computed_weights(model)["0.weight"] and "0.weight" in str(weight_matrices(model))
    report = sparsity_report(model)
    assert report.computed.keys() == {"0.weight"} and [row.name for row in report.rows] == ["1.weight"]
    assert "Not counted: `0.weight`" in report.to_markdown()
    assert {row.name for row in spectral_report(model).rows} == {"1.weight"}
    assert "0.weight" in lipschitz_product(model).unknown
    if kind not in ("masked", "replaced forward"):
        assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    assert layer.training == training


@pytest.mark.parametrize("kind", AS_THEY_ARE)
def test_a_layer_that_takes_its_weight_as_it_is_counts(kind):
    model = nn.Sequential(AS_THEY_ARE[kind]())
    assert [record.name for record in weight_matrices(model)] == ["0.weight"]
    assert computed_weights(model) == {}


def test_zeros_and_trying_do_not_mislead():
    """Where everything is zero, a standardised weight is zero as well."""
    layer = ScaledStdConv2d(4, 3, 3)
    nn.init.zeros_(layer.weight)
    random = torch.get_rng_state()
    assert computed_weights(layer) and torch.equal(torch.get_rng_state(), random)


def test_what_to_do_is_said():
    said = computed_weights(nn.Sequential(pruned_by_torch()))["0.weight"]
    assert "torch.nn.utils.prune.remove" in said
    assert "remove_parametrizations" in computed_weights(COMPUTED["parametrized"]())["weight"]
    assert "Binary multiplies with what it computes" in computed_weights(Binary(4, 3))["weight"]
    assert "could not be tried" in computed_weights(Fails(4, 3))["weight"]


def test_what_cannot_be_copied_is_not_tried_and_another_forward_is_tried_anew():
    layer = FusedActivation(4, 3)
    layer.generator = (number for number in range(3))
    assert "could not be tried" in computed_weights(layer)["weight"]
    layer = FusedActivation(4, 3)
    assert not computed_weights(layer)
    layer.forward = types.MethodType(lambda self, x: F.linear(x, self.weight.tanh()), layer)
    assert computed_weights(layer)


def test_after_removal_the_weight_counts_again():
    layer = pruned_by_torch()
    assert computed_weights(layer)
    prune.remove(layer, "weight")
    assert not computed_weights(layer) and sparsity_report(layer).zeros == 6


def test_who_registers_a_class_says_that_it_counts(monkeypatch):
    monkeypatch.setattr(matrices, "_VIEWS", dict(matrices._VIEWS))
    register_matrix_view(Scaled, lambda module, weight: weight.flatten(1)[None])
    assert [record.name for record in weight_matrices(Scaled(4, 3, 3))] == ["weight"]


def test_neither_gates_nor_units_are_made_of_them():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2, self.conv3 = StdConv2d(3, 4, 3), nn.Conv2d(4, 4, 3), StdConv2d(4, 4, 3)
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.conv3(self.conv2(self.conv1(x)).relu()).mean((2, 3)))

    model = Block().eval()
    assert [site.name for site in gate_sites(model)] == ["conv2"]  # made by one that computes, read as it is
    with pytest.raises(ValueError, match="conv3 can have no gates.*StdConv2d"):
        attach_gates(model, ["conv3"])
    with pytest.raises(ValueError, match="no units.*StdConv2d multiplies"):
        unit_allocation(model, list(weight_matrices(model)))
    with torch.no_grad():
        model.conv3.weight[:, :2] = 0  # of no consequence: it is not what is multiplied with
    x = torch.randn(2, 3, 12, 12)
    slimmed, report = cut_dead_units(model, x)
    assert report.removed == 0 and any("StdConv2d" in row.why for row in report.rows)
    torch.testing.assert_close(slimmed(x), model(x))


def test_operations_of_computed_weights_are_counted_as_dense():
    model = nn.Sequential(StdConv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    for layer in model:
        nn.init.zeros_(layer.weight)
    first, second = flops_report(model, (1, 3, 8, 8)).rows
    assert first.sparse_macs == first.macs > 0 == second.sparse_macs


def test_no_class_of_timm_misleads():
    """Of a BiT the classifier is left; of a network with "same" padding everything."""
    small = {"channels": (16,) * 4, "layers": (1,) * 4, "stem_chs": 8, "num_classes": 2}
    bit = timm.create_model("resnetv2_50", conv_layer=partial(StdConv2d, eps=1e-8), **small)
    assert [record.name for record in weight_matrices(bit)] == ["head.fc.weight"]
    model = timm.create_model("tf_mobilenetv3_small_minimal_100", num_classes=2)
    assert computed_weights(model) == {}
