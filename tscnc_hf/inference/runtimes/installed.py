"""The ways to run a model on a CPU that are installed here, each as a function from images to logits."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from tscnc_hf.inference.compiling import sparse_compile
from tscnc_hf.inference.runtimes.exporting import export_onnx
from tscnc_hf.method.adversarial.pixels import logits_of


Run = Callable[[], Tensor]
OURS = "sparse_compile"
RUNTIMES = ("eager", "channels_last", "torch.compile", "onnxruntime", "OpenVINO", OURS)
NEEDS = {"onnxruntime": ("onnxruntime", "onnx", "onnxscript"), "OpenVINO": ("openvino", "onnx", "onnxscript")}


def installed(name: str) -> bool:
    return all(importlib.util.find_spec(package) for package in NEEDS.get(name, ()))


def prepared(name: str, model: nn.Module, images: Tensor, folder: Path) -> Run:
    """
    Args:
        name: among RUNTIMES, and installed.
        model: float32, on the CPU, in evaluation mode.
        images: float32 (n, c, h, w), what is run.
        folder: for the ONNX file, which is written once.

    Returns:
        A function without arguments that gives the logits (n, k), with as many threads as torch has now.
    """
    threads, file = torch.get_num_threads(), folder / "model.onnx"
    if name == OURS:
        return _torch(sparse_compile(model, images), images)
    if name == "eager":
        return _torch(model, images)
    if name == "channels_last":
        net = copy.deepcopy(model).to(memory_format=torch.channels_last)
        return _torch(net, images.contiguous(memory_format=torch.channels_last))
    if name == "torch.compile":
        return _torch(torch.compile(copy.deepcopy(model), dynamic=False), images)
    if not file.is_file():
        export_onnx(model, images, file)
    given = images.numpy()
    if name == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        return lambda: torch.from_numpy(session.run(None, {"pixel_values": given})[0])
    import openvino

    # float32 as everybody else, where it would take bfloat16 by itself
    how = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(file), "CPU", how)
    return lambda: torch.from_numpy(compiled({"pixel_values": given})[0])


def _torch(model: nn.Module, images: Tensor) -> Run:
    def run() -> Tensor:
        with torch.no_grad():
            return logits_of(model(images))

    return run
