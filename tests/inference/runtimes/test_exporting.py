"""ONNX files: the same logits by onnxruntime, the same zeros, and what a reader must know to prepare images."""

import json
import sys

import pytest
import torch
from torch import nn

from tests.small_models import resnet, vit
from tscnc_hf.inference.layers import SparseLinear
from tscnc_hf.inference.runtimes.exporting import export_onnx, multiplied_zeros


def test_without_the_packages_it_says_which(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"onnx is not installed.*pip install 'tscnc-hf\[onnx\]'"):
        export_onnx(vit(), torch.randn(2, 3, 8, 8), tmp_path / "model.onnx")


@pytest.fixture
def onnxruntime():
    for name in ("onnx", "onnxscript", "onnxruntime"):
        module = pytest.importorskip(name, reason=f"{name} is not installed: make test-runtimes")
    return module


@pytest.mark.parametrize("make", [vit, resnet])
def test_export(make, tmp_path, onnxruntime):
    model, path = make(), tmp_path / "model.onnx"
    done = export_onnx(model, torch.randn(2, 3, 8, 8), path, {"mean": [0.5] * 3})
    assert done["zeros"] >= done["model_zeros"] > 1000 and done["bytes"] == path.stat().st_size
    session = onnxruntime.InferenceSession(path)
    assert json.loads(session.get_modelmeta().custom_metadata_map["preprocessing"]) == {"mean": [0.5] * 3}
    for batch in (1, 5):
        x = torch.randn(batch, 3, 8, 8)
        (logits,) = session.run(["logits"], {"pixel_values": x.numpy()})
        with torch.no_grad():
            expected = model(x).logits
        assert (torch.from_numpy(logits) - expected).abs().max() <= 1e-4 * (expected.max() - expected.min())


def test_a_file_that_computes_something_else_is_not_written(monkeypatch, tmp_path, onnxruntime):
    monkeypatch.setattr("tscnc_hf.inference.runtimes.exporting.TOLERANCE", -1.0)
    with pytest.raises(ValueError, match="nothing was written: by onnxruntime the logits differ"):
        export_onnx(vit(), torch.randn(2, 3, 8, 8), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


class Unused(nn.Module):
    """Zeros in a layer that forward does not call, in a token, and in a weight that another is computed from."""

    def __init__(self, outputs=10):
        super().__init__()
        self.conv, self.unused, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.Linear(8, outputs)
        self.token = nn.Parameter(torch.zeros(1, 8, 1, 1))
        with torch.no_grad():
            for number, layer in enumerate((self.conv, self.unused, self.head), 1):
                layer.weight.fill_(0.5).view(-1)[:number] = 0
        self.last = nn.utils.parametrizations.weight_norm(nn.Linear(outputs, outputs))

    def forward(self, x):
        return self.last(self.head((self.conv(x) + self.token).mean((2, 3))))


def test_zeros_that_nothing_is_multiplied_with_do_not_count():
    zeros, logits = multiplied_zeros(Unused().eval(), torch.randn(2, 3, 8, 8))
    assert zeros == 1 + 3 and logits.shape == (2, 10)
    assert multiplied_zeros(vit(), torch.randn(2, 3, 8, 8))[0] > 1000


def test_a_model_with_weights_that_it_does_not_use_is_exported(tmp_path, onnxruntime):
    done = export_onnx(Unused().eval(), torch.randn(2, 3, 8, 8), tmp_path / "model.onnx")
    assert done["zeros"] >= done["model_zeros"] == 4


def test_one_logit_of_one_image(tmp_path, onnxruntime):
    export_onnx(Unused(1).eval(), torch.randn(1, 3, 8, 8), tmp_path / "model.onnx")


def test_a_compiled_copy_is_not_exported(tmp_path):
    model = nn.Sequential(nn.Flatten(), SparseLinear(nn.Linear(12, 10)))
    with pytest.raises(ValueError, match="copy by sparse_compile.*export the model that it was compiled from"):
        export_onnx(model, torch.randn(2, 3, 2, 2), tmp_path / "model.onnx")


def test_logits_that_are_not_numbers_are_named(tmp_path, onnxruntime):
    model = Unused().eval()
    with torch.no_grad():
        model.head.bias[0] = torch.nan
    with pytest.raises(ValueError, match="own logits of the example are not numbers"):
        export_onnx(model, torch.randn(2, 3, 8, 8), tmp_path / "model.onnx")
