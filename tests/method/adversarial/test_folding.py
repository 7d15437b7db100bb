"""A folded copy against the network that it was made of; networks that must not be folded are left alone."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import StdConv2d
from torch import nn
from torch.nn.utils import prune

from tscnc_hf.method.adversarial.folding import folded_copy


def warmed(model: nn.Module, side: int = 32) -> nn.Module:
    """With statistics that are not those of the first day."""
    torch.manual_seed(1)
    model.train()
    for _ in range(3):
        model(2 * torch.rand(8, 3, side, side) - 0.5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model


def pixel_gradient(function, x, y):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(function(x), y), x)[0]


SMALL = {
    "resnet18": {"channels": [8, 8, 8, 8], "layers": [1, 1, 1, 1]},
    "mobilenetv3_small_050": {},
    "regnety_002": {},
    "densenet121": {"block_config": (2, 2), "growth_rate": 8},
}


@pytest.mark.parametrize("name", SMALL)
def test_logits_and_pixel_gradients_are_those_of_the_model(name):
    torch.manual_seed(0)
    model = warmed(timm.create_model(name, num_classes=10, **SMALL[name])).double()
    x, y = torch.rand(4, 3, 32, 32).double(), torch.arange(4)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    folded = folded_copy(model, x[:2])
    assert len(folded.pairs) > 3 and model.training
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in folded.model.modules())
    assert norms == sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) - len(folded.pairs)

    def agree():
        model.eval()
        torch.testing.assert_close(folded.model(x), model(x), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(pixel_gradient(folded.model, x, y), pixel_gradient(model, x, y))
        model.train()

    agree()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert not torch.allclose(folded.model(x), model.eval()(x))
    model.train()
    folded.refresh()
    agree()
    assert all(parameter.grad is None for parameter in folded.model.parameters())


class Twice(nn.Module):
    """The convolution's output goes on beside the normalised one."""

    def __init__(self, shared: bool):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 10)
        self.shared = shared

    def forward(self, x):
        out = self.conv(x)
        both = self.norm(out) + (out if self.shared else self.conv(x.flip(-1)))
        return self.head(both.mean((-1, -2)))


@pytest.mark.parametrize("shared", [True, False])
def test_an_output_that_goes_to_two_places_is_not_folded(shared):
    """Nor as training begins, when a batch norm hardly does anything and a wrong fold would not show."""
    assert folded_copy(warmed(Twice(shared)), torch.rand(2, 3, 32, 32)) is None
    torch.manual_seed(0)
    assert folded_copy(Twice(shared), torch.rand(2, 3, 32, 32)) is None
    silent = Twice(shared)
    nn.init.zeros_(silent.norm.weight)
    assert folded_copy(silent, torch.rand(2, 3, 32, 32)) is None


@pytest.mark.parametrize("name", SMALL)
def test_fresh_networks_are_folded_as_those_in_training_are(name):
    torch.manual_seed(0)
    model, x = timm.create_model(name, num_classes=10, **SMALL[name]), torch.rand(2, 3, 32, 32)
    before = copy.deepcopy(model.state_dict())
    fresh = folded_copy(model, x)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert fresh.pairs == folded_copy(warmed(model), x).pairs


def test_a_fresh_network_whose_block_cannot_be_folded():
    """A convolution of CoAtNet's is read by a batch norm and by a skip connection."""
    torch.manual_seed(0)
    options = {"img_size": 32, "num_classes": 10, "depths": (1, 1, 1, 1), "embed_dim": (32, 32, 64, 64)}
    model = timm.create_model("coatnet_pico_rw_224", stem_width=(8, 16), **options)
    assert folded_copy(model, torch.rand(2, 3, 32, 32)) is None


def test_nothing_to_fold_and_hooks():
    x = torch.rand(2, 3, 32, 32)
    assert (
        folded_copy(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(3600, 5)), x) is None
    )
    untracked = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten())
    assert folded_copy(untracked, x) is None
    model = warmed(timm.create_model("resnet18", **SMALL["resnet18"]))
    model.conv1.register_forward_pre_hook(lambda module, args: None)
    assert folded_copy(model, x) is None


@pytest.mark.parametrize("attach", [nn.utils.parametrizations.weight_norm, lambda c: prune.identity(c, "weight")])
def test_a_convolution_that_computes_its_weight_is_not_folded(attach):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), StdConv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2),
    ).eval()  # fmt: skip
    attach(model[4])
    folded = folded_copy(model, torch.randn(2, 3, 8, 8))
    assert folded is None or folded.pairs == (("0", "1"),)


class Tied(nn.Module):
    """Two convolutions with one weight and one bias, a batch norm behind each, and a third without a norm."""

    def __init__(self, bias: bool):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 3, 3, padding=1, bias=bias), nn.BatchNorm2d(3)
        self.conv2, self.norm2 = nn.Conv2d(3, 3, 3, padding=1, bias=bias), nn.BatchNorm2d(3)
        self.conv3, self.again = nn.Conv2d(3, 3, 3, padding=1, bias=bias), self.norm2
        self.head = nn.Linear(3, 10)
        for conv in (self.conv2, self.conv3):
            conv.weight, conv.bias = self.conv1.weight, self.conv1.bias

    def forward(self, x):
        x = self.norm1(self.conv1(x)).relu()
        x = x + self.norm2(self.conv2(x)).relu()
        return self.head((x + self.conv3(x).tanh()).mean((-1, -2)))


@pytest.mark.parametrize("bias", [False, True])
def test_convolutions_that_share_a_weight_get_one_each(bias):
    model = warmed(Tied(bias), 8).double()
    x, y = torch.rand(4, 3, 8, 8).double(), torch.arange(4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folded = folded_copy(model, x)
    assert folded.pairs == (("conv1", "norm1"), ("conv2", "norm2"))
    for step in range(2):
        model.eval()
        torch.testing.assert_close(folded.model(x), model(x), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(pixel_gradient(folded.model, x, y), pixel_gradient(model, x, y))
        if step == 0:
            assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        with torch.no_grad():
            model.conv1.weight.mul_(1.5)
            model.norm2.running_mean.add_(0.5)
        folded.refresh()
    assert model.conv1.weight is model.conv2.weight is model.conv3.weight


class Asked(nn.Module):
    """A norm of which more is read than its output, and an argument that is no image."""

    def __init__(self, read):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 10)
        self.read = read

    def forward(self, x, scale):
        x = self.norm(self.conv(x)) * scale
        return self.head(x.mean((-1, -2)) + (self.norm.eps if self.read else 0))


def test_a_norm_that_is_read_is_not_folded_and_other_arguments_are_passed():
    x = torch.rand(2, 3, 8, 8)
    for read in (True, False):
        folded = folded_copy(Asked(read).eval(), x, lambda net: net(x, scale=2.0))
        assert (folded is None) == read


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_whatever_has_a_hook_is_not_folded(kind):
    model, x = (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5)),
        torch.rand(2, 3, 8, 8),
    )
    assert folded_copy(model, x) is not None
    getattr(model[1], f"register_{kind}_hook")(lambda module, *args: None)
    assert folded_copy(model, x) is None
