"""Folders as they are loaded by somebody who has transformers and timm and not this package."""

import json

import torch

from tests.processes import run_python
from tests.small_models import logits, resnet, vit
from tscnc_hf.artifact.models.saving import disk_state, save_sparse


STRANGER = """
import sys
sys.modules["tscnc_hf"] = None
import json, timm, torch
from pathlib import Path
from transformers import AutoModelForImageClassification
x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
def report(model, logits):
    zeros = {name.removeprefix("timm_model."): int((p == 0).sum()) for name, p in model.named_parameters()}
    print(json.dumps([logits.tolist(), zeros, type(model).__module__]))
for folder in sys.argv[1:3]:
    model = AutoModelForImageClassification.from_pretrained(folder)
    report(model, model(pixel_values=x).logits)
model = timm.create_model("local-dir:" + sys.argv[2], pretrained=True).eval()
report(model, model(x))
def refuses(load):
    try:
        load()
    except Exception as error:
        print(json.dumps([type(error).__name__, str(error)[:200]]))
    else:
        print(json.dumps(["loaded", ""]))
for folder in sys.argv[3:]:
    refuses(lambda: AutoModelForImageClassification.from_pretrained(folder, variant="sparse"))
    refuses(lambda: AutoModelForImageClassification.from_pretrained(folder))
    if "architecture" in json.loads(Path(folder, "config.json").read_text()):
        refuses(lambda: timm.create_model("local-dir:" + folder, pretrained=True))
try:
    import tscnc_hf
except ImportError:
    print("blocked")
"""


def test_a_stranger_without_the_package_loads_dense_folders_and_no_packed_one(tmp_path):
    models = [vit(), resnet()]
    folders = [tmp_path / "0", tmp_path / "1"]
    for model, folder in zip(models, folders, strict=True):
        model.save_pretrained(folder, state_dict=disk_state(model))
    for model, folder in zip(models, folders[:2], strict=True):
        for options in ({}, {"compression": "zstd"}, {"compression": "zstd", "value_dtype": "fp16"}):
            packed = tmp_path / f"{folder.name}-{'-'.join(options)}"
            save_sparse(model, packed, **options)
            folders.append(packed)
    done = run_python(["-c", STRANGER, *folders], environment={"HF_HUB_OFFLINE": "1"}, cwd=tmp_path)
    *lines, blocked = done.stdout.splitlines()
    assert blocked == "blocked" and len(lines) == 3 + 3 * 2 + 3 * 3
    for model, line, library in zip(
        [*models, models[1]], lines[:3], ["transformers.", "transformers.", "timm."], strict=True
    ):
        found, zeros, module = json.loads(line)
        assert module.startswith(library)
        assert torch.allclose(torch.tensor(found), logits(model), atol=1e-5, rtol=0)
        expected = {name.removeprefix("timm_model."): int((p == 0).sum()) for name, p in model.named_parameters()}
        assert zeros == expected and sum(zeros.values()) > 1000
    errors = [json.loads(line) for line in lines[3:]]
    assert {kind for kind, _ in errors} == {"RuntimeError", "OSError"}, errors
    assert sum("mismatched" in text for _, text in errors) == 6
    assert sum("no file named model.safetensors" in text for _, text in errors) == 6
