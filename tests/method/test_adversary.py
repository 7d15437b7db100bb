"""Adversaries: what every perturbation must satisfy, and optimality where the optimum is known."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tscnc_hf.method.adversary import craft, fgsm_rs, kl_pgd, pgd, seeded_generator
from tscnc_hf.method.pixels import attack_mode, pixel_logits, pixel_quantity


EPSILON = 8 / 255
ATTACKS = {
    "fgsm-rs": lambda f, x, y, g: fgsm_rs(f, x, y, epsilon=EPSILON, generator=g),
    "pgd": lambda f, x, y, g: pgd(f, x, y, epsilon=EPSILON, steps=5, generator=g),
    "pgd restarts": lambda f, x, y, g: pgd(f, x, y, epsilon=EPSILON, steps=3, restarts=3, generator=g),
    "kl-pgd": lambda f, x, y, g: kl_pgd(f, x, y, epsilon=EPSILON, steps=5, generator=g),
}


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(512, 10)
    )


@pytest.fixture
def batch():
    return torch.rand(16, 3, 8, 8), torch.randint(0, 10, (16,))


@pytest.mark.parametrize("name", ATTACKS)
def test_perturbations_stay_in_the_ball_and_hurt(name, batch):
    x, y = batch
    model = network()
    forward = pixel_logits(model, [0.5], [0.25])
    before = x.clone()
    with attack_mode(model):
        x_adv = ATTACKS[name](forward, x, y, seeded_generator("cpu", 0))
        loss = lambda z: F.cross_entropy(forward(z), y)  # noqa: E731
        noise = (x + EPSILON * torch.empty_like(x).uniform_(-1, 1)).clamp(0, 1)
        clean_loss, noise_loss, adversarial_loss = loss(x), loss(noise), loss(x_adv)
    assert (x_adv - x).abs().max() <= EPSILON + 1e-6
    assert x_adv.min() >= 0 and x_adv.max() <= 1 and x_adv.dtype == x.dtype and not x_adv.requires_grad
    assert torch.equal(x, before)
    assert (x_adv - x).abs().max() > 0.9 * EPSILON
    if name != "kl-pgd":
        assert adversarial_loss > clean_loss and adversarial_loss > noise_loss
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("steps", [1, 10])
def test_pgd_finds_the_worst_case_of_a_linear_classifier(steps):
    """For two classes and a linear model the optimum is known: epsilon * sign of the weight difference."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).double()
    x, y = 0.5 + 0.1 * torch.rand(5, 3, 2, 2, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1])
    forward = lambda z: model(z)  # noqa: E731
    x_adv = pgd(forward, x, y, epsilon=0.1, steps=steps, step_size=0.1, random_start=False)
    difference = model[1].weight[1 - y] - model[1].weight[y]
    torch.testing.assert_close(x_adv, x + 0.1 * difference.sign().view_as(x))


def test_kl_pgd_follows_the_published_loop(batch):
    """The inner loop as TRADES' authors describe it, written out with torch's own pieces."""
    x, y = batch
    model = network().eval()
    forward = pixel_logits(model, [0.5], [0.25])
    x_adv = kl_pgd(forward, x, y, epsilon=EPSILON, steps=4, step_size=0.01, generator=seeded_generator("cpu", 7))
    expected = (x + 0.001 * torch.randn(x.shape, generator=seeded_generator("cpu", 7))).clamp(0, 1)
    for _ in range(4):
        expected.requires_grad_()
        divergence = nn.KLDivLoss(reduction="sum")(F.log_softmax(forward(expected), 1), F.softmax(forward(x), 1))
        (gradient,) = torch.autograd.grad(divergence, expected)
        expected = expected.detach() + 0.01 * gradient.sign()
        expected = torch.min(torch.max(expected, x - EPSILON), x + EPSILON).clamp(0, 1)
    # a step is the sign of a gradient: where that is rounding noise around zero, single pixels may differ
    assert ((x_adv - expected).abs() < 1e-6).double().mean() > 0.999


