"""Scores that rank weights of different layers, against their definitions."""

import numpy as np
import pytest
import torch
from torch import nn

from tscnc_hf.method.criteria import find_criterion
from tscnc_hf.method.matrices import weight_matrices
from tscnc_hf.method.pruning.pruner import Pruner


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 16), nn.Linear(16, 4))


def lamp_of(weight):
    """The definition, weight by weight in float64: w^2 over the sum of the squares that are no smaller."""
    squares = weight.double().square().flatten().numpy()
    return np.array([own / squares[squares >= own].sum() for own in squares]).reshape(weight.shape)


def test_lamp_is_its_definition():
    records = weight_matrices(network())
    scores = find_criterion("lamp").score(records, None)
    for record in records:
        np.testing.assert_allclose(scores[record.name].numpy(), lamp_of(record.weight.detach()), rtol=1e-5)


def test_lamp_ranks_within_a_layer_as_magnitude_does_and_gives_its_best_weight_one():
    for record in weight_matrices(network()):
        score = find_criterion("lamp").score([record], None)[record.name]
        assert torch.equal(score.flatten().argsort(), record.weight.abs().flatten().argsort())
        assert score.max() == 1


def test_zeros_come_last_and_a_layer_of_zeros_has_no_nan():
    model = network()
    with torch.no_grad():
        model[2].weight[:, ::2] = 0
        model[3].weight.zero_()
    scores = find_criterion("lamp").score(weight_matrices(model), None)
    assert scores["2.weight"][:, ::2].count_nonzero() == 0 and scores["2.weight"][:, 1::2].min() > 0
    assert scores["3.weight"].count_nonzero() == 0 and scores["3.weight"].isfinite().all()


@pytest.mark.parametrize(("criterion", "starves"), [("magnitude", True), ("lamp", False)])
def test_with_lamp_a_layer_of_small_weights_keeps_its_share(criterion, starves):
    """Scaling a layer changes none of its LAMP scores; a ranking by size empties it down to its best weight."""

    def kept(scale):
        model = network()
        with torch.no_grad():
            model[2].weight.mul_(scale)
        pruner = Pruner(weight_matrices(model), criterion)
        pruner.begin()
        pruner.update(0.95)
        return {name: int(mask.sum()) for name, mask in pruner.masks.items()}

    assert (kept(2.0**-10)["2.weight"] == 1) == starves
    assert (kept(2.0**-10) == kept(1.0)) != starves
