"""Copies of models that keep what they have computed."""

import pytest
import torch
from torch import nn

from tscnc_hf.method.copying import copied
from tscnc_hf.method.reports.flops import flops_report
from tscnc_hf.method.units.slimming import cut_dead_units


class Keeps(nn.Module):
    """Keeps an activation of the last forward, one in a list, and another in a map inside it."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
        self.register_buffer("mean", torch.zeros(1))

    def forward(self, x):
        self.features = self.conv(x).relu().mean((2, 3))
        self.seen = [self.features * 2, {"deep": (self.features * 3,)}]
        return self.head(self.features)


@pytest.fixture
def used() -> Keeps:
    torch.manual_seed(0)
    model = Keeps()
    model(torch.rand(2, 3, 8, 8)).sum().backward()
    return model


def test_what_was_computed_is_copied_as_numbers(used):
    copy = copied(used)
    for own, other in (
        (used.features, copy.features),
        (used.seen[0], copy.seen[0]),
        (used.seen[1]["deep"][0], copy.seen[1]["deep"][0]),
    ):
        assert torch.equal(own, other) and own.requires_grad and not other.requires_grad
    own, other = used.state_dict(), copy.state_dict()
    assert all(torch.equal(own[name], other[name]) and own[name] is not other[name] for name in own)
    assert all(p.requires_grad and p.is_leaf for p in copy.parameters())
    with torch.no_grad():
        copy.conv.weight.zero_()
    assert used.conv.weight.any()


def test_a_weight_that_torch_computes_in_each_forward():
    model = nn.utils.weight_norm(nn.Linear(4, 2))
    x = torch.rand(3, 4)
    expected = model(x)
    torch.testing.assert_close(copied(model)(x), expected)


def test_what_reports_and_cuts_takes_such_a_model(used):
    assert flops_report(used, (1, 3, 8, 8)).macs == 36 * 27 * 4 + 8
    slimmed, _ = cut_dead_units(used, torch.rand(2, 3, 8, 8))
    assert slimmed.conv.weight.shape == used.conv.weight.shape
