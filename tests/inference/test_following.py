"""Which activations are told from the ones that kernels compute."""

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from tscnc_hf.inference.following import UNSEEN, activation_of, calls_of, chain_after


class Of(nn.Module):
    """A module of somebody's own."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


KNOWN = [
    (nn.Identity(), "none"),
    (nn.Dropout(0.5), "none"),
    (timm.layers.DropPath(0.5), "none"),
    (ACT2FN["linear"], "none"),
    (nn.ReLU(), "relu"),
    (nn.ReLU(inplace=True), "relu"),
    (ACT2FN["relu"], "relu"),
    (Of(lambda x: x.clamp(min=0)), "relu"),
    (Of(lambda x: x * (x > 0)), "relu"),
    (nn.GELU(), "gelu"),
    (timm.layers.GELU(), "gelu"),
    (ACT2FN["gelu"], "gelu"),
    (ACT2FN["gelu_python"], "gelu"),
    (Of(lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5))), "gelu"),
    (nn.SiLU(), "silu"),
    (timm.layers.Swish(), "silu"),
    (ACT2FN["silu"], "silu"),
    (Of(lambda x: x * torch.sigmoid(x)), "silu"),
]


@pytest.mark.parametrize("module, name", KNOWN, ids=lambda part: part if isinstance(part, str) else repr(part))
def test_what_kernels_compute_is_known(module, name):
    assert activation_of(module.eval()) == name


CLIPPED = [
    *(nn.Hardtanh(0, cap) for cap in (10.0, 64.0, 1e3, 1e6, 1e30)),
    *(nn.Hardtanh(-cap, cap) for cap in (10.0, 100.0, 1e4, 1e20)),
    nn.ReLU6(),
    ACT2FN["gelu_10"],
    Of(lambda x: F.silu(x).clamp(max=20.0)),
    Of(lambda x: x.clamp(min=-50.0)),
    nn.Threshold(-10, 0),
    nn.Threshold(0.005, 0),
    nn.Hardshrink(0.001),
    nn.LeakyReLU(1e-3),
    nn.Softplus(beta=1000),
    nn.Hardswish(),
    nn.GELU("tanh"),
]


@pytest.mark.parametrize("module", CLIPPED, ids=repr)
def test_what_is_clipped_somewhere_is_not(module):
    x = torch.cat([torch.logspace(-4, 33, 300), -torch.logspace(-4, 33, 300)])
    plain = (x, F.relu(x), F.gelu(x), F.silu(x))
    assert all((module(x) - y).abs().max() > 1e-4 for y in plain)  # it does compute something else
    assert activation_of(module) is None


def test_what_takes_something_else_is_none_of_them():
    assert activation_of(Of(lambda x: x.flatten(1))) is None
    assert activation_of(Of(lambda x: (x, x))) is None
    assert activation_of(nn.Bilinear(2, 2, 2)) is None


class Read(nn.Module):
    """A layer whose output a module gets, and what `elsewhere` says, if anything."""

    def __init__(self, elsewhere):
        super().__init__()
        self.lin, self.act, self.elsewhere = nn.Linear(4, 4), nn.ReLU(), elsewhere

    def forward(self, x):
        y = self.lin(x)
        return self.elsewhere(y, self.act(y))


@pytest.mark.parametrize(
    "elsewhere, followed",
    [
        (lambda y, z: z, ["act"]),
        (lambda y, z: z * y.shape[0], ["act"]),
        (lambda y, z: z + y.tanh(), ["act", UNSEEN]),
        (lambda y, z: z + y, ["act", UNSEEN]),
        (lambda y, z: z + y[:, :1], ["act", UNSEEN]),
        (lambda y, z: (z, y), ["act", UNSEEN]),
    ],
)
def test_who_reads_an_output(elsewhere, followed):
    """Whatever the numbers are, and in inference mode, whose tensors keep no version."""
    model = Read(elsewhere)
    for state in (torch.no_grad, torch.inference_mode):
        with state():
            calls = calls_of(model, (nn.Linear,), lambda: model(torch.zeros(2, 4)))
        assert calls["lin"].followed == followed
        assert [call.name for call in chain_after("lin", calls)] == (["act"] if len(followed) == 1 else [])
