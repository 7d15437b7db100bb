"""`tscnc bench` and `tscnc export`: a model by its name, and what it is outside of training."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tscnc_hf.cli.parser import side_or_pair


CHANNELS = {"grey": 1, "rgb": 3}


def _opened(options: argparse.Namespace) -> tuple[Any, Any, tuple[int, int, int], Path]:
    """The model, its image processor, (channels, height, width) of its images, and its folder here."""
    from tscnc_hf.artifact.models.config import input_format, read_processor
    from tscnc_hf.artifact.repository.opening import open_repository, read_model

    repository = open_repository(options.model, options.revision)
    model, _ = read_model(repository)
    if "Classification" not in type(model).__name__:
        raise ValueError(f"{options.model} is a {type(model).__name__}; an image classifier is needed")
    try:
        processor = read_processor(repository.folder)
    except (OSError, ValueError):  # without one the config has to say
        processor = None
    size, colours = input_format(model, processor)
    size = side_or_pair(options.image_size) or size
    if size is None:
        raise ValueError(f"nothing says what images {options.model} takes: give --image-size")
    if not isinstance(size, int) and len(size) != 2:
        raise ValueError(f"--image-size {' '.join(map(str, size))}: give a side, or height and width")
    height, width = (size, size) if isinstance(size, int) else size
    return model.eval().float(), processor, (CHANNELS.get(colours, 3), height, width), repository.folder


def bench_model(options: argparse.Namespace) -> dict[str, Any]:
    """What `LatencyReport.to_dict` gives, and the model's name; progress on stderr."""
    from tqdm import tqdm

    from tscnc_hf.artifact.card.formatting import without_paths
    from tscnc_hf.artifact.files.atomic import write_json
    from tscnc_hf.artifact.repository.inspection import LATENCY_FILE
    from tscnc_hf.inference.runtimes.benchmark import measure_latency
    from tscnc_hf.inference.runtimes.installed import RUNTIMES

    if options.save and not Path(options.model).is_dir():
        raise ValueError(f"--save: {options.model} is on the Hub; give a folder here")
    model, _, size, folder = _opened(options)
    names = tuple(options.runtimes or RUNTIMES)
    report = measure_latency(model, size, options.batch, options.threads, names, options.seconds, say=tqdm.write)
    if report.left_out:
        tqdm.write(f"not installed: {', '.join(report.left_out)}")
    found = {"model": without_paths(options.model)} | report.to_dict()
    if options.save:
        write_json(found, folder / LATENCY_FILE)
    return found


def latency_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """`bench_model`'s result as rows of a table, the first its header."""
    table = [("batch", "runtime", "median, ms", "quartiles, ms", "times sparse_compile")]
    for row in found["rows"]:
        ours = "" if row["times_ours"] is None else f"{row['times_ours']:.2f}"
        quartiles = f"{row['low_ms']:.2f} to {row['high_ms']:.2f}"
        table.append((str(row["batch"]), row["runtime"], f"{row['median_ms']:.2f}", quartiles, ours))
    return table


def export_model(options: argparse.Namespace) -> dict[str, Any]:
    """{"written": the file} and what `export_onnx` gives."""
    import torch

    from tscnc_hf.artifact.models.preprocessing import ModelGeometry, acts, preprocessing
    from tscnc_hf.inference.runtimes.exporting import export_onnx

    if options.output is None and not Path(options.model).is_dir():
        raise ValueError(f"{options.model} is on the Hub: say where the file goes with --output FILE")
    path = Path(options.output or Path(options.model) / "model.onnx")
    _refuse_overwriting(path)
    model, processor, size, _ = _opened(options)
    mean, std, order, _ = preprocessing(model, processor)
    said = {"scale": "pixels in [0, 1]", "mean": mean, "std": std, "height": size[1], "width": size[2]}
    said |= {} if order is None else {"channel_order": order}
    said |= {"resize": ModelGeometry(model, processor).identity} if acts(processor) else {}
    return {"written": str(path)} | export_onnx(model, torch.randn(2, *size), path, said)


def _refuse_overwriting(path: Path) -> None:
    """FileExistsError where an export would take the place of anything but another export."""
    from tscnc_hf.artifact.models.config import CONFIG_FILE
    from tscnc_hf.artifact.packed.file import SPARSE_FILE
    from tscnc_hf.artifact.repository.opening import is_dense_file

    if path.is_dir():
        raise FileExistsError(f"--output {path} is a folder; name the file, such as {path / 'model.onnx'}")
    if is_dense_file(path.name) or path.name in (SPARSE_FILE, CONFIG_FILE):
        raise FileExistsError(f"--output {path} has the name of a part of a model; give another, such as model.onnx")
    if path.exists() and path.suffix != ".onnx":
        raise FileExistsError(
            f"--output {path} is there, and would be overwritten, which only a file that ends in .onnx is; give "
            "another name, or take it away"
        )
