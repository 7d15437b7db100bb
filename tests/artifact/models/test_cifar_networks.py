"""The networks of published tables: counts as published, stages at full size, saved and loaded like any other."""

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageClassification

from tscnc_hf import flops_report, load_sparse, save_sparse
from tscnc_hf.artifact.models.building import timm_model
from tscnc_hf.artifact.models.loading import load_model, logits_fn
from tscnc_hf.method.matrices import weight_matrices


NAMES = ["red panda", "owl", "fox"]
SMALL = {"cifar_resnet18": {"channels": [8, 8, 8, 8], "layers": [1, 1, 1, 1]},
         "cifar_wrn40_4": {"channels": [8, 8, 8], "layers": [1, 1, 1]}}  # fmt: skip


@pytest.mark.parametrize(
    "name, parameters, macs, sides",
    [
        (
            "cifar_resnet18",
            11_173_962,
            0.56e9,
            [32, 32, 16, 8, 4],
        ),  # 11.17 M (HYDRA and after)
        ("cifar_wrn28_10", 36_479_194, 5.24e9, [32, 32, 16, 8]),  # 36.5 M (Zagoruyko and Komodakis 2016)
        ("cifar_wrn40_4", 8_949_210, 1.30e9, [32, 32, 16, 8]),  # 8.9 M (the same)
    ],
)
def test_counts_are_the_published_ones(name, parameters, macs, sides):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = timm.create_model(name)
        assert model(torch.empty(1, 3, 32, 32)).shape == (1, 10)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert counter.get_total_flops() / 2 == pytest.approx(macs, rel=0.01)
    assert [32 // info["reduction"] for info in model.feature_info] == sides
    if name == "cifar_resnet18":
        features = timm.create_model(name, features_only=True, channels=(8, 8, 8, 8), layers=(1, 1, 1, 1))
        assert [map.shape[-1] for map in features(torch.rand(1, 3, 32, 32))] == sides


def test_stock_resnet18_at_128_px_has_the_same_stages_and_as_many_weights():
    """The network that everybody loads, beside the published one: another stem, 3x3x64x3 weights against 7x7."""
    own, stock = timm.create_model("cifar_resnet18"), timm.create_model("resnet18", num_classes=10)
    parameters = [sum(parameter.numel() for parameter in model.parameters()) for model in (own, stock)]
    assert parameters[1] - parameters[0] == 3 * 64 * (49 - 9)
    assert own.layer1.state_dict().keys() == stock.layer1.state_dict().keys()
    macs = [flops_report(own, (1, 3, 32, 32)).macs, flops_report(stock, (1, 3, 128, 128)).macs]
    assert 1 < macs[1] / macs[0] < 1.08
    with torch.device("meta"):
        features = timm.create_model("resnet18", features_only=True)(torch.empty(1, 3, 128, 128))
    assert [map.shape[-1] for map in features] == [64, 32, 16, 8, 4]  # the first before the pooling


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("channels", [1, 3])
def test_they_are_saved_packed_and_loaded_like_any_other(name, channels, tmp_path):
    torch.manual_seed(0)
    model, processor = timm_model(name, NAMES, (16, 16), channels, model_args=SMALL[name])
    records = list(weight_matrices(model))
    with torch.no_grad():
        for record in records:
            record.weight[torch.rand_like(record.weight) < 0.7] = 0
    model.eval().save_pretrained(tmp_path)
    save_sparse(model, tmp_path)
    pixels = torch.rand(2, channels, 16, 16)
    with torch.no_grad():
        expected = logits_fn(model, processor)(pixels)
        assert expected.shape == (2, 3) and expected.std() > 0
        stock = AutoModelForImageClassification.from_pretrained(tmp_path)
        for loaded in (load_model(tmp_path)[0], load_sparse(tmp_path), stock):
            assert torch.equal(logits_fn(loaded)(pixels), expected)


def test_vgg16_bn_of_timm_takes_images_of_32_px():
    """As stock: pooled up to the 7x7 that its first fully connected layer, here of 16 units, wants."""
    torch.manual_seed(0)
    model, processor = timm_model("vgg16_bn", NAMES, (32, 32), model_args={"mlp_ratio": 1 / 256})
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(15.2e6, rel=0.01)
    assert flops_report(model, (1, 3, 32, 32)).macs == pytest.approx(0.31e9, rel=0.02)
    with torch.no_grad():
        logits = logits_fn(model.eval(), processor)(torch.rand(2, 3, 32, 32))
    assert logits.shape == (2, 3) and logits.isfinite().all() and not torch.equal(logits[0], logits[1])
