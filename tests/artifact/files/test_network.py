"""What a network computes beside its weights: whatever changes it is told, and nothing else is."""

import functools
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from tests.processes import run_command
from tscnc_hf.artifact.files.identity import RunIdentity
from tscnc_hf.artifact.files.network import model_identity, network_digest, other_part
from tscnc_hf.artifact.models.building import timm_model


SIZES = {"image_size": 8, "patch_size": 4, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}


def vit(**changed) -> ViTForImageClassification:
    return ViTForImageClassification(ViTConfig(**(SIZES | {"num_attention_heads": 4, "num_labels": 3} | changed)))


@pytest.mark.parametrize("kind", ["vit", "resnet", "timm-vit", "convnext"])
def test_a_saved_model_is_the_same_network(kind, build, tmp_path):
    model, _ = build(kind)
    digest = network_digest(model)
    model.train()
    model.config.tscnc = {"seed": 1}
    model.save_pretrained(tmp_path)
    for options in ({}, {"dtype": torch.bfloat16}):
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path, **options)
        assert network_digest(loaded) == network_digest(torch.compile(model)) == digest


def test_published_results_hold_this_digest():
    """It must not change with a version of anything: results of before would be taken for those of other networks."""
    assert network_digest(vit()) == "d1997f61dcabd94411c911a460ee64a9"


def test_what_a_config_says_of_names_and_training_is_no_part_of_it(monkeypatch):
    digest = network_digest(vit())
    names = {"id2label": {0: "ant", 1: "bee", 2: "cat"}, "label2id": {"ant": 0, "bee": 1, "cat": 2}}
    for changed in (
        names,
        {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2},
        {"initializer_range": 0.5},
        {"problem_type": "single_label_classification"},
        {"output_attentions": True, "attn_implementation": "eager"},
    ):
        assert network_digest(vit(**changed)) == digest, changed
    before = ViTConfig.to_dict
    monkeypatch.setattr(ViTConfig, "to_dict", lambda self: before(self) | {"added_later": False})
    assert network_digest(vit()) == digest


@pytest.mark.parametrize(
    "changed",
    [{"num_attention_heads": 1}, {"hidden_act": "relu"}, {"layer_norm_eps": 1e-3}, {"image_size": 16}],
    ids=lambda changed: next(iter(changed)),
)
def test_what_a_config_says_of_the_network_is(changed):
    assert network_digest(vit(**changed)) != network_digest(vit())


def test_arguments_of_timm_are():
    def made(**options):
        small = {"channels": [8] * 4, "layers": [1] * 4}
        return network_digest(timm_model("resnet18", ["a", "b"], (8, 8), model_args=small | options)[0])

    assert len({made(), made(output_stride=8), made(stem_type="deep")}) == 3


class Heads(nn.Module):
    """Whose heads no weight tells."""

    def __init__(self, heads=4, function=functional.relu, shift=0.0):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.heads, self.function, self.shift = heads, function, torch.tensor([shift])
        self.calls, self.seen, self._own = 0, None, 0

    def forward(self, x):
        self.calls += 1
        self.seen = x
        self._own = len(x)
        return self.function(self.linear(x)).unflatten(-1, (self.heads, -1)).amax(-2) + self.shift


class Buffered(nn.Module):
    def __init__(self, value, persistent):
        super().__init__()
        self.register_buffer("mean", torch.tensor([value]), persistent=persistent)


@pytest.mark.parametrize(
    "one, other",
    [
        (nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3, stride=2)),
        (nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, groups=2, padding_mode="circular", padding=1)),
        (nn.Sequential(nn.ReLU()), nn.Sequential(nn.GELU())),
        (nn.GELU(), nn.GELU(approximate="tanh")),
        (nn.Sequential(nn.ReLU(), nn.Tanh()), nn.Sequential(nn.Tanh(), nn.ReLU())),
        (nn.MultiheadAttention(8, 1), nn.MultiheadAttention(8, 4)),
        (nn.LayerNorm(8), nn.LayerNorm(8, eps=1e-2)),
        (Heads(4), Heads(1)),
        (Heads(), Heads(function=functional.gelu)),
        (Heads(), Heads(function=functools.partial(functional.gelu, approximate="tanh"))),
        (Heads(shift=0.0), Heads(shift=0.5)),
        (Buffered(0.0, False), Buffered(0.5, False)),
        (nn.Sequential(vit()), nn.Sequential(vit(num_attention_heads=1))),
    ],
)
def test_other_modules_with_the_same_weights(one, other):
    other.load_state_dict(one.state_dict())
    assert model_identity(one)["model"] == model_identity(other)["model"]
    assert network_digest(one) != network_digest(other)


def test_modes_weights_and_what_a_module_counts_are_no_part_of_it():
    model = Heads()
    digest = network_digest(model)
    with torch.no_grad():
        model.linear.weight += 1
        model.eval()(torch.rand(2, 8))
    assert network_digest(model) == network_digest(torch.compile(model)) == digest
    assert network_digest(Buffered(0.0, True)) == network_digest(Buffered(0.5, True))  # which is in the state


def test_it_is_the_same_in_every_process():
    code = (
        "from torch import nn\n"
        "from tests.artifact.files.test_network import Heads, vit\n"
        "from tscnc_hf.artifact.files.network import network_digest\n"
        "print(network_digest(nn.Sequential(Heads(), vit(), nn.Conv2d(3, 4, 3))))"
    )
    here = network_digest(nn.Sequential(Heads(), vit(), nn.Conv2d(3, 4, 3)))
    assert run_command([sys.executable, "-c", code]).stdout.split()[-1] == here


def test_figures_are_of_weights_and_of_a_network():
    model, narrow = vit(), vit(num_attention_heads=1)
    narrow.load_state_dict(model.state_dict())
    of = RunIdentity(weights=model_identity(model))
    assert other_part(of, model) is None and other_part(of, narrow) == "network"
    before = RunIdentity(weights={"model": of.weights["model"]})  # as they were written before
    assert other_part(before, model) is None and other_part(before, narrow) is None
    assert other_part(of, vit()) == other_part(before, vit()) == "weights"
