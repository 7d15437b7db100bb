"""Figures that are not of all images are of a sample, the same for all of them; nothing is a prefix."""

import pytest
import torch
from torch import nn

from tscnc_hf.evaluation import run
from tscnc_hf.evaluation.measures.curve import security_curve
from tscnc_hf.evaluation.measures.examples import adversarial_examples
from tscnc_hf.evaluation.measures.lipschitz import evaluate_lipschitz
from tscnc_hf.evaluation.measures.robustness import evaluate_robustness
from tscnc_hf.evaluation.run import evaluate
from tscnc_hf.evaluation.subset import drawn


class Pixels:
    image_mean, image_std = [0.0], [1.0]


class Watched(list):
    """Items sorted by class, of which class 0 is dark and class 1 light; it knows which were read."""

    def __init__(self, n: int, share: float):
        labels = [int(place >= share * n) for place in range(n)]
        noise = torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 0.2
        super().__init__(
            {"pixel_values": x + 0.5 * y, "labels": y, "place": i}
            for i, (x, y) in enumerate(zip(noise, labels, strict=True))
        )
        self.read = set()

    def __getitem__(self, place):
        self.read.add(int(place))
        return super().__getitem__(place)


class Light(nn.Module):
    """Names class 1 for light images; with `wrong`, for dark ones."""

    def __init__(self, wrong: bool = False):
        super().__init__()
        self.linear = nn.Linear(16, 2)
        sign = -1.0 if wrong else 1.0
        self.linear.weight.data = sign * torch.stack([-torch.ones(16), torch.ones(16)])
        self.linear.bias.data = sign * torch.tensor([0.35 * 16, -0.35 * 16])

    def forward(self, x):
        return self.linear(x.flatten(1))


OPTIONS = {"epsilon": 0.01, "processing_class": Pixels}


def shares(data: Watched) -> float:
    return sum(data.__class__.__base__.__getitem__(data, place)["labels"] for place in data.read) / len(data.read)


@pytest.mark.parametrize(
    "measure",
    [
        lambda data: security_curve(Light(), data, [0.01], attack="pgd-1", n=60, processing_class=Pixels),
        lambda data: evaluate_lipschitz(Light(), data, n=60, steps=1, **OPTIONS),
        lambda data: adversarial_examples(Light(), data, n=60, attack="pgd-1", **OPTIONS),
        lambda data: evaluate_robustness(
            Light(), data, ("clean",), n=60, progress=False, masking=False, **OPTIONS
        ),
    ],
)  # fmt: skip
def test_each_figure_is_of_the_same_drawn_images(measure):
    data = Watched(400, 0.7)
    measure(data)
    assert data.read == set(drawn(400, 60, 0)) and 0.1 < shares(data) < 0.5


def test_the_checks_are_of_images_that_were_drawn_and_of_another_seed_of_others():
    for seed in (0, 1):
        data = Watched(500, 0.7)
        report = evaluate_robustness(
            Light(), data, "pgd-1", n=500, seed=seed, progress=False, masking=False, **OPTIONS
        )
        assert report.n == 500
        data.read.clear()
        report = evaluate_robustness(Light(), data, "pgd-1", n=64, seed=seed, progress=False, **OPTIONS)
        assert data.read == set(drawn(500, 64, seed)) and report.masking["n"] == report.masking["looked_at"] == 64
    assert set(drawn(500, 64, 0)) != set(drawn(500, 64, 1))


def test_fewer_are_among_more_and_more_than_there_are_is_all():
    for size in (1, 10, 1000):
        assert sorted(drawn(size, size, 3)) == sorted(drawn(size, 5000, 3)) == list(range(size))
    assert drawn(1000, 64, 3) == drawn(1000, 256, 3)[:64] and len(set(drawn(1000, 256, 3))) == 256


def test_curve_and_table_agree_where_the_set_is_sorted():
    data = Watched(300, 0.7)
    half_wrong = Light()
    half_wrong.linear.bias.data += torch.tensor([10.0, -10.0])  # names class 0 always
    results = evaluate(half_wrong, data, attacks=("clean", "pgd-1"), progress=False, **OPTIONS)
    assert results["robustness"]["attacks"][0]["accuracy"] == 0.7 and list(results)[0] == "collapsed"
    assert results["collapsed"]["class"] == 0 and results["collapsed"]["largest_class"] == 0.7
    assert results["curve"]["n"] == 256 and results["curve"]["points"][0]["accuracy"] == pytest.approx(0.7, abs=0.06)


def test_checks_without_images_were_not_run():
    report = evaluate_robustness(Light(wrong=True), Watched(100, 0.5), "pgd-1", progress=False, **OPTIONS)
    assert report.masking == {"n": 0, "looked_at": 64, "suspicious": None, "checks": []}
    assert "Not run: none of the 64 images" in report.masking_markdown() and "Suspicious" not in report.to_markdown()


def test_examples_are_of_several_classes(monkeypatch):
    examples = adversarial_examples(Light(), Watched(300, 0.5), attack="pgd-1", **OPTIONS)
    assert len(examples.labels) == 8 and set(examples.labels.tolist()) == {0, 1}
    assert run.FEW_IMAGES == 256