def test_restarts_never_give_a_smaller_loss(batch):
    x, y = batch
    model = network().eval()
    forward = pixel_logits(model, [0.5], [0.25])
    generator = seeded_generator("cpu", 3)
    one = pgd(forward, x, y, epsilon=EPSILON, steps=1, generator=seeded_generator("cpu", 3))
    many = pgd(forward, x, y, epsilon=EPSILON, steps=1, restarts=8, generator=generator)
    loss = lambda z: F.cross_entropy(forward(z), y, reduction="none")  # noqa: E731
    assert (loss(many) >= loss(one) - 1e-5).all() and loss(many).sum() > loss(one).sum()


def test_modes_statistics_and_random_state_are_untouched(batch):
    x, y = batch
    model = network().train()
    model[3].eval()
    statistics = model[1].running_mean.clone(), model[1].num_batches_tracked.clone()
    state = torch.get_rng_state()
    with attack_mode(model):
        assert not any(module.training for module in model.modules())
        pgd(pixel_logits(model, [0.5], [0.25]), x, y, epsilon=EPSILON, steps=2, generator=seeded_generator("cpu", 0))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model[1].running_mean, statistics[0]) and model[1].num_batches_tracked == statistics[1]
    assert [module.training for module in model] == [True, True, True, False, True, True]
    with pytest.raises(RuntimeError), attack_mode(model):
        raise RuntimeError
    assert model.training and not model[3].training


def test_generators_are_a_function_of_the_whole_key():
    draw = lambda *key: torch.rand(4, generator=seeded_generator("cpu", *key)).tolist()  # noqa: E731
    assert draw(0, "train", 1, 2) == draw(0, "train", 1, 2)
    draws = [draw(0, 1, 2), draw(0, 2, 1), draw(1, 1, 2), draw(0, 1, 3), draw(0, 12)]
    assert len({tuple(values) for values in draws}) == len(draws)


def test_craft_knows_its_names(batch):
    x, y = batch
    options = {"steps": 1, "step_size": None, "generator": seeded_generator("cpu", 0)}
    forward = pixel_logits(network().eval(), [0.5], [0.25])
    assert craft("none", forward, x, y, epsilon=EPSILON, **options) is None
    assert craft("pgd", forward, x, y, epsilon=0.0, **options) is None
    for name in ("fgsm-rs", "pgd", "kl-pgd"):
        assert craft(name, forward, x, y, epsilon=EPSILON, **options).shape == x.shape
    with pytest.raises(ValueError, match="'deepfool' is unknown; use one of none, fgsm-rs"):
        craft("deepfool", forward, x, y, epsilon=EPSILON, **options)


@pytest.mark.parametrize("given, expected", [("8/255", 8 / 255), (0.1, 0.1), ("0.25", 0.25), (0, 0.0)])
def test_pixel_quantities(given, expected):
    assert pixel_quantity("epsilon", given) == pytest.approx(expected)


@pytest.mark.parametrize(
    "given, hint", [(8, '"8/255"'), ("-0.1", "outside"), ("many", "not a number"), ("1/0", "not")]
)
def test_wrong_pixel_quantities(given, hint):
    with pytest.raises(ValueError, match="epsilon") as error:
        pixel_quantity("epsilon", given)
    assert hint in str(error.value)


def test_normalisation_is_inside():
    model = nn.Flatten()
    x = torch.rand(2, 3, 4, 4)
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.25, 2.0]
    expected = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], dim=1).flatten(1)
    torch.testing.assert_close(pixel_logits(model, mean, std)(x), expected)


def test_pixel_logits_can_be_differentiated_after_use_in_inference_mode():
    forward = pixel_logits(nn.Flatten(), [0.123, 0.2, 0.3], [0.5, 0.25, 2.0])
    x = torch.rand(2, 3, 4, 4)
    with torch.inference_mode():
        forward(x)
    x.requires_grad_()
    forward(x).sum().backward()
    torch.testing.assert_close(x.grad[0, :, 0, 0], 1 / torch.tensor([0.5, 0.25, 2.0]))
