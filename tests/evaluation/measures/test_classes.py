"""Accuracies of uneven classes, in numbers, and networks that have collapsed told from honest ones."""

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, confusion_matrix
from torch import nn

from tscnc_hf.artifact.card.formatting import collapse_text
from tscnc_hf.evaluation.measures.classes import balanced_accuracy, collapse, confusion, worst_class
from tscnc_hf.evaluation.measures.examples import AdversarialExamples
from tscnc_hf.evaluation.measures.robustness import evaluate_robustness
from tscnc_hf.evaluation.measures.robustness_report import RobustnessReport


class Pixels:
    image_mean, image_std = [0.0], [1.0]


def uneven(n: int, share: float, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random(n) > share).astype(int)


@pytest.mark.parametrize("seed", range(5))
def test_as_scikit_learn_has_them(seed):
    draw = np.random.default_rng(seed)
    labels, guesses = draw.choice(4, 200, p=[0.7, 0.2, 0.09, 0.01]), draw.integers(0, 5, 200)
    found = confusion(labels, guesses)
    table = confusion_matrix(labels, guesses)
    assert all(found[label].get(guess, 0) == table[label, guess] for label in found for guess in range(5))
    in_classes = {label: np.mean(guesses[labels == label] == label) for label in np.unique(labels)}
    assert balanced_accuracy(found) == pytest.approx(np.mean(list(in_classes.values())))
    if set(guesses) <= set(labels):
        assert balanced_accuracy(found) == pytest.approx(balanced_accuracy_score(labels, guesses))
    worst = worst_class(found)
    assert worst["accuracy"] == min(in_classes.values()) == in_classes[worst["label"]]
    assert worst["n"] == (labels == worst["label"]).sum()


@pytest.mark.parametrize("share", [0.5, 0.71, 0.95, 0.99])
def test_a_constant_answer_has_collapsed_and_an_honest_one_has_not(share):
    labels = uneven(1000, share)
    assert collapse(confusion(labels, np.zeros(1000, int)))["largest_class"] == pytest.approx(
        max((labels == 0).mean(), (labels == 1).mean())
    )
    rare = collapse(confusion(labels, np.ones(1000, int)))  # also where it is the rare class that is named
    assert rare["class"] == 1 and rare["share"] == 1
    honest = labels.copy()
    honest[np.flatnonzero(labels == 1)[: int(0.6 * (labels == 1).sum())]] = 0  # it misses most of the rare class
    assert collapse(confusion(labels, honest)) is None
    nearly = np.zeros(1000, int)
    nearly[np.flatnonzero(labels == 1)[: int(0.02 * (labels == 1).sum())]] = 1
    assert collapse(confusion(labels, nearly)) is not None


def test_swapped_classes_one_class_and_few_images_are_no_collapse():
    labels = uneven(100, 0.5)
    assert collapse(confusion(labels, 1 - labels)) is None
    assert collapse(confusion(np.zeros(100, int), np.zeros(100, int))) is None
    assert collapse(confusion([0, 1, 2], [1, 1, 1])) is None
    assert collapse(confusion(np.arange(100), np.arange(100) % 10)) is None


class Dead(nn.Module):
    """Reads its input through a layer of zeros."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(48, 8), nn.Linear(8, 3)
        nn.init.zeros_(self.stem.weight)

    def forward(self, x):
        return self.head(self.stem(x.flatten(1) - 0.5))


def items(labels) -> list[dict]:
    pixels = torch.rand(len(labels), 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return [{"pixel_values": x, "labels": int(y)} for x, y in zip(pixels, labels, strict=True)]


@pytest.mark.parametrize("labels", [[0] * 30, [0] * 20 + [1] * 5 + [2] * 5, [2] * 12])
def test_a_dead_network_is_found_also_where_its_answer_is_right(labels):
    torch.manual_seed(0)
    model, options = Dead(), {"epsilon": 0.1, "processing_class": Pixels, "progress": False, "masking": False}
    report = evaluate_robustness(model, items(labels), ("clean", "pgd-2"), **options)
    assert report.collapsed is not None and "**Collapsed:** the network has collapsed" in report.to_markdown()
    assert bool(report.collapsed.get("constant")) == (set(labels) == {model.head.bias.argmax().item()})
    nn.init.normal_(model.stem.weight, std=5)
    assert evaluate_robustness(model, items([0, 1, 2] * 10), ("clean",), **options).collapsed is None


def test_a_report_has_classes_and_goes_through_json():
    torch.manual_seed(0)
    labels = [0] * 30 + [1] * 6 + [2] * 4
    report = evaluate_robustness(
        nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), items(labels), ("clean", "pgd-2", "fgsm"), epsilon=0.02,
        processing_class=Pixels, progress=False,
    )  # fmt: skip
    for attack in report.attacks:
        shares = {label: row[attack.name] / row["n"] for label, row in report.per_class.items()}
        assert attack.balanced_accuracy == pytest.approx(sum(shares.values()) / 3)
        assert attack.worst_class["accuracy"] == min(shares.values())
    worst = report.worst_case
    assert sum(row.get(label, 0) for label, row in report.confusion.items()) == worst.correct
    assert sum(sum(row.values()) for row in report.confusion.values()) == 40
    assert worst.balanced_accuracy <= min(attack.balanced_accuracy for attack in report.attacks)
    again = RobustnessReport.from_dict(report.to_dict())
    assert again.confusion == report.confusion and again.to_dict() == report.to_dict()


def test_the_sentence_names_the_class_and_what_is_empty():
    found = {"class": 1, "share": 1.0, "largest_class": 0.71}
    text = collapse_text(found, ["a.weight", "b.weight", "c.weight", "d.weight"], {0: "sound", 1: "defect"})
    assert "class 1 (defect) for 100.0% of the images, of which 71.0%" in text and "c.weight and 1 more" in text


def test_an_output_beyond_the_names_of_the_data_is_called_by_its_number():
    found = {"class": 7, "share": 1.0}
    for names in (["bird", "cat", "dog"], {0: "bird", 1: "cat"}, None):
        assert collapse_text(found, (), names).startswith("the network has collapsed: it names class 7 for 100.0%")
    some = AdversarialExamples(*[torch.zeros(2, 1, 2, 2)] * 2, torch.tensor([0, 2]), torch.tensor([7, 1]), "", "", 0)
    shown = some.for_figure(["bird", "cat", "dog"])
    assert shown["truth"] == ["bird", "dog"] and shown["guesses"] == ["7", "cat"]
    assert some.for_figure()["truth"] == ["0", "2"]
