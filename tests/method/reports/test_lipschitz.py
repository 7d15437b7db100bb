"""Lipschitz bounds against explicit operator matrices, linear maps and networks that must lie between them."""

import math

import pytest
import torch
from torch import nn

from tscnc_hf.method.reports.lipschitz import lipschitz_product, local_lipschitz


def operator_norm(module: nn.Module, *shape: int) -> float:
    """The largest singular value of the whole linear map on inputs of this shape, column by column, in float64."""
    module, size = module.double(), math.prod(shape)
    with torch.no_grad():
        columns = module(torch.eye(size, dtype=torch.float64).reshape(size, *shape)).flatten(1)
        columns = columns - module(torch.zeros(1, *shape, dtype=torch.float64)).flatten(1)
    return torch.linalg.matrix_norm(columns, 2).item()


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Linear(12, 7), (12,)),
        (nn.Conv2d(3, 5, 3, padding=1), (3, 8, 8)),
        (nn.Conv2d(3, 5, 3, stride=2, padding=1), (3, 8, 8)),
        (nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 6, 6)),
        (nn.Conv2d(3, 5, 4, stride=4), (3, 8, 8)),
        (nn.Conv2d(2, 3, 3, padding=2, dilation=2, stride=2), (2, 9, 9)),
        (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 6, 6)),
        (nn.Conv1d(3, 4, 5, padding=2), (3, 16)),
        (nn.Conv3d(2, 3, 3, padding=1), (2, 4, 4, 4)),
        (nn.ConvTranspose2d(3, 4, 3, stride=2, groups=1), (3, 5, 5)),
        (nn.ConvTranspose2d(4, 6, 3, padding=1, groups=2), (4, 5, 5)),
    ],
)
def test_layer_bound_is_above_the_operator_norm_and_not_far(layer, shape):
    bound = 10 ** lipschitz_product(layer).log10
    exact = operator_norm(layer, *shape)
    assert exact <= bound * (1 + 1e-9)
    assert bound < 4 * exact


def test_bound_is_exact_where_it_can_be():
    for layer, shape in ((nn.Linear(9, 4), (9,)), (nn.Conv2d(3, 8, 4, stride=4), (3, 8, 8))):
        assert 10 ** lipschitz_product(layer).log10 == pytest.approx(operator_norm(layer, *shape), rel=1e-9)
    norm = nn.BatchNorm2d(3)
    norm.running_var.uniform_(0.1, 4)
    norm.weight.data.uniform_(-3, 3)
    norm.eval()
    assert lipschitz_product(norm).bounds[""] == pytest.approx(operator_norm(norm, 3, 2, 2), rel=1e-6)


def chain() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(72, 10),
    ).eval()  # fmt: skip


def test_data_never_exceed_the_product_of_a_chain():
    torch.manual_seed(0)
    model = chain()
    x, upper = torch.rand(16, 3, 8, 8), 10 ** lipschitz_product(model).log10
    moved = x + 0.1 * torch.randn_like(x)
    stretch = (model(moved) - model(x)).norm(dim=1) / (moved - x).flatten(1).norm(dim=1)
    assert stretch.max() <= upper
    # in the norms of the local constant: |.|_1 <= sqrt(classes) |.|_2 and |.|_2 <= sqrt(pixels) |.|_inf
    local = local_lipschitz(model, x, epsilon=8 / 255, noise=torch.rand(x.shape))
    assert (local > 0).all() and local.max() <= upper * math.sqrt(10) * math.sqrt(3 * 8 * 8)


def test_scaling_one_layer_scales_the_product():
    model = chain()
    before = lipschitz_product(model).log10
    with torch.no_grad():
        model[3].weight.mul_(100)
    assert lipschitz_product(model).log10 == pytest.approx(before + 2, abs=1e-6)
    with torch.no_grad():
        model[3].weight.zero_()
    report = lipschitz_product(model)
    assert report.log10 == -math.inf and report.to_dict()["log10"] == "-inf"


def stretched(model: nn.Module, x: torch.Tensor) -> float:
    """What the model stretches a small change of x by, at most: a singular value of its Jacobian, in float64."""
    jacobian = torch.autograd.functional.jacobian(model.double(), x.double())
    return torch.linalg.matrix_norm(jacobian.reshape(-1, x.numel()), 2).item()


