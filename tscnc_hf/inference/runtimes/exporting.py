"""ONNX files, for who deploys elsewhere: written by torch's own exporter, and checked with onnxruntime."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tscnc_hf.artifact.files.atomic import atomic_file
from tscnc_hf.inference.layers import NoWeight
from tscnc_hf.inference.report import logits_difference
from tscnc_hf.method.adversarial.pixels import logits_of
from tscnc_hf.method.weight_use import why_computed


TOLERANCE = 1e-4  # of the range of the logits, or of the largest
PACKAGES = "ONNX files are written and checked with onnx, onnxscript and onnxruntime: pip install 'tscnc-hf[onnx]'"


class Logits(nn.Module):
    """Images (n, c, h, w) to logits (n, k), whatever else a model returns."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return logits_of(self.model(pixel_values))


@torch.no_grad()
def multiplied_zeros(model: nn.Module, example: Tensor) -> tuple[int, Tensor]:
    """
    Exact zeros among the weights that the layers multiply with which one forward pass calls, and the logits of it. A
    file need not hold others: tokens that it adds up with positions, layers that nobody calls, weights that others
    are computed from.
    """
    used: dict[int, Tensor] = {}

    def before(module: nn.Module, args: tuple) -> None:
        if not isinstance(module, nn.MultiheadAttention) and why_computed(module):
            return
        used.update({id(weight): weight for weight in module.parameters() if weight.ndim > 1})

    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, (nn.Linear, _ConvNd, nn.MultiheadAttention)):
                hooks.callback(module.register_forward_pre_hook(before).remove)
        logits = logits_of(model(example))
    return sum(int((weight == 0).sum()) for weight in used.values()), logits


@torch.no_grad()
def export_onnx(
    model: nn.Module,
    example: Tensor,
    path: str | os.PathLike[str],
    preprocessing: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """
    Write `model` as an ONNX file with the input `pixel_values`, normalised images of any batch size, and the output
    `logits`.

    Args:
        model: float32, on the CPU, in evaluation mode; not a compiled one, whose kernels other runtimes lack.
        example: normalised images, float32 (n, c, h, w); n of at least 2 keeps the batch size free.
        path: of the file.
        preprocessing: how images become inputs; in the file's metadata, as JSON under "preprocessing".

    Returns:
        {"difference": the largest of logits between onnxruntime and the model, as `logits_difference` has it;
        "zeros", "model_zeros": exact zeros among the weights of two or more dimensions, in the file, and in the model
        among those that its layers multiply with; "bytes": of the file}.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is not installed.
        ValueError: the file would not compute the same, or has fewer zeros; the model is a compiled one, or its own
            logits of the example are not numbers (NaN).
    """
    if any(isinstance(module, NoWeight) for module in model.modules()):
        raise ValueError(
            "the model is a copy by sparse_compile, whose kernels no other runtime has: export the model that it was "
            "compiled from"
        )
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  (of torch's exporter)
    except ImportError as error:
        raise ImportError(f"{error.name} is not installed. {PACKAGES}") from error
    model_zeros, expected = multiplied_zeros(model, example)
    if expected.isnan().any():
        raise ValueError(
            "nothing was written: the model's own logits of the example are not numbers (NaN); give an example that "
            "it has an answer to, or mend its weights"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, on its own future
        program = torch.onnx.export(
            Logits(model).eval(),
            (example,),
            dynamo=True,
            input_names=["pixel_values"],
            output_names=["logits"],
            dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}} if len(example) > 1 else None,
            verbose=False,
        )
    proto = program.model_proto
    if preprocessing is not None:
        onnx.helper.set_model_props(proto, {"preprocessing": json.dumps(preprocessing)})
    zeros = sum(
        int((onnx.numpy_helper.to_array(tensor) == 0).sum())
        for tensor in proto.graph.initializer
        if len(tensor.dims) > 1 and tensor.data_type == onnx.TensorProto.FLOAT
    )
    path = Path(path)
    with atomic_file(path) as temporary:
        onnx.save_model(proto, temporary)
        session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
        logits = torch.from_numpy(session.run(["logits"], {"pixel_values": example.numpy()})[0])
        difference = logits_difference(logits, expected)
        if not difference <= TOLERANCE:
            raise ValueError(
                f"nothing was written: by onnxruntime the logits differ by {difference:.1e} of their range or size, "
                f"more than {TOLERANCE}"
            )
        if zeros < model_zeros:
            raise ValueError(f"nothing was written: of {model_zeros:,} zeros the file has {zeros:,}")
    return {"difference": difference, "zeros": zeros, "model_zeros": model_zeros, "bytes": path.stat().st_size}
