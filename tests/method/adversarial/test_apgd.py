"""APGD: what every result must satisfy, its schedule, and that it is no weaker than PGD of the same budget."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tscnc_hf.method.adversarial.apgd import apgd, checkpoints
from tscnc_hf.method.adversarial.pgd import pgd, seeded_generator


@pytest.fixture
def trained():
    """A small network that has learnt to tell which of four quadrants is brightest, and images of a test set."""
    torch.manual_seed(0)

    def images(n):
        x = torch.rand(n, 1, 8, 8)
        quadrants = x.unfold(2, 4, 4).unfold(3, 4, 4).mean((-1, -2)).flatten(1)
        return x, quadrants.argmax(-1)

    model = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(768, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        x, y = images(128)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return model.eval(), *images(200)


def test_checkpoints_follow_the_paper():
    """Section 3.2 for 100 steps: periods of 22, 19, 16, ... that shrink by 3 down to 6."""
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    for steps in (1, 2, 5, 20, 1000):
        marks = checkpoints(steps)
        assert marks == sorted(set(marks)) and all(0 < mark <= steps for mark in marks)


@pytest.mark.parametrize("norm, epsilon", [("linf", 0.02), ("l2", 0.12)])
@pytest.mark.parametrize("loss", ["cross-entropy", "dlr", "cw"])
def test_at_least_as_strong_as_pgd_and_inside_the_ball(norm, epsilon, loss, trained):
    model, x, y = trained
    state = torch.get_rng_state()
    options = {"epsilon": epsilon, "steps": 20, "norm": norm, "loss": loss}
    x_adv = apgd(model, x, y, generator=seeded_generator("cpu", 0), **options)
    size = (x_adv - x).flatten(1).norm(dim=1) if norm == "l2" else (x_adv - x).flatten(1).abs().amax(1)
    assert size.max() <= epsilon + 1e-6 and x_adv.min() >= 0 and x_adv.max() <= 1
    assert torch.equal(state, torch.get_rng_state()) and model[0].weight.grad is None
    clean = (model(x).argmax(-1) == y).sum()
    robust = (model(x_adv).argmax(-1) == y).sum()
    rival = (model(pgd(model, x, y, generator=seeded_generator("cpu", 0), **options)).argmax(-1) == y).sum()
    assert 20 < robust <= rival + 1 and rival < clean - 20  # one image of 200: starts differ


def test_stopping_early_breaks_the_same_images(trained):
    model, x, y = trained
    results = [
        apgd(model, x, y, epsilon=0.02, steps=15, early_stop=stop, generator=seeded_generator("cpu", 1))
        for stop in (True, False)
    ]
    wrong = [model(x_adv).argmax(-1) != y for x_adv in results]
    assert torch.equal(*wrong) and 0 < wrong[0].sum() < len(y)
    torch.testing.assert_close(results[0][~wrong[0]], results[1][~wrong[1]])


def test_the_start_given_is_used_and_projected(trained):
    model, x, y = trained
    first = []
    apgd(lambda z: first.append(z.detach().clone()) or model(z), x, y, epsilon=0.02, steps=1, start=x + 1)
    torch.testing.assert_close(first[0], (x + 0.02).clamp(max=1))


@pytest.mark.parametrize("options", [{"norm": "l1"}, {"loss": "mse"}, {"steps": 0}])
def test_wrong_options(options, trained):
    with pytest.raises(ValueError, match="use one of|at least one"):
        apgd(*trained, epsilon=0.1, **options)


@pytest.mark.parametrize("norm, epsilon", [("linf", 0.02), ("l2", 0.12)])
def test_breaks_as_many_images_as_the_published_implementation(norm, epsilon, trained):
    autopgd = pytest.importorskip("pyautoattack.autopgd_base", reason="pyautoattack is not installed")
    model, x, y = trained
    names = {"linf": "Linf", "l2": "L2"}
    options = {"n_iter": 100, "n_restarts": 1, "eps": epsilon, "norm": names[norm], "seed": 0, "device": "cpu"}
    theirs = autopgd.APGDAttack(model, loss="ce", rho=0.75, eot_iter=1, verbose=False, **options).perturb(x, y)
    ours = apgd(model, x, y, epsilon=epsilon, norm=norm, generator=seeded_generator("cpu", 0))
    robust = [int((model(x_adv).argmax(-1) == y).sum()) for x_adv in (theirs, ours)]
    assert 10 < robust[0] < 190 and abs(robust[0] - robust[1]) <= 1  # 0.5 points of 200 images