@pytest.mark.parametrize("size", [10.0, 0.1])
@pytest.mark.parametrize("tied", [True, False])
def test_a_weight_counts_in_each_layer_that_has_it(size, tied):
    """Two layers with one weight, or one layer in two places."""
    first, second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    nn.init.eye_(first.weight).data.mul_(size)
    second.weight = first.weight
    model = nn.Sequential(first, nn.ReLU(), second if tied else first)
    truth, bound = stretched(model, torch.ones(1, 2)), 10 ** lipschitz_product(model).log10
    assert truth == pytest.approx(size**2)
    assert bound >= truth * (1 - 1e-9)
    if tied or size > 1:
        assert bound == pytest.approx(truth)
    assert list(lipschitz_product(model).bounds) == ["0.weight", "2.weight"]


class Alias(nn.Module):
    """Layers under a second name, by which nothing is called."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2))
        self.backbone = self.layers
        nn.init.eye_(self.layers[0].weight).data.mul_(0.1)
        self.layers[1].running_var.fill_(100.0)

    def forward(self, x):
        return self.layers(x)


def test_a_second_name_is_not_taken_for_a_second_call_where_the_bound_would_not_be_one():
    model = Alias().eval()
    truth = stretched(model, torch.ones(1, 2))
    assert truth * (1 - 1e-9) <= 10 ** lipschitz_product(model).log10 <= 1.01 * truth


def test_tied_convolutions_have_bounds_of_their_own_geometry():
    first, second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, stride=3)
    alone = [lipschitz_product(conv).log10 for conv in (first, second)]
    second.weight = first.weight
    expected = alone[0] + lipschitz_product(second).log10
    assert lipschitz_product(nn.Sequential(first, nn.ReLU(), second)).log10 == pytest.approx(expected)
    embedding = nn.Embedding(5, 4)
    head = nn.Linear(4, 5)
    head.weight = embedding.weight
    assert list(lipschitz_product(nn.Sequential(embedding, head)).bounds) == ["1.weight"]


def test_a_norm_that_is_called_twice_counts_twice():
    norm = nn.BatchNorm1d(2)
    norm.running_var.fill_(1e-4)
    model = nn.Sequential(norm, nn.ReLU(), norm).eval()
    assert 10 ** lipschitz_product(model).log10 >= stretched(model, torch.ones(1, 2)) * (1 - 1e-9) > 5000


def test_layers_without_a_bound_are_named():
    report = lipschitz_product(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, padding_mode="replicate"), nn.Linear(3, 2)))
    assert report.unknown == ("0.weight",) and list(report.bounds) == ["1.weight"]


def test_local_constant_of_a_linear_map_is_found():
    # on the cube, max ||W d||_1 / ||d||_inf over d in {-1, 1}^n: by enumeration
    torch.manual_seed(1)
    weight = torch.randn(4, 9)
    signs = torch.tensor([[1.0 if code >> bit & 1 else -1.0 for bit in range(9)] for code in range(512)])
    truth = (signs @ weight.T).abs().sum(1).max().item()
    x = torch.rand(64, 1, 3, 3) * 0.5 + 0.25
    found = local_lipschitz(lambda p: p.flatten(1) @ weight.T, x, epsilon=0.1, steps=20)
    assert found.max().item() == pytest.approx(truth, rel=1e-4) and found.max() <= truth * (1 + 1e-4)
    assert found.min() > truth / 3


def test_more_steps_never_lower_it_and_the_start_decides():
    model, x, noise = chain(), torch.rand(8, 3, 8, 8), torch.rand(8, 3, 8, 8)
    values = [local_lipschitz(model, x, epsilon=0.1, steps=steps, noise=noise) for steps in (1, 4, 12, 12)]
    assert (values[1] >= values[0] - 1e-6).all() and (values[2] >= values[1] - 1e-6).all()
    assert torch.equal(values[2], values[3])


def test_constant_function_edges_of_the_cube_and_no_gradients_left():
    assert local_lipschitz(lambda p: p.flatten(1)[:, :2] * 0, torch.rand(3, 1, 2, 2), epsilon=0.1).tolist() == [
        0,
        0,
        0,
    ]
    model = chain()
    found = local_lipschitz(model, torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)]), epsilon=0.1)
    assert torch.isfinite(found).all() and all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("options", [{"epsilon": 0.0}, {"epsilon": 8.0}, {"epsilon": 0.1, "steps": 0}])
def test_wrong_arguments_say_what_is_allowed(options):
    with pytest.raises(ValueError, match="epsilon=|steps="):
        local_lipschitz(chain(), torch.rand(1, 3, 8, 8), **options)
