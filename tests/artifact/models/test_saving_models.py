"""What save_sparse and save_pretrained write, and what a stranger makes of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ViTForImageClassification,
    ViTImageProcessor,
)

from tests.small_models import MODELS, assert_same_weights, logits, resnet, vit
from tscnc_hf import SparseConfig
from tscnc_hf.artifact.models.loading import load_sparse, load_weights
from tscnc_hf.artifact.models.saving import save_dense, save_sparse
from tscnc_hf.artifact.packed.file import SPARSE_FILE, read_sparse_file, write_sparse_file


@MODELS
def test_the_packed_file_has_the_names_of_the_dense_one_and_is_smaller(make, tmp_path):
    model = make()
    save_dense(model, tmp_path)
    path = save_sparse(model, tmp_path)
    dense, packed = load_file(tmp_path / "model.safetensors"), read_sparse_file(path)
    assert dense.keys() == packed.keys() and all(torch.equal(dense[name], packed[name]) for name in dense)
    assert path.stat().st_size < 0.6 * (tmp_path / "model.safetensors").stat().st_size
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors", SPARSE_FILE]


def test_a_timm_folder_has_the_names_of_timm_and_is_read_with_either(tmp_path):
    model = resnet()
    save_dense(model, tmp_path)
    save_sparse(model, tmp_path)
    plain = load_file(tmp_path / "model.safetensors")
    assert plain.keys() == {name.removeprefix("timm_model.") for name in model.state_dict()}
    other = resnet(1)
    load_weights(other, tmp_path)
    assert_same_weights(other, model)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)  # and saved again, it stays as it is
    save_dense(again, tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == plain.keys() and (tmp_path / SPARSE_FILE).is_file()
    # as it was written before, and as transformers writes it
    model.save_pretrained(tmp_path / "prefixed")
    prefixed = load_file(tmp_path / "prefixed" / "model.safetensors")
    assert all(name.startswith("timm_model.") for name in prefixed)
    load_weights(other := resnet(2), tmp_path / "prefixed")
    assert_same_weights(other, model)
    write_sparse_file(prefixed, tmp_path / "prefixed" / SPARSE_FILE)
    assert_same_weights(load_sparse(tmp_path / "prefixed"), model)
    found = AutoModelForImageClassification.from_pretrained(
        tmp_path / "prefixed", variant="sparse", quantization_config=SparseConfig()
    )
    assert_same_weights(found, model)


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
    folders = [save_dense(model, tmp_path / str(i)) for i, model in enumerate(models)]
    assert folders == [tmp_path / "0", tmp_path / "1"]
    for model, folder in zip(models, folders[:2], strict=True):
        for options in ({}, {"compression": "zstd"}, {"compression": "zstd", "value_dtype": "fp16"}):
            packed = tmp_path / f"{folder.name}-{'-'.join(options)}"
            save_sparse(model, packed, **options)
            folders.append(packed)
    done = subprocess.run(  # one process for all: importing transformers is what takes the time
        [sys.executable, "-c", STRANGER, *map(str, folders)],
        capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
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


def test_the_processor_is_saved_beside_the_model(tmp_path):
    processor = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.1, 0.2, 0.3])
    save_dense(vit(), tmp_path / "vit", processor)
    assert list(AutoImageProcessor.from_pretrained(tmp_path / "vit").image_mean) == [0.1, 0.2, 0.3]
    save_dense(resnet(), tmp_path / "timm")
    again = AutoImageProcessor.from_pretrained(tmp_path / "timm")
    save_dense(resnet(), tmp_path / "timm", again)  # writes nothing more: config.json has it
    assert sorted(p.name for p in (tmp_path / "timm").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("save", [save_dense, save_sparse])
def test_what_nobody_could_load_is_refused(save, tmp_path):
    model = vit()
    torch.nn.utils.parametrizations.weight_norm(model.classifier)
    with pytest.raises(ValueError, match="classifier.parametrizations.*remove_parametrizations"):
        save(model, tmp_path / "out")
    with pytest.raises(ValueError, match="got Linear.*PreTrainedModel"):
        save(torch.nn.Linear(2, 2), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mixed_dtypes_are_not_packed(tmp_path):
    model = vit()
    model.classifier.to(torch.bfloat16)
    with pytest.raises(ValueError, match="torch.bfloat16.*one floating dtype"):
        save_sparse(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_never_holds_two_models(tmp_path):
    first, second = vit(0), vit(1)
    save_dense(first, tmp_path)
    save_sparse(first, tmp_path)
    save_dense(first, tmp_path)
    assert (tmp_path / SPARSE_FILE).is_file()  # the same weights: it may stay
    with pytest.raises(ValueError, match="dense weights that are not this model's"):
        save_sparse(second, tmp_path)
    assert_same_weights(load_sparse(tmp_path), first)
    save_dense(second, tmp_path)
    assert not (tmp_path / SPARSE_FILE).exists()
    save_sparse(second, tmp_path)
    assert_same_weights(load_sparse(tmp_path), second)


def test_shards_are_read_and_replaced(tmp_path, monkeypatch):
    first, second = vit(0), vit(1)
    first.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    other = vit(2)
    load_weights(other, tmp_path)
    assert_same_weights(other, first)
    save_sparse(first, tmp_path)
    save_dense(second, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    # and the other way round: a single file left over would be preferred to the shards by every loader
    whole = ViTForImageClassification.save_pretrained
    sharded = lambda model, folder, **_: whole(model, folder, max_shard_size="20KB")  # noqa: E731
    monkeypatch.setattr(ViTForImageClassification, "save_pretrained", sharded)
    save_dense(first, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    assert_same_weights(AutoModelForImageClassification.from_pretrained(tmp_path), first)
    save_sparse(first, tmp_path)
    assert_same_weights(load_sparse(tmp_path), first)


def test_an_interrupted_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    first = vit(0)
    save_dense(first, tmp_path)
    save_sparse(first, tmp_path)

    def breaks(self, folder, **kwargs):
        (Path(folder) / "model.safetensors").write_bytes(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(ViTForImageClassification, "save_pretrained", breaks)
    for save in (save_dense, save_sparse):
        with pytest.raises(OSError, match="disk full"):
            save(vit(1), tmp_path)
    assert_same_weights(load_sparse(tmp_path), first)
    assert_same_weights(AutoModelForImageClassification.from_pretrained(tmp_path), first)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors", SPARSE_FILE]
