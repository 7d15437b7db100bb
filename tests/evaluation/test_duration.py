"""How long an evaluation will take is told before it starts."""

import pytest
import torch
from torch import nn

from tscnc_hf.evaluation.attacks import make_attack
from tscnc_hf.evaluation.duration import estimate, estimate_text, passes
from tscnc_hf.evaluation.run import evaluate


class Pixels:
    image_mean, image_std = [0.0], [1.0]


class Counted(nn.Module):
    """Right for every image whatever happens to it, so that attacks take all their steps; counts forwards."""

    def __init__(self):
        super().__init__()
        self.linear, self.images, self.gradients = nn.Linear(16, 2), 0, 0
        nn.init.zeros_(self.linear.weight)

    def forward(self, x):
        self.images += len(x)
        self.gradients += len(x) * x.requires_grad
        return self.linear(x.flatten(1)) + torch.tensor([9.0, 0.0])


DATA = [{"pixel_values": torch.rand(1, 4, 4), "labels": 0} for _ in range(12)]


@pytest.mark.parametrize("name", ["clean", "fgsm", "pgd-7", "pgd-3x4", "cw-5", "apgd"])
def test_steps_are_counted_as_they_are_taken(name):
    attack, model = make_attack(name, 0.1), Counted()
    gradients, forwards = passes(attack)
    if attack.run is None:
        assert (gradients, forwards) == (0, 1)
        return
    x, y = torch.stack([item["pixel_values"] for item in DATA]), torch.zeros(12, dtype=torch.int64)
    attack.run(model, x, y, torch.arange(12), 0)
    assert model.gradients == pytest.approx(12 * gradients, rel=0.02)


def test_the_strong_ones_cost_what_their_parameters_say():
    pytest.importorskip("pyautoattack", reason="pyautoattack is not installed (tscnc-hf[eval])")
    assert passes(make_attack("square", 0.1)) == (0, 5001)
    assert passes(make_attack("autoattack", 0.1)) == (1900, 5001)


def test_sums_and_words():
    found = estimate(
        [make_attack("clean", 0.1), make_attack("pgd-20", 0.1)], 1000, 0.01, 0.001, few=256, checked=64, lipschitz=True
    )
    assert found["attacks"] == pytest.approx(1000 * (20 * 0.01 + 0.001 + 0.001))
    text = estimate_text(found, full=True)
    assert "attacks 3 min" in text and "curve 5 min" in text and "--full false" in text
    assert estimate_text(found, full=False) == "At most about 3 min"
    assert estimate([make_attack("clean", 0.1)], 10, 1, 1, few=1, checked=1, lipschitz=True) == {"attacks": 10}


def test_it_is_said_at_the_start_and_what_comes_on_top_can_be_left_out(capsys, tmp_path):
    options = {"attacks": ("clean", "pgd-2"), "epsilon": 0.1, "processing_class": Pixels, "folder": tmp_path}
    model = Counted()
    results = evaluate(model, DATA, full=False, **options)
    said = capsys.readouterr().err
    assert said.startswith("At most about") and "curve" not in results and results["robustness"]["masking"] is None
    evaluate(model, DATA, full=False, **options)
    assert "At most" not in capsys.readouterr().err  # it goes on, and nothing is left to do
