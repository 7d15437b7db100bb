"""Networks that multiply with other numbers than they store: refused where pruning would say what is not true."""

import pytest
import torch
from timm.layers import ScaledStdConv2d
from torch import nn
from torch.nn.utils import parametrizations, prune

from tscnc_hf.method.matrices import computed_weights
from tscnc_hf.training.compressor import build_pruner
from tscnc_hf.training.trainer import TSCNCTrainer


class Standardised(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body = ScaledStdConv2d(3, 8, 3), ScaledStdConv2d(8, 8, 3)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        return self.head(self.body(self.stem(x).relu()).mean((2, 3)))


def test_pruning_what_little_is_left_is_refused(make_config, as_they_are):
    model = Standardised()
    match = "2 layers of Standardised with 792 weights.*80 weights are left.*body.weight: ScaledStdConv2d.*exclude"
    with pytest.raises(ValueError, match=match):
        TSCNCTrainer(model, make_config(), processing_class=as_they_are)
    rest = TSCNCTrainer(model, make_config(pruning_exclude=["stem", "body"]), processing_class=as_they_are)
    assert list(rest.compressor.pruner.records) == ["head.weight"]
    dense = TSCNCTrainer(model, make_config(target_sparsity=0.0, weight_decay=0.1), processing_class=as_they_are)
    assert dense.get_decay_parameter_names(model) == ["head.weight", "stem.weight", "body.weight"]


def test_a_network_of_nothing_else_says_why(make_config):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2))
    for layer in model:
        prune.identity(layer, "weight")
    with pytest.raises(ValueError, match="2 layers.*0 weights are left.*prune.remove"):
        build_pruner(model, make_config(target_sparsity=0.0))
    for layer in model:
        prune.remove(layer, "weight")
    assert len(build_pruner(model, make_config()).records) == 2


def test_pruning_beside_layers_that_are_not_known_is_refused(make_config):
    model = nn.ModuleDict({"gru": nn.GRU(24, 32), "head": nn.Linear(32, 3)})
    with pytest.raises(
        ValueError, match="2 parameters of ModuleDict with 5,376 weights.*96 weights are left.*no matrix view"
    ):
        build_pruner(model, make_config())
    assert list(build_pruner(model, make_config(pruning_exclude=["gru"])).records) == ["head.weight"]
    few = nn.ModuleDict({"gru": nn.GRU(4, 4), "head": nn.Linear(32, 32)})
    assert list(build_pruner(few, make_config()).records) == ["head.weight"]


def test_some_layers_of_many_are_left_out(make_config, as_they_are, digits):
    model = Standardised()
    model.stem, model.body = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
    parametrizations.spectral_norm(model.head)
    config = make_config(max_steps=3, target_sparsity=0.5, cnc_weight=1e-3)
    trainer = TSCNCTrainer(model, config, train_dataset=digits.train.subset(range(32)), processing_class=as_they_are)
    trainer.train()
    pruned = trainer.compressor.pruner
    assert pruned.pruned_count == round(0.5 * (3 * 8 * 9 + 8 * 8 * 9)) and pruned.prunable_count == 792
    assert computed_weights(model).keys() == {"head.weight"} and torch.count_nonzero(model.head.weight) == 80


def test_what_nobody_could_load_is_refused_before_training(build, make_config):
    model, processor = build("vit")
    parametrizations.weight_norm(model.classifier)
    with pytest.raises(ValueError, match="1 layers compute a weight from other parameters.*classifier"):
        TSCNCTrainer(model, make_config(), processing_class=processor)


def test_what_a_weight_is_computed_from_decays(make_config, as_they_are):
    """Directions, and what is standardised; not lengths, of which there is one a row."""
    model = Standardised()
    model.body = parametrizations.weight_norm(nn.Conv2d(8, 8, 3))
    parametrizations.spectral_norm(model.head)
    model.last = nn.Linear(10, 10)
    model.forward = lambda x: model.last(model.head(model.body(model.stem(x)).mean((2, 3))))
    trainer = TSCNCTrainer(model, make_config(target_sparsity=0.0, weight_decay=0.1), processing_class=as_they_are)
    assert trainer.get_decay_parameter_names(model) == [
        "last.weight", "stem.weight", "body.parametrizations.weight.original1",
        "head.parametrizations.weight.original",
    ]  # fmt: skip
