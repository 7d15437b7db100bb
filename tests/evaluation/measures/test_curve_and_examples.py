"""Security curves against a classifier whose margins are known; adversarial examples are what they claim to be."""

import json

import pytest
import torch
from torch import nn

from tscnc_hf.artifact.card.robustness_figures import curve_figure, examples_figure
from tscnc_hf.evaluation.measures.curve import default_epsilons, security_curve
from tscnc_hf.evaluation.measures.examples import adversarial_examples
from tscnc_hf.evaluation.measures.robustness_report import wilson_interval


class Brightness(nn.Module):
    """Two classes: is the mean pixel above a half? Within epsilon (L-infinity) the mean moves by exactly epsilon."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(20.0))

    def forward(self, x):
        score = self.scale * (x.flatten(1).mean(1) - 0.5)
        return torch.stack([-score, score], 1)


@pytest.fixture
def grey():
    """60 uniform images whose distance to a half is 0.005, 0.01, ... 0.3: image k falls from there on."""
    distances = torch.arange(1, 61) * 0.005
    signs = torch.arange(60) % 2 * 2 - 1
    return [
        {"pixel_values": torch.full((3, 4, 4), float(0.5 + s * d)), "labels": int(s > 0)}
        for s, d in zip(signs, distances, strict=True)
    ]


def test_the_curve_of_a_known_classifier(grey, as_they_are):
    curve = security_curve(
        Brightness(), grey, ["0.2021", 0.0521, 0.1021], attack="pgd-10", processing_class=as_they_are
    )
    assert [(point.epsilon, point.correct) for point in curve.points] == [
        (0.0, 60), (0.0521, 50), (0.1021, 40), (0.2021, 20),
    ]  # fmt: skip
    assert (curve.points[1].low, curve.points[1].high) == wilson_interval(50, 60)
    assert json.loads(json.dumps(curve.to_dict())) == curve.to_dict()
    assert len(curve.to_markdown().splitlines()) == 6


def test_a_curve_never_rises_and_ends_where_nothing_is_left(robust_network, digits, as_they_are):
    curve = security_curve(
        robust_network, digits.test, default_epsilons(0.2, "linf"), n=60, attack="pgd-5", processing_class=as_they_are
    )
    correct = [point.correct for point in curve.points]
    assert correct == sorted(correct, reverse=True) and correct[0] > 50 and correct[-1] == 0
    assert [point.epsilon for point in curve.points] == pytest.approx([0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.8])
    assert max(default_epsilons(0.5, "linf")) <= 1 < max(default_epsilons(0.5, "l2"))


@pytest.mark.parametrize("norm, epsilon", [("linf", 0.15), ("l2", 1.0)])
def test_examples_are_within_the_ball_and_what_the_model_says(norm, epsilon, robust_network, digits, as_they_are):
    found = adversarial_examples(
        robust_network, digits.test, epsilon=epsilon, norm=norm, count=20, processing_class=as_they_are
    )
    assert found.clean.shape == found.adversarial.shape == (20, 3, 8, 8)
    assert torch.equal(robust_network(found.clean).argmax(-1), found.labels)
    assert torch.equal(robust_network(found.adversarial).argmax(-1), found.predictions)
    assert 0 < (found.predictions != found.labels).sum() < 20
    change = (found.adversarial - found.clean).flatten(1)
    size = change.abs().amax(1) if norm == "linf" else change.norm(dim=1)
    assert size.max() <= epsilon + 1e-6 and 0 <= found.adversarial.min() and found.adversarial.max() <= 1
    figure = examples_figure(**found.for_figure([f"class {i}" for i in range(10)]))
    held = int((found.predictions == found.labels).sum())
    assert f"{held} of 20 still named correctly" in figure.get_suptitle() and len(figure.axes) == 60
    assert figure.axes[0].get_title() == f"class {found.labels[0]}"


def test_no_example_of_a_model_that_is_always_wrong(digits, as_they_are):
    class Wrong(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return torch.full((len(x), 11), -1.0).index_fill(1, torch.tensor([10]), 1.0) + self.weight * x.sum()

    assert adversarial_examples(Wrong(), digits.test, epsilon=0.1, processing_class=as_they_are) is None


def test_what_has_no_curve(grey, as_they_are):
    with pytest.raises(ValueError, match="attack='clean' has no radius"):
        security_curve(Brightness(), grey, [0.1], attack="clean", processing_class=as_they_are)
    with pytest.raises(ValueError, match="attack='clean' makes no adversarial examples"):
        adversarial_examples(Brightness(), grey, epsilon=0.1, attack="clean", processing_class=as_they_are)
    with pytest.raises(ValueError, match=r"epsilons='8/255' is one radius: give a list .*\['8/255'\]"):
        security_curve(Brightness(), grey, "8/255", processing_class=as_they_are)
    with pytest.raises(ValueError, match="epsilon=8 is outside"):
        security_curve(Brightness(), grey, [8], processing_class=as_they_are)
    for wrong, message in (
        ({"n": -1}, "n=-1: give 1 or more"),
        ({"n": 2.5}, "n=2.5: give a whole number, 1 or more"),
        ({"batch_size": 0}, "batch_size=0: give 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            security_curve(Brightness(), grey, [0.1], processing_class=as_they_are, **wrong)
    for wrong, message in (({"count": 0}, "count=0: give 1 or more"), ({"n": -1}, "n=-1: give 1 or more")):
        with pytest.raises(ValueError, match=message):
            adversarial_examples(Brightness(), grey, epsilon=0.1, processing_class=as_they_are, **wrong)
    with pytest.raises(ValueError, match="the data set has no images"):
        security_curve(Brightness(), [], [0.1], processing_class=as_they_are)


def test_the_drawn_curve_is_the_one_given(grey, as_they_are):
    curve = security_curve(Brightness(), grey, [0.1], attack="pgd-10", processing_class=as_they_are).to_dict()
    figure = curve_figure(curve, curve | {"points": [p | {"accuracy": 0.5} for p in curve["points"]]})
    twin, own = figure.axes[0].get_lines()
    assert list(own.get_ydata()) == [point["accuracy"] for point in curve["points"]]
    assert list(own.get_xdata()) == pytest.approx([0, 25.5]) and list(twin.get_ydata()) == [0.5, 0.5]
    assert figure.axes[0].get_legend() is not None and curve_figure(curve).axes[0].get_legend() is None
