"""An attack that cannot be run on a model is refused before anything is trained or measured."""

import pytest
import torch
from torch import nn

from recipes import ablation, vit_cifar10
from tscnc_hf.evaluation.attacks import check_attacks, check_fit, make_attack
from tscnc_hf.evaluation.measures.robustness import evaluate_robustness
from tscnc_hf.training.trainer import TSCNCTrainer


class Pixels:
    image_mean, image_std = [0.0], [1.0]


def data(classes: int, shape=(1, 6, 6)) -> list[dict]:
    return [{"pixel_values": torch.rand(shape), "labels": i % classes} for i in range(8)]


@pytest.mark.parametrize(
    "name, classes, norm, shape, message",
    [
        ("autoattack", 3, "linf", (1, 6, 6), "'autoattack' needs at least 4 classes, there are 3; pgd-20"),
        ("autoattack", 2, "l2", (1, 6, 6), "needs at least 4 classes"),
        ("apgd-dlr", 2, "linf", (1, 6, 6), "'apgd-dlr' needs at least 3 classes"),
        ("pgd-3", 1, "linf", (1, 6, 6), "needs at least 2 classes, there are 1: with one class no answer is wrong"),
        ("cw-3", 1, "l2", (1, 6, 6), "needs at least 2 classes"),
        ("square", 4, "l2", (3, 4, 32), "at least 5 pixels in height .*these have 4"),
        ("autoattack", 10, "l2", (1, 1, 1), "at least 5 pixels in height"),
        ("square", 4, "l2", (1, 12, 12), "images of 12x12: .*, of 2 pixels, .*, such as 13x13, or take pgd-20"),
        ("autoattack", 4, "l2", (1, 28, 40), "'autoattack' in l2 cannot start on images of 28x40: .* 40x40"),
    ],
)
def test_what_does_not_fit_is_refused_in_words_before_an_image_is_attacked(name, classes, norm, shape, message):
    pytest.importorskip("pyautoattack", reason="pyautoattack is not installed (tscnc-hf[eval])")
    with pytest.raises(ValueError, match=message):
        check_attacks(["clean", name], classes, epsilon=0.1, norm=norm, image_size=shape[1:])
    model = nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(shape).numel(), classes))
    options = {"epsilon": 0.1, "norm": norm, "processing_class": Pixels, "progress": False}
    with pytest.raises(ValueError, match=message):
        evaluate_robustness(model, data(classes, shape), ("clean", name), **options)


@pytest.mark.parametrize(
    "name, classes, norm, height", [("square", 2, "l2", 5), ("apgd-dlr", 3, "linf", 1), ("fgsm", 2, "l2", 1)]
)
def test_what_fits_barely_runs(name, classes, norm, height):
    pytest.importorskip("pyautoattack", reason="pyautoattack is not installed (tscnc-hf[eval])")
    check_attacks(name, classes, epsilon=0.05, norm=norm, image_size=(height, height))
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(height**2, classes)), torch.rand(2, 1, height, height)
    y = 1 - model(x).argmax(-1).clamp(max=1)  # wrong already: a few queries of Square
    out = make_attack(name, 0.05, norm).run(model, x, y, torch.arange(2), 0)
    assert out.shape == x.shape


def test_the_sizes_that_square_can_tile_are_those_that_are_let_through():
    square = pytest.importorskip("pyautoattack.square", reason="pyautoattack is not installed (tscnc-hf[eval])")
    attack, label, sure = make_attack("square", 0.5, "l2"), torch.zeros(1, dtype=torch.int64), torch.eye(2)[:1]

    def runs(height: int, width: int) -> bool:
        there = square.SquareAttack(lambda x: sure, norm="L2", eps=0.5, n_queries=2, device="cpu", seed=0)
        there.init_hyperparam(x := torch.rand(1, 1, height, width))
        try:
            there.attack_single_run(x, label)
        except RuntimeError as error:
            assert "match" in str(error)
            return False
        return True

    def fits(height: int, width: int) -> bool:
        try:
            check_fit(attack, 2, (height, width))
        except ValueError:
            return False
        return True

    heights = (5, 9, 12, 13, 14, 16, 18, 19, 20, 24, 28, 32)
    sizes = [(height, width) for height in heights for width in (2, 4, *heights, 35, 40, 48, 64)]
    found = {size: fits(*size) for size in sizes}
    assert found == {size: runs(*size) for size in sizes} and len(set(found.values())) == 2
    assert not any(found[size] for size in ((12, 12), (24, 24), (32, 48), (28, 40))) and found[32, 64]


def test_no_attack_is_refused():
    with pytest.raises(ValueError, match="no attack was named; known are clean"):
        check_attacks([], 10)


@pytest.mark.parametrize(
    "names, message",
    [
        (["clean", None], "attack None is no name; known are clean"),
        ([["clean"]], r"attack \['clean'\] is no name"),
        ((), "no attack was named; known are clean"),
        (None, "no attack was named"),
    ],
)
def test_what_is_no_list_of_names_is_refused(names, message):
    model, options = nn.Sequential(nn.Flatten(), nn.Linear(36, 4)), {"processing_class": Pixels, "progress": False}
    for given in (names, iter(names or ())):  # an iterator is true, whatever it gives
        with pytest.raises(ValueError, match=message):
            evaluate_robustness(model, data(4), given, **options)
    with pytest.raises(ValueError, match=message):
        check_attacks(iter(names or ()), 4)


def test_names_that_are_given_one_by_one_or_twice():
    model, options = nn.Sequential(nn.Flatten(), nn.Linear(36, 4)), {"processing_class": Pixels, "progress": False}
    report = evaluate_robustness(model, data(4), iter(["clean", "fgsm", "clean"]), masking=False, **options)
    assert [attack.name for attack in report.attacks] == ["clean", "fgsm"]


def test_recipes_refuse_before_training(monkeypatch, tmp_path):
    pytest.importorskip("pyautoattack", reason="pyautoattack is not installed (tscnc-hf[eval])")
    monkeypatch.setattr(TSCNCTrainer, "train", None)
    same = ["--dataset", "digits", "--augmentation", "none", "--output_dir", str(tmp_path), "--use_cpu", "true"]
    same += ["--train_limit", "40", "--report_to", "none", "--norm", "l2", "--image_size", "4"]
    for recipe, options in ((vit_cifar10, []), (ablation, ["--results", str(tmp_path / "rows.jsonl")])):
        with pytest.raises(SystemExit, match="error: attack 'square' in l2 needs images of at least 5 pixels"):
            recipe.main([*same, *options, "--test_attacks", "clean", "square"])
