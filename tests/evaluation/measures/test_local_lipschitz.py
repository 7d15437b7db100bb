"""`evaluate_lipschitz`: a data set in, plain figures out, the model untouched."""

import json
import math

import pytest
import torch
from torch import nn

from tscnc_hf.evaluation.measures.lipschitz import evaluate_lipschitz
from tscnc_hf.method.adversarial.pixels import Preprocessing
from tscnc_hf.method.reports.lipschitz import lipschitz_product
from tscnc_hf.method.resizing import Resize


@pytest.fixture
def linear():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 5))
    model.config = type("Config", (), {"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}})()
    return model.train()


def images(n):
    generator = torch.Generator().manual_seed(1)
    return [{"pixel_values": torch.rand(3, 4, 4, generator=generator), "labels": index % 5} for index in range(n)]


def test_normalisation_counts_and_the_report_is_plain(linear):
    report = evaluate_lipschitz(linear, images(7), epsilon="8/255", batch_size=3)
    # dividing pixels by 0.25 makes the map 4 times steeper: no one of 5 logits can exceed 4 times its row's l1 norm
    limit = 4 * linear[1].weight.abs().sum().item()
    assert len(report.local) == 7 and 0.2 * limit < max(report.local) <= limit * (1 + 1e-4)
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert plain["n"] == 7 and plain["epsilon"] == pytest.approx(8 / 255) and plain["local_max"] == max(report.local)
    norm = torch.linalg.matrix_norm(linear[1].weight, 2).item()
    assert 10 ** plain["product_log10"] == pytest.approx(norm, rel=1e-5)
    assert f"median over 7 images | {plain['local_median']:.4g} |" in report.to_markdown()


def test_the_resize_in_front_of_the_model_is_a_factor_of_the_product():
    """Nearest by 4 repeats each pixel 16 times: what a layer makes of it is up to 4 times as large."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 4, stride=4, bias=False), nn.Flatten(), nn.Linear(4 * 4 * 4, 5))
    resize = Resize(16, 16, "nearest")
    how = Preprocessing([0.5], [0.25], None, lambda height, width: resize)
    report = evaluate_lipschitz(model, images(3), processing_class=how, steps=2)
    assert list(report.product.bounds) == ["resize", "0.weight", "2.weight"] and report.product.bounds["resize"] == 4
    assert report.product.log10 == pytest.approx(lipschitz_product(model).log10 + math.log10(4))
    with torch.no_grad():
        model[0].weight.fill_(0.1)  # reads all 16 copies of a pixel alike: both bounds are met
    stretch = model[0](resize(torch.eye(48).reshape(48, 3, 4, 4))).flatten(1)
    product = 4 * lipschitz_product(model[0]).bounds["weight"]
    assert torch.linalg.matrix_norm(stretch, 2).item() == pytest.approx(product, rel=1e-5)


def test_twice_the_same_and_nothing_is_left_behind(linear):
    before, state = {k: v.clone() for k, v in linear.state_dict().items()}, torch.get_rng_state()
    first, second = (evaluate_lipschitz(linear, images(5), n=4) for _ in range(2))
    assert first == second and len(first.local) == 4
    assert torch.equal(state, torch.get_rng_state()) and all(module.training for module in linear.modules())
    assert all(torch.equal(before[k], v) for k, v in linear.state_dict().items())
    assert linear[1].weight.grad is None


@pytest.mark.parametrize(
    "options, message",
    [
        ({"epsilon": 8}, "8/255"),
        ({"epsilon": 0}, "above 0"),
        ({"n": 0}, "at least one image"),
        ({"n": 1.5}, "n=1.5: give a whole number"),
        ({"steps": 0}, "steps=0: give 1 or more"),
        ({"batch_size": 0}, "batch_size=0: give 1 or more"),
        ({"batch_size": -1}, "batch_size=-1: give 1 or more"),
    ],
)
def test_wrong_arguments(linear, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate_lipschitz(linear, images(2), **options)
