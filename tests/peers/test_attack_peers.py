"""
Our attacks beside those of the libraries that the field uses, on one trained network and 1,000 images. The libraries
are skipped where they are absent; `make test-peers` installs them into a folder of their own and runs this.
"""

import pytest
import torch

from tscnc_hf.data.loading import load_image_data
from tscnc_hf.evaluation.attacks import make_attack
from tscnc_hf.method.adversarial.apgd import apgd
from tscnc_hf.method.adversarial.pgd import seeded_generator


COUNT = 1000
MARGIN = 5  # images: 0.5 points
THREATS = [("linf", 0.1), ("l2", 0.6)]


@pytest.fixture(scope="module")
def images():
    batch = load_image_data("digits", augmentation="none").train.__getitems__(range(COUNT))
    return batch["pixel_values"].float(), batch["labels"]


@pytest.fixture(scope="module")
def right(robust_network, images):
    x, y = images
    with torch.no_grad():
        keep = robust_network(x).argmax(-1) == y
    assert keep.sum() > 900
    return keep


def robust(model, x_adv, y, right) -> int:
    with torch.no_grad():
        return int(((model(x_adv).argmax(-1) == y) & right).sum())


def ours(name, model, x, y, right, epsilon, norm) -> int:
    attack = make_attack(name, epsilon, norm)
    return robust(model, attack.run(model, x, y, torch.arange(len(x)), 0), y, right)


def in_ball(x_adv, x, epsilon, norm) -> bool:
    change = (x_adv - x).flatten(1)
    size = change.abs().amax(1) if norm == "linf" else change.norm(dim=1)
    return bool(size.max() <= epsilon + 1e-6 and x_adv.min() >= 0 and x_adv.max() <= 1)


@pytest.mark.parametrize("norm, epsilon", THREATS)
def test_pgd_is_no_weaker_than_torchattacks(norm, epsilon, robust_network, images, right):
    torchattacks = pytest.importorskip("torchattacks", reason="torchattacks is not installed: make test-peers")
    x, y = images
    step = make_attack("pgd-20", epsilon, norm).parameters["step_size"]
    kind = torchattacks.PGD if norm == "linf" else torchattacks.PGDL2
    theirs = kind(robust_network, eps=epsilon, alpha=step, steps=20, random_start=True)(x, y)
    left = robust(robust_network, theirs, y, right)
    assert 100 < left < right.sum() - 100
    assert ours("pgd-20", robust_network, x, y, right, epsilon, norm) <= left + MARGIN


@pytest.mark.parametrize("norm, epsilon", THREATS)
def test_pgd_is_no_weaker_than_foolbox(norm, epsilon, robust_network, images, right):
    foolbox = pytest.importorskip("foolbox", reason="foolbox is not installed: make test-peers")
    x, y = images
    step = make_attack("pgd-20", epsilon, norm).parameters["step_size"]
    kind = foolbox.attacks.LinfPGD if norm == "linf" else foolbox.attacks.L2PGD
    wrapped = foolbox.PyTorchModel(robust_network, bounds=(0, 1), device="cpu")
    _, theirs, _ = kind(abs_stepsize=step, steps=20, random_start=True)(wrapped, x, y, epsilons=epsilon)
    left = robust(robust_network, theirs, y, right)
    assert 100 < left < right.sum() - 100
    assert ours("pgd-20", robust_network, x, y, right, epsilon, norm) <= left + MARGIN


@pytest.mark.parametrize("norm, epsilon", THREATS)
def test_apgd_equals_the_published_implementation(norm, epsilon, robust_network, images, right):
    autopgd = pytest.importorskip("pyautoattack.autopgd_base", reason="pyautoattack is not installed: make test-peers")
    x, y = images
    options = {"n_iter": 100, "n_restarts": 1, "eps": epsilon, "norm": {"linf": "Linf", "l2": "L2"}[norm]}
    attack = autopgd.APGDAttack(
        robust_network, loss="ce", rho=0.75, eot_iter=1, verbose=False, seed=0, device="cpu", **options
    )
    left = robust(robust_network, attack.perturb(x, y), y, right)
    found = apgd(robust_network, x, y, epsilon=epsilon, norm=norm, generator=seeded_generator("cpu", 0))
    assert in_ball(found, x, epsilon, norm)
    assert abs(robust(robust_network, found, y, right) - left) <= MARGIN
    assert 100 < left < right.sum() - 100


@pytest.mark.parametrize("norm, epsilon", THREATS)
@pytest.mark.parametrize("name", ["fgsm", "pgd-20", "pgd-5x3", "cw-20", "apgd-dlr"])
def test_every_attack_stays_in_the_ball(name, norm, epsilon, robust_network, images):
    x, y = images
    found = make_attack(name, epsilon, norm).run(robust_network, x, y, torch.arange(len(x)), 0)
    assert in_ball(found, x, epsilon, norm) and (found != x).any()
