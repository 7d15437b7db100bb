"""Models that only hide their gradients are told from models that do not, each by the check that should see it."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tscnc_hf.evaluation.measures.masking import masking_report
from tscnc_hf.evaluation.measures.robustness import evaluate_robustness


def failed(report) -> set[str]:
    return {check.name for check in report.checks if not check.passed}


@pytest.fixture
def images(digits):
    batch = digits.test.__getitems__(range(64))
    return batch["pixel_values"].float(), batch["labels"]


@pytest.mark.parametrize("norm, epsilon", [("linf", 0.03), ("linf", 0.1), ("linf", 0.2), ("l2", 0.5), ("l2", 1.5)])
@pytest.mark.parametrize("name", ["plain_network", "robust_network"])
def test_an_honest_network_passes(name, norm, epsilon, images, request):
    report = masking_report(request.getfixturevalue(name), *images, epsilon=epsilon, norm=norm)
    assert not report.suspicious and failed(report) == set()
    assert 50 < report.n <= 64 and len(report.checks) == 7


HIDING = {
    "scaled logits": (lambda model: lambda x: 1e4 * model(x), {"gradients", "scale", "large epsilon"}),
    "a little scaled logits": (lambda model: lambda x: 50 * model(x), {"gradients"}),
    "quantised input": (lambda model: lambda x: model((16 * x).round() / 16), {"gradients", "large epsilon"}),
    "noise": (lambda model: lambda x: model(x + 0.1 * torch.randn_like(x)), {"determinism"}),
    "shattered gradients": (lambda model: lambda x: model(x + 0.05 * torch.sin(300 * x)), {"large epsilon"}),
}


@pytest.mark.parametrize("trick", HIDING)
@pytest.mark.parametrize("name", ["plain_network", "robust_network"])
def test_hidden_gradients_are_seen(name, trick, images, request):
    hide, seen_by = HIDING[trick]
    report = masking_report(hide(request.getfixturevalue(name)), *images, epsilon=0.1)
    assert report.suspicious and seen_by <= failed(report)


def test_what_a_gradient_attack_misses_a_black_box_finds(plain_network, images):
    report = masking_report(lambda x: plain_network((16 * x).round() / 16), *images, epsilon=0.1)
    figures = next(check.figures for check in report.checks if check.name == "black box")
    assert figures["PGD-50"] > figures["Square, 300 queries"] + 0.1


def test_images_of_another_model_may_not_be_stronger(plain_network, train_network, images):
    """The masked copy of a model: the model's own images break it, its own gradients do not."""
    twin = train_network(0.0, seed=1)
    honest = masking_report(plain_network, *images, epsilon=0.1, dense_fn=twin)
    assert not honest.suspicious and honest.checks[-1].name == "transfer"
    masked = masking_report(lambda x: 1e4 * plain_network(x), *images, epsilon=0.1, dense_fn=plain_network)
    assert "transfer" in failed(masked)


def test_the_checks_come_with_every_evaluation_and_change_nothing(robust_network, digits, as_they_are):
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = robust_network

        def forward(self, x):
            return 1e4 * self.inner(x)

    options = {"epsilon": 0.1, "n": 80, "processing_class": as_they_are, "progress": False}
    honest = evaluate_robustness(robust_network, digits.test, ("clean", "pgd-5"), **options)
    hidden = evaluate_robustness(Hidden(), digits.test, ("clean", "pgd-5"), **options)
    assert honest.masking["suspicious"] is False and hidden.masking["suspicious"] is True
    assert hidden["pgd-5"].correct > honest["pgd-5"].correct
    without = evaluate_robustness(robust_network, digits.test, ("clean", "pgd-5"), masking=False, **options)
    assert without.masking is None and without.attacks == honest.attacks
    assert "suspicious" in hidden.to_markdown().lower() and "suspicious" not in honest.to_markdown().lower()
    assert "| **failed** |" in hidden.masking_markdown() and "failed" not in honest.masking_markdown()


def test_nothing_is_right(images):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    report = masking_report(model, images[0], (model(images[0]).argmin(-1)), epsilon=0.1)
    assert report.n == 0 and not report.suspicious and report.checks == ()


def test_the_dense_model_is_normalised_as_it_says(robust_network, plain_network, digits, as_they_are):
    class Centred(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x / 2 + 0.5)

    halves = SimpleNamespace(image_mean=[0.5], image_std=[0.5])
    options = {"attacks": ("pgd-2",), "epsilon": 0.1, "n": 32, "processing_class": as_they_are, "progress": False}
    one = evaluate_robustness(plain_network, digits.test, dense_model=robust_network, **options)
    dense = {"dense_model": Centred(robust_network), "dense_processing_class": halves}
    two = evaluate_robustness(plain_network, digits.test, **dense, **options)
    assert one.masking == two.masking and len(one.masking["checks"]) == 8
    wrong = evaluate_robustness(plain_network, digits.test, dense_model=dense["dense_model"], **options)
    assert wrong.masking != one.masking and wrong.attacks == one.attacks
