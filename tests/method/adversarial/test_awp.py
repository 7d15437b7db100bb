"""AWP against a loop written from the paper: perturb in place, take the gradient there, put the weights back."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tscnc_hf.method.adversarial.awp import moved, perturbation, weight_perturbation


GAMMA = 0.01


@pytest.fixture
def parts():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 20), nn.ReLU(), nn.Linear(20, 5)
    ).double()
    with torch.no_grad():
        model[4].weight.mul_(torch.rand(20, 216) > 0.5)
    return model, torch.rand(16, 3, 8, 8).double(), torch.randint(5, (16,))


def weights_of(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.ndim > 1}


def move_of(model, x, y, weights=None, **options):
    weights = weights_of(model) if weights is None else weights
    return weights, weight_perturbation(model, lambda f: F.cross_entropy(f(x), y), weights, GAMMA, **options)


def by_hand(model, x, y) -> dict[str, torch.Tensor]:
    proxy = copy.deepcopy(model).train()
    F.cross_entropy(proxy(x), y).backward()
    moved = copy.deepcopy(model).train()
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            if parameter.ndim > 1:
                direction = dict(proxy.named_parameters())[name].grad * (parameter != 0)
                parameter.add_(GAMMA * parameter.norm() * direction / direction.norm())
    loss = F.cross_entropy(moved(x), y)
    loss.backward()
    return {"loss": loss.detach()} | {name: parameter.grad for name, parameter in moved.named_parameters()}


def test_gradients_are_those_at_the_perturbed_weights(parts):
    model, x, y = parts
    expected = by_hand(model, x, y)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    weights, move = move_of(model, x, y)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())  # statistics too
    with moved(model, weights, move):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
    torch.testing.assert_close(loss.detach(), expected["loss"])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])
        assert torch.equal(parameter.detach(), state[name])
    assert model[1].num_batches_tracked == 1  # of the forward that trains


def test_it_raises_the_loss_and_is_as_long_as_it_says(parts):
    model, x, y = parts
    model.eval()
    weights = weights_of(model)
    gradients = dict(zip(weights, torch.autograd.grad(F.cross_entropy(model(x), y), weights.values()), strict=True))
    move = perturbation(weights, gradients, GAMMA)
    for name, weight in weights.items():
        assert move[name].norm() == pytest.approx(GAMMA * weight.norm().item()) and not move[name].requires_grad
        assert (move[name][weight == 0] == 0).all()
    before = F.cross_entropy(model(x), y)
    with moved(model, *move_of(model, x, y, weights)):
        assert F.cross_entropy(model(x), y) > before
    assert F.cross_entropy(model(x), y) == before


def test_a_weight_without_gradient_or_length_stays(parts):
    model, x, y = parts
    with torch.no_grad():
        model[6].weight.zero_()
    unused = nn.Parameter(torch.ones(3, 3).double())
    model.register_parameter("unused", unused)
    weights, move = move_of(model, x, y)
    assert (move["unused"] == 0).all()
    with moved(model, weights, move):
        assert torch.isfinite(model(x)).all()
    move = perturbation({"a": unused}, {"a": torch.zeros(3, 3).double()}, GAMMA)
    assert (move["a"] == 0).all()


def test_a_wrapper_is_called_with_moved_weights(parts):
    model, x, y = parts

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = model

        def forward(self, *inputs):
            return self.module(*inputs)

    model.eval()
    with moved(model, *move_of(model, x, y, average=lambda g: 3 * g)):  # the length of the gradient does not matter
        wrapped = Wrapper()(x)
    with moved(model, *move_of(model, x, y)):
        plain = model(x)
    torch.testing.assert_close(wrapped, plain)
    assert not torch.allclose(wrapped, model(x))


def test_frozen_weights_stay_and_shared_ones_move_wherever_they_are(parts):
    model, x, y = parts
    model[4].weight.requires_grad_(False)
    model.again = model[6]  # which stands in two places
    weights = {name: weight for name, weight in weights_of(model).items() if weight.requires_grad}
    model.forward = lambda inputs: model.again(nn.Sequential(*list(model)[:6])(inputs))
    _, move = move_of(model, x, y, weights)
    with moved(model, weights, move):
        assert torch.equal(model.again.weight, weights["6.weight"] + move["6.weight"])
        assert model[6].weight is model.again.weight and model[4].weight.is_leaf
    assert model.again.weight is weights["6.weight"] and "4.weight" not in move


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_recomputed_in_the_backward_has_the_perturbed_weights(reentrant, parts):
    model, x, y = parts
    del model[1]  # batch norm counts a recomputed forward again
    expected = by_hand(model, x, y)
    last = nn.Sequential(*list(model)[3:])
    model.forward = lambda inputs: checkpoint(last, nn.Sequential(*list(model)[:3])(inputs), use_reentrant=reentrant)
    with moved(model, *move_of(model, x, y)):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


@pytest.mark.parametrize("size", [1e-12, 1e-15, 1e-19, 1e-21, 1e-25, 1e-30, 1e-37, 1e-40])
def test_it_is_as_long_as_it_says_however_small_the_gradient_is(size):
    """A classifier that is sure of its batch: squares of its gradients are zero in float32."""
    torch.manual_seed(0)
    weight, pattern = torch.randn(64, 64), torch.randn(64, 64)
    weight[0] = 0
    gradient = (pattern.double() * size).float()
    move = perturbation({"w": weight}, {"w": gradient}, GAMMA)["w"].double()
    assert move.norm().item() == pytest.approx(GAMMA * weight.double().norm().item(), rel=1e-5)
    direction = gradient.double() * (weight != 0)
    torch.testing.assert_close(move / move.norm(), direction / direction.norm(), rtol=1e-4, atol=1e-7)


def test_no_gradient_is_no_move_however_long_the_weight_is():
    """Nor a NaN: gamma |w| over the smallest number there is would be infinite here."""
    weight = torch.ones(1000, 1000)
    assert (perturbation({"w": weight}, {"w": torch.zeros_like(weight)}, GAMMA)["w"] == 0).all()
