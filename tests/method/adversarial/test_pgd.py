"""Adversaries: what every perturbation must satisfy, and optimality where the optimum is known."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tscnc_hf.method.adversarial.attack_losses import cw_margin, dlr
from tscnc_hf.method.adversarial.ball import project, random_start, steepest
from tscnc_hf.method.adversarial.pgd import ADVERSARIES, craft, fgsm_rs, kl_pgd, n_fgsm, pgd, seeded_generator
from tscnc_hf.method.adversarial.pixels import attack_mode, pixel_logits, pixel_quantity


EPSILON = 8 / 255
ATTACKS = {
    "fgsm-rs": lambda f, x, y, g: fgsm_rs(f, x, y, epsilon=EPSILON, generator=g),
    "pgd": lambda f, x, y, g: pgd(f, x, y, epsilon=EPSILON, steps=5, generator=g),
    "cw": lambda f, x, y, g: pgd(f, x, y, epsilon=EPSILON, steps=5, loss="cw", generator=g),
    "stop": lambda f, x, y, g: pgd(f, x, y, epsilon=EPSILON, steps=5, early_stop=True, generator=g),
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


def test_l2_attacks_stay_in_the_ball_and_hurt(batch):
    x, y = batch
    model = network()
    forward = pixel_logits(model, [0.5], [0.25])
    options = {"epsilon": 0.5, "norm": "l2", "generator": seeded_generator("cpu", 1)}
    with attack_mode(model):
        noise = random_start(x, 0.5, "l2", seeded_generator("cpu", 2))
        clean = F.log_softmax(forward(x), -1)
        raised = {  # attack -> what it raises
            pgd(forward, x, y, steps=5, **options): lambda z: F.cross_entropy(forward(z), y),
            pgd(forward, x, y, steps=5, loss="cw", **options): lambda z: cw_margin(forward(z), y).mean(),
            fgsm_rs(forward, x, y, **options): lambda z: F.cross_entropy(forward(z), y),
            kl_pgd(forward, x, y, steps=5, **options): lambda z: F.kl_div(
                F.log_softmax(forward(z), -1), clean, reduction="batchmean", log_target=True
            ),
        }
        for x_adv, value in raised.items():
            assert value(x_adv) > value(noise)
            assert (x_adv - x).flatten(1).norm(dim=1).max() <= 0.5 + 1e-6
            assert (x_adv - x).flatten(1).norm(dim=1).max() > 0.4
            assert x_adv.min() >= 0 and x_adv.max() <= 1


def test_l2_pgd_finds_the_worst_case_of_a_linear_classifier():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).double()
    x, y = 0.5 + 0.1 * torch.rand(5, 3, 2, 2, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1])
    x_adv = pgd(model, x, y, epsilon=0.1, steps=3, step_size=0.1, random_start=False, norm="l2")
    direction = F.normalize(model[1].weight[1 - y] - model[1].weight[y]).view_as(x)
    torch.testing.assert_close(x_adv, x + 0.1 * direction)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_projection_start_and_direction(norm):
    x, wild = torch.rand(7, 3, 4, 4, dtype=torch.float64), 3 * torch.randn(7, 3, 4, 4, dtype=torch.float64)
    size = (lambda d: d.flatten(1).norm(dim=1)) if norm == "l2" else (lambda d: d.flatten(1).abs().amax(1))
    for near in (project(wild, x, 0.3, norm), random_start(x, 0.3, norm, seeded_generator("cpu", 0))):
        assert (size(near - x) <= 0.3 + 1e-12).all() and near.min() >= 0 and near.max() <= 1
        torch.testing.assert_close(project(near, x, 0.3, norm), near)
    inside = (x + 0.01 * wild.clamp(-1, 1)).clamp(0, 1)
    torch.testing.assert_close(project(inside, x, 0.3, norm), inside)
    assert steepest(torch.zeros(2, 3, 2, 2), norm).abs().max() == 0
    tiny = steepest(torch.full((1, 1, 2, 2), 1e-30), norm)  # its square is zero in float32
    torch.testing.assert_close(size(tiny), torch.ones(1))


def test_n_fgsm_takes_one_step_from_strong_noise(batch):
    """de Jorge et al.: x + noise + epsilon * sign(gradient at x + noise), cut to [0, 1] only."""
    x, y = batch
    forward = pixel_logits(network().eval(), [0.5], [0.25])
    x_adv = n_fgsm(forward, x, y, epsilon=EPSILON, generator=seeded_generator("cpu", 3))
    noise = (2 * torch.rand(x.shape, generator=seeded_generator("cpu", 3)) - 1) * 2 * EPSILON
    start = (x + noise).clamp(0, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(forward(start), y, reduction="sum"), start)
    torch.testing.assert_close(x_adv, (start.detach() + EPSILON * gradient.sign()).clamp(0, 1))
    assert EPSILON < (x_adv - x).abs().max() <= 3 * EPSILON + 1e-6


@pytest.fixture
def certain(batch):
    """Images with the labels that a model gives them, some of them near its border."""
    model = network().eval()
    forward = pixel_logits(model, [0.5], [0.25])
    return forward, batch[0], forward(batch[0]).argmax(-1)


def test_early_stop_breaks_the_same_images_and_forwards_fewer(certain):
    forward, x, y = certain
    seen = []
    counted = lambda z: seen.append(len(z)) or forward(z)  # noqa: E731
    options = {"epsilon": 0.01, "steps": 8, "step_size": 0.0025}
    full = pgd(counted, x, y, generator=seeded_generator("cpu", 5), **options)
    whole = sum(seen)
    seen.clear()
    stopped = pgd(counted, x, y, early_stop=True, generator=seeded_generator("cpu", 5), **options)
    survived = forward(stopped).argmax(-1) == y
    assert 0 < survived.sum() < len(y) and sum(seen) < whole
    torch.testing.assert_close(stopped[survived], full[survived])  # never wrong on the way: the same steps
    assert not ((forward(full).argmax(-1) != y) & survived).any()


def test_start_is_where_the_run_begins(batch):
    x, y = batch
    start = project(x + 0.01, x, EPSILON)
    assert torch.equal(pgd(network().eval(), x, y, epsilon=EPSILON, steps=0, start=start), start)


def test_margins_by_hand():
    logits, y = torch.tensor([[3.0, 1.0, 0.5], [0.0, 2.0, 5.0]]), torch.tensor([0, 1])
    assert cw_margin(logits, y).tolist() == [-2, 3]
    assert dlr(logits, y).tolist() == pytest.approx([-2 / 2.5, 3 / 5])
    torch.testing.assert_close(dlr(100 * logits, y), dlr(logits, y))
    with pytest.raises(ValueError, match="at least 3 classes"):
        dlr(torch.zeros(2, 2), y)


@pytest.mark.parametrize("adversary", [name for name in ADVERSARIES if name != "none"])
def test_half_precision_and_global_generator(adversary, batch):
    """Under bf16 autocast the pixels still move: the sign is taken of a float32 gradient."""
    x, y = batch
    model = network().eval()
    forward = pixel_logits(model, [0.5], [0.25])
    state = torch.get_rng_state()
    options = {"epsilon": EPSILON, "steps": 2, "step_size": None, "generator": seeded_generator("cpu", 4)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x_adv = craft(adversary, forward, x, y, **options)
    assert x_adv.dtype == torch.float32 and torch.equal(state, torch.get_rng_state())
    assert ((x_adv - x).abs() > 0).double().mean() > 0.9
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    "options, words",
    [({"norm": "l1"}, "norm='l1' is unknown; use one of linf, l2"), ({"loss": "mse"}, "cross-entropy, cw, dlr")],
)
def test_unknown_norm_and_loss(options, words, batch):
    with pytest.raises(ValueError, match=words):
        pgd(network(), *batch, epsilon=0.1, steps=1, **options)


def test_n_fgsm_has_no_l2_form(batch):
    options = {"epsilon": 0.1, "steps": 1, "step_size": None, "generator": torch.Generator(), "norm": "l2"}
    with pytest.raises(ValueError, match="defined for norm='linf'"):
        craft("n-fgsm", network(), *batch, **options)


def test_an_l2_radius_may_exceed_one():
    assert pixel_quantity("epsilon", 3.0, "l2") == 3.0
    with pytest.raises(ValueError, match="outside"):
        pixel_quantity("epsilon", -0.5, "l2")


@pytest.mark.parametrize("adversary", ["pgd", "kl-pgd"])
def test_a_compiled_model_is_attacked_as_the_eager_one(adversary, batch):
    (x, y), model, images = batch, network(), []
    with attack_mode(model):
        for form in (model, torch.compile(model, backend="aot_eager")):
            forward, generator = pixel_logits(form, [0.5], [0.25]), seeded_generator("cpu", 1)
            images.append(craft(adversary, forward, x, y, epsilon=0.1, steps=2, step_size=None, generator=generator))
    torch.testing.assert_close(images[1], images[0], rtol=0, atol=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())
