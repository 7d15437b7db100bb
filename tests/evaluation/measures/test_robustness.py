"""Robust accuracy of classifiers whose robust accuracy is known, intervals against scipy, and what must not change."""

import json

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from torch import nn

import tscnc_hf
from tscnc_hf.data.image_datasets import ImageTensorDataset
from tscnc_hf.evaluation.attacks import make_attack, pgd_step_size
from tscnc_hf.evaluation.measures.robustness import evaluate_robustness
from tscnc_hf.evaluation.measures.robustness_report import wilson_interval
from tscnc_hf.evaluation.subset import drawn


class Pixels:
    """Says that a model takes pixels as they are."""

    image_mean, image_std = [0.0], [1.0]


class Linear(nn.Module):
    """Two classes: logits (0, w . x + b). Within epsilon the score of x moves by exactly epsilon |w|_1, unclamped."""

    def __init__(self, w: torch.Tensor, b: float):
        super().__init__()
        self.w, self.b = nn.Parameter(w), nn.Parameter(torch.tensor(b))

    def forward(self, x):
        score = x.flatten(1) @ self.w + self.b
        return torch.stack([torch.zeros_like(score), score], 1)


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.0, 3.0, 1.0]))

    def forward(self, x):
        return self.logits.expand(len(x), 3) + 0 * x.flatten(1).sum(1, keepdim=True)


