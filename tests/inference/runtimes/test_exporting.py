"""ONNX files: the same logits by onnxruntime, the same zeros, and what a reader must know to prepare images."""

import json
import sys

import pytest
import torch

from tests.small_models import resnet, vit
from tscnc_hf.inference.runtimes.exporting import export_onnx


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
