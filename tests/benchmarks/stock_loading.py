"""
What others, who do not have this library, make of folders with a model each: a line of JSON a folder.

    python tests/benchmarks/stock_loading.py FOLDER ...

A folder also holds `expected.safetensors`, a batch `inputs` and its `logits`. Said of transformers and of timm is
"loads", or the error; that other logits come out is one.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification


def attempt(load: Callable[[], torch.nn.Module], given: dict[str, torch.Tensor]) -> str:
    """Whether the model that comes of it gives the `logits` for the `inputs`: "loads", or else what went wrong."""
    try:
        with torch.no_grad():
            found = load().eval()(given["inputs"])
        found = getattr(found, "logits", found)
    except Exception as error:  # whatever it is, it is the answer
        return f"{type(error).__name__}: {str(error).splitlines()[0].split('. ')[0]}"
    apart = float((found - given["logits"]).abs().max())
    return "loads" if apart < 1e-4 else f"loads, logits are {apart:.2g} apart"


def attempts(folder: Path) -> dict[str, str]:
    """Library -> "loads" or the first sentence of its error."""
    given = load_file(folder / "expected.safetensors")
    return {
        "transformers": attempt(lambda: AutoModelForImageClassification.from_pretrained(folder), given),
        "timm": attempt(lambda: timm.create_model(f"local-dir:{folder}", pretrained=True), given),
    }


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(json.dumps(attempts(Path(name))))
    if "tscnc_hf" in sys.modules:
        raise SystemExit("error: this library was imported, and registers its own format with transformers")