class Batched(nn.Module):
    """With batch norm and dropout, in whatever modes its parts are."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(8 * 36, 10)
        )

    def forward(self, x):
        return self.body(x)


def accuracies(report) -> dict[str, int]:
    return {attack.name: attack.correct for attack in report.attacks}


def items(count: int, labels=None) -> list[dict]:
    pixels = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 0.4 + 0.3
    labels = torch.arange(count) % 3 if labels is None else labels
    return [{"pixel_values": x, "labels": int(y)} for x, y in zip(pixels, labels, strict=True)]


# ---- the interval ----


@pytest.mark.parametrize(("correct", "n"), [(0, 10), (10, 10), (1, 1), (7, 10), (500, 1000), (9999, 10000)])
def test_wilson_interval_is_that_of_scipy(correct, n):
    expected = binomtest(correct, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(correct, n) == pytest.approx((expected.low, expected.high), abs=1e-7)


def test_wilson_interval_in_closed_form():
    z = 1.959964
    assert wilson_interval(0, 20) == pytest.approx((0, z**2 / (20 + z**2)), abs=1e-12)
    assert wilson_interval(20, 20) == pytest.approx((20 / (20 + z**2), 1), abs=1e-12)
    assert all(wilson_interval(0, n)[0] == 0.0 and wilson_interval(n, n)[1] == 1.0 for n in range(1, 300))
    assert all(0 <= bound <= 1 for k in range(8) for bound in wilson_interval(k, 7))


# ---- known truths ----


def test_a_constant_classifier_has_the_accuracy_of_its_class():
    report = evaluate_robustness(
        Constant(), items(31), ("clean", "fgsm", "pgd-3"), epsilon=0.2, processing_class=Pixels, progress=False
    )
    assert accuracies(report) == {"clean": 10, "fgsm": 10, "pgd-3": 10}
    assert report["clean"].accuracy == 10 / 31 and report.n == 31
    assert (report["clean"].low, report["clean"].high) == wilson_interval(10, 31)


@pytest.mark.parametrize("epsilon", [0.0, 0.005, 0.02, 0.1, "13/255"])
@pytest.mark.parametrize("attack", ["fgsm", "pgd-1", "pgd-10"])
def test_a_linear_classifier_loses_exactly_the_images_within_reach(epsilon, attack):
    generator = torch.Generator().manual_seed(2)
    w = torch.randn(48, generator=generator)
    data = items(200, labels=torch.randint(2, (200,), generator=generator))
    pixels = torch.stack([item["pixel_values"] for item in data])
    model = Linear(w, float(0.0123 - (pixels.flatten(1) @ w).median()))

    radius = 13 / 255 if epsilon == "13/255" else epsilon
    score = pixels.flatten(1).double() @ w.double() + model.b.item()
    margin = torch.tensor([item["labels"] * 2 - 1 for item in data]) * score
    clean, robust = int((margin > 0).sum()), int((margin > radius * w.double().abs().sum()).sum())
    assert not (margin.abs() < 1e-5).any() and not ((margin - radius * w.abs().sum()).abs() < 1e-5).any()
    report = evaluate_robustness(
        model, data, ("clean", attack), epsilon=epsilon, processing_class=Pixels, batch_size=64, progress=False
    )
    if attack == "pgd-1":  # one step of size epsilon from inside the ball need not reach its corner
        assert report["clean"].correct == clean
        assert robust <= report[attack].correct <= clean
    else:
        assert accuracies(report) == {"clean": clean, attack: robust}
    assert robust < clean or radius == 0


def test_in_l2_a_linear_classifier_loses_exactly_the_images_within_reach():
    """Within epsilon the score moves by epsilon |w|_2; pixels are far enough from 0 and 1 not to be cut."""
    generator = torch.Generator().manual_seed(5)
    w = torch.randn(48, generator=generator)
    data = items(200, labels=torch.randint(2, (200,), generator=generator))
    pixels = torch.stack([item["pixel_values"] for item in data])
    model = Linear(w, float(0.0123 - (pixels.flatten(1) @ w).median()))
    margin = torch.tensor([item["labels"] * 2 - 1 for item in data]) * (pixels.flatten(1) @ w + model.b.detach())
    reach = 0.15 * w.norm()
    assert not ((margin - reach).abs() < 1e-4).any()
    report = evaluate_robustness(
        model, data, ("clean", "fgsm", "pgd-10"), epsilon=0.15, norm="l2", processing_class=Pixels, progress=False
    )
    assert report["fgsm"].correct == int((margin > reach).sum())
    # from a random start the direction is reached in the limit only
    assert report["fgsm"].correct <= report["pgd-10"].correct <= report["fgsm"].correct + 3
    assert 0 < report["fgsm"].correct < report["clean"].correct and report.threat_model["norm"] == "l2"


def test_pixels_stay_in_the_ball_and_in_range():
    """At 0 and 1 there is nowhere to go but inwards."""
    seen = []

    class Watched(Linear):
        def forward(self, x):
            seen.append(x.detach())
            return super().forward(x)

    data = [{"pixel_values": torch.full((3, 4, 4), float(i % 2)), "labels": i % 2} for i in range(8)]
    model = Watched(torch.ones(48), -24.0)
    options = {"epsilon": 0.3, "processing_class": Pixels, "progress": False, "masking": False}
    report = evaluate_robustness(model, data, ("clean", "pgd-5"), **options)
    assert accuracies(report) == {"clean": 8, "pgd-5": 8}
    attacked = torch.cat(seen[1:])
    assert attacked.min() >= 0 and attacked.max() <= 1
    distance = torch.minimum(attacked, 1 - attacked)
    assert 0.29 < distance.max() <= 0.3 + 1e-6


def test_step_sizes_as_documented():
    assert pgd_step_size(0.1, 20) == pytest.approx(0.0125)
    assert pgd_step_size(0.1, 1) == 0.1
    clean = make_attack("clean", 0.1)
    assert clean.run is None and clean.parameters == {}
    assert make_attack("pgd-20", 0.1).parameters == {
        "steps": 20, "step_size": pytest.approx(0.0125), "restarts": 1, "random_start": True, "loss": "cross-entropy",
        "early_stop": True, "implementation": "tscnc_hf", "version": tscnc_hf.__version__, "precision": "float32",
    }  # fmt: skip
    assert make_attack("fgsm", 0.1).parameters["random_start"] is False
    assert make_attack("cw-7x3", 0.1).parameters["loss"] == "cw"
    assert make_attack("cw-7x3", 0.1).parameters["restarts"] == 3
    assert make_attack("apgd-dlr", 0.1).parameters["loss"] == "dlr"


# ---- what it must not depend on, and not change ----


def batched() -> Batched:
    torch.manual_seed(4)
    model = Batched()
    model.train()
    for _ in range(20):
        model(torch.rand(16, 3, 8, 8))
    return model


def digits_like(count: int = 90) -> ImageTensorDataset:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    model = batched().eval()
    with torch.no_grad():
        labels = model(images.float() / 255).argmax(-1)
    return ImageTensorDataset(images, labels, [str(i) for i in range(10)])


def evaluate(model, data, **options):
    defaults = {"attacks": ("clean", "pgd-4"), "epsilon": "4/255", "processing_class": Pixels, "progress": False}
    return evaluate_robustness(model, data, **(defaults | options))


def test_the_model_and_the_global_random_state_are_left_alone():
    model, data = batched(), digits_like()
    model.body[1].eval()  # modes that differ from module to module
    model.body[0].weight.grad = torch.ones_like(model.body[0].weight)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random = torch.random.get_rng_state()
    first = evaluate(model, data)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert (model.body[0].weight.grad == 1).all() and model.body[5].weight.grad is None
    assert all(parameter.requires_grad for parameter in model.parameters())
    torch.rand(10)
    assert evaluate(model, data) == first
    assert evaluate(model.eval(), data) == first
    assert first["clean"].correct == len(data)  # by construction: dropout and batch statistics would spoil it
    assert 0 < first["pgd-4"].correct < len(data)


def test_batch_size_does_not_change_clean_accuracy_and_order_of_attacks_changes_nothing():
    data = digits_like()
    wrong = ImageTensorDataset(data.images, data.labels.roll(1), data.class_names)
    reports = [evaluate(batched(), wrong, batch_size=size, attacks=("clean", "fgsm")) for size in (1, 7, 90, 1000)]
    assert len({report["clean"].correct for report in reports}) == 1
    assert len({report["fgsm"].correct for report in reports}) == 1  # no random start: nothing to draw
    assert 0 < reports[0]["clean"].correct < 90
    assert reports[0]["fgsm"].correct < reports[0]["clean"].correct
    alone = evaluate(batched(), data, attacks=("pgd-4",))["pgd-4"]
    assert evaluate(batched(), data, attacks=("fgsm", "clean", "pgd-4"))["pgd-4"] == alone


def test_the_seed_draws_other_starts():
    starts = []

    class Recording(Batched):
        def forward(self, x):
            if len(x) > 1:  # one image is sent through before
                starts.append(x.detach().clone())
            return super().forward(x)

    model, data = Recording(), digits_like(8)
    model.load_state_dict(batched().state_dict())
    for seed in (0, 0, 1):
        evaluate(model, data, seed=seed, masking=False)
    third = len(starts) // 3
    runs = [starts[index * third : (index + 1) * third] for index in range(3)]
    assert torch.equal(runs[0][0], runs[2][0])  # clean images
    assert torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(runs[0][1], runs[2][1])


def test_n_draws_images_with_the_seed():
    data = digits_like()
    flipped = ImageTensorDataset(data.images, data.labels.clone(), data.class_names)
    flipped.labels[40:] = (flipped.labels[40:] + 1) % 10
    for seed in (0, 1):
        report = evaluate(batched(), flipped, n=50, attacks=("clean",), seed=seed)
        assert report.n == report["clean"].n == 50
        assert report["clean"].correct == sum(place < 40 for place in drawn(90, 50, seed)) < 40


# ---- errors and reports ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n=0 of a data set of 12 images: give n between 1 and 12"),
        ({"n": 13}, "n=13 of a data set of 12"),
        ({"n": -1}, "n=-1"),
        ({"n": 1.5}, "n=1.5: give a whole number"),
        ({"n": True}, "n=True: give a whole number"),
        ({"batch_size": 0}, "batch_size=0: give 1 or more"),
        ({"batch_size": -1}, "batch_size=-1: give 1 or more"),
        ({"batch_size": 2.5}, "batch_size=2.5: give a whole number, 1 or more"),
        ({"seed": 0.5}, "seed=0.5: give a whole number"),
        ({"seed": None}, "seed=None: give a whole number"),
        ({"attacks": ("clean", "cw")}, "'cw' does not exist; known are clean, fgsm, pgd-K and cw-K"),
        ({"attacks": ("pgd-0",)}, "'pgd-0' does not exist"),
        ({"attacks": ("pgd",)}, "'pgd' does not exist"),
        ({"attacks": ()}, "no attack was named; known are"),
        ({"norm": "l1"}, "norm='l1' is unknown; use one of linf, l2"),
        ({"epsilon": 8}, "epsilon=8 is outside .0, 1."),
        ({"processing_class": None}, "cannot tell how Batched normalises"),
    ],
)
def test_wrong_requests(options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(batched(), digits_like(12), **options)


def test_numbers_of_numpy_are_numbers(tmp_path):
    """Plain ones, which can be written down, whatever they were given as."""
    given = {"n": np.int64(8), "seed": np.int64(1), "batch_size": np.int32(4), "epsilon": np.float32(0.25)}
    report = evaluate(batched(), digits_like(12), state_folder=tmp_path, **given)
    plain = {"n": 8, "seed": 1, "batch_size": 4, "epsilon": 0.25}
    assert evaluate(batched(), digits_like(12), state_folder=tmp_path, **plain) == report
    assert type(report.threat_model["seed"]) is int


def test_names_of_classes_break_no_table():
    report = evaluate(batched(), digits_like(), epsilon="8/255")
    names = {label: f"a|b\n{label}" for label in report.per_class}
    head, rule, *rows = report.per_class_markdown(names).splitlines()
    assert len(rows) == len(report.per_class) > 1
    for label, line in zip(report.per_class, rows, strict=True):
        assert line.startswith(f"| a\\|b {label} | ") and line.count("|") - 1 == head.count("|") == rule.count("|")


def test_an_empty_data_set():
    with pytest.raises(ValueError, match="the data set has no images"):
        evaluate(batched(), [])


def test_the_report_as_json_and_markdown():
    report = evaluate(batched(), digits_like(), epsilon="8/255", seed=3)
    again = json.loads(json.dumps(report.to_dict()))
    assert again == report.to_dict()
    assert again["threat_model"] == {"norm": "linf", "epsilon": 8 / 255, "seed": 3}
    assert again["n"] == 90 and set(again["versions"]) == {"tscnc_hf", "torch", "transformers"}
    clean, pgd = again["attacks"]
    assert (clean["name"], clean["correct"], clean["n"], clean["accuracy"]) == ("clean", 90, 90, 1.0)
    assert pgd["parameters"]["steps"] == 4 and pgd["low"] <= pgd["accuracy"] <= pgd["high"]
    lines = report.to_markdown().splitlines()
    assert len(lines) == 4
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    low = 90 / (90 + 1.959964**2)
    assert cells == ["clean", "100.0%", f"{low:.1%} to 100.0%", "90 of 90"]
    assert f"{pgd['correct']} of 90" in lines[3]
