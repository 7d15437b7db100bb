"""Objectives against torch's own loss modules."""

import pytest
import torch
from torch import nn

from tscnc_hf.method.adversarial.objectives import objective_terms


@pytest.fixture
def setting():
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 10)).double()
    x, x_adv = torch.rand(2, 6, 3, 4, 4, dtype=torch.float64)
    return model, x, x_adv, torch.randint(0, 10, (6,))


def test_terms(setting):
    model, x, x_adv, y = setting
    cross_entropy = nn.CrossEntropyLoss()
    natural = objective_terms("natural", model, x, None, y)
    assert list(natural) == ["natural_loss"]
    torch.testing.assert_close(natural["natural_loss"], cross_entropy(model(x), y))
    robust = objective_terms("pgd-at", model, x, x_adv, y, label_smoothing=0.1)
    torch.testing.assert_close(robust["robust_loss"], nn.CrossEntropyLoss(label_smoothing=0.1)(model(x_adv), y))
    trades = objective_terms("trades", model, x, x_adv, y, beta=6.0)
    torch.testing.assert_close(trades["natural_loss"], cross_entropy(model(x), y))
    clean, adversarial = model(x).softmax(-1), model(x_adv).softmax(-1)
    divergence = (clean * (clean.log() - adversarial.log())).sum(-1).mean()
    torch.testing.assert_close(trades["robust_loss"], 6.0 * divergence)


def test_trades_without_perturbation_has_no_robust_term(setting):
    model, x, _, y = setting
    assert objective_terms("trades", model, x, None, y)["robust_loss"].abs() < 1e-12


def test_trades_runs_one_forward(setting):
    model, x, x_adv, y = setting
    batches = []
    objective_terms("trades", lambda z: batches.append(len(z)) or model(z), x, x_adv, y)
    assert batches == [12]


def test_mart_follows_its_formula(setting):
    """Equation 8 and the weighted divergence, written with probabilities."""
    model, x, x_adv, y = setting
    terms = objective_terms("mart", model, x, x_adv, y, beta=5.0)
    clean, adversarial = model(x).softmax(-1), model(x_adv).softmax(-1)
    rows = torch.arange(len(y))
    others = adversarial.clone()
    others[rows, y] = 0
    boosted = -adversarial[rows, y].log() - (1 - others.amax(-1)).log()
    divergence = (clean * (clean.log() - adversarial.log())).sum(-1)
    torch.testing.assert_close(terms["robust_loss"], boosted.mean())
    torch.testing.assert_close(terms["consistency_loss"], 5 * (divergence * (1 - clean[rows, y])).mean())


@pytest.mark.parametrize("label", [0, 1])
def test_mart_is_finite_with_a_gradient_where_probabilities_round(label):
    logits = torch.tensor([[60.0, -60.0, 0.0]], requires_grad=True)
    pixels, y = torch.zeros(1, 1), torch.tensor([label])
    terms = objective_terms("mart", lambda x: logits.repeat(2, 1), pixels, pixels, y)
    sum(terms.values()).backward()
    assert all(torch.isfinite(value) for value in terms.values()) and torch.isfinite(logits.grad).all()
    if label == 1:  # pushes down the wrong class that is taken for certain
        assert logits.grad[0, 0] > 1.5


def test_unknown_objective(setting):
    model, x, x_adv, y = setting
    with pytest.raises(ValueError, match="'gairat' is unknown; use one of natural, pgd-at, trades, mart"):
        objective_terms("gairat", model, x, x_adv, y)
