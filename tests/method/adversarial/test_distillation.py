"""The teacher's term against its formula in probabilities, and its gradient against differences in float64."""

import pytest
import torch

from tscnc_hf.method.adversarial.distillation import distillation_term
from tscnc_hf.method.adversarial.objectives import objective_terms


def by_definition(clean, adversarial, teacher, temperature, weights):
    """T^2 sum_k p_k log(p_k / q_k), 1/6 of clean images and 5/6 of adversarial ones."""
    p = torch.exp(teacher / temperature) / torch.exp(teacher / temperature).sum(-1, keepdim=True)
    total = 0.0
    for share, logits in ((1 / 6, clean), (5 / 6, adversarial)):
        q = torch.exp(logits / temperature) / torch.exp(logits / temperature).sum(-1, keepdim=True)
        total += share * (weights * (p * (p / q).log()).sum(-1)).sum() / len(weights)
    return float((temperature**2 * total).detach())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_value_and_gradient(temperature):
    clean, adversarial, teacher = torch.randn(3, 4, 5, dtype=torch.float64) * 3
    weights = torch.rand(4, dtype=torch.float64) + 0.5
    learned = torch.stack([clean, adversarial]).requires_grad_()
    term = distillation_term(*learned, teacher.requires_grad_(), temperature, weights)
    assert term.item() == pytest.approx(by_definition(clean, adversarial, teacher, temperature, weights), rel=1e-10)
    term.backward()
    assert teacher.grad is None
    h = 1e-5
    for place in ((0, 1, 2), (1, 3, 4), (0, 0, 0), (1, 2, 1)):
        moved = torch.stack([clean, adversarial])
        values = []
        for step in (h, -2 * h):
            moved[place] += step
            values.append(by_definition(*moved, teacher.detach(), temperature, weights))
        assert learned.grad[place].item() == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-6, abs=1e-9)


def test_all_images_count_alike_without_weights_and_a_perfect_pupil_has_no_loss():
    clean, adversarial, teacher = torch.randn(3, 4, 5, dtype=torch.float64)
    ones = torch.ones(4, dtype=torch.float64)
    assert distillation_term(clean, adversarial, teacher) == distillation_term(clean, adversarial, teacher, 1.0, ones)
    assert distillation_term(teacher, teacher, teacher, 2.0).abs() < 1e-15


@pytest.mark.parametrize("objective, images", [("natural", [6]), ("pgd-at", [12]), ("trades", [12]), ("mart", [12])])
def test_further_terms_share_the_forward_of_the_objective(objective, images):
    """Its own terms are what they are without; one forward, so that a batch norm takes its statistics once."""
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 10)).double()
    x, x_adv = torch.rand(2, 6, 3, 4, 4, dtype=torch.float64)
    x_adv = None if objective == "natural" else x_adv
    y, seen = torch.randint(0, 10, (6,)), []

    def forward(pixels):
        seen.append(len(pixels))
        return network(pixels)

    def also(clean, adversarial):
        torch.testing.assert_close(clean, network(x))
        torch.testing.assert_close(adversarial, network(x if x_adv is None else x_adv))
        return {"distill_loss": clean.sum() * 0 + 7}

    alone = objective_terms(objective, network, x, x_adv, y, label_smoothing=0.1)
    terms = objective_terms(objective, forward, x, x_adv, y, label_smoothing=0.1, also=also)
    assert terms.pop("distill_loss") == 7 and seen == images and terms.keys() == alone.keys()
    for name, value in alone.items():
        torch.testing.assert_close(terms[name], value)
