import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BertConfig,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from tscnc_hf import SparseConfig
from tscnc_hf.artifact.files.state import STATE_FILE, load_state, save_state
from tscnc_hf.artifact.models import loading
from tscnc_hf.artifact.models.config import read_config
from tscnc_hf.artifact.models.loading import load_sparse, load_weights
from tscnc_hf.artifact.models.saving import save_dense, save_sparse
from tscnc_hf.artifact.packed.file import SPARSE_FILE, read_sparse_file, write_sparse_file


NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
PIXELS = {
    "input_size": [3, 8, 8],
    "mean": [0.4914, 0.4822, 0.4465],
    "std": [0.2470, 0.2435, 0.2616],
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "crop_mode": "center",
}


def pruned(model, seed=0):
    """Nine in ten weights of every matrix are zero, all others are random, BatchNorm statistics included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.2 + 0.05)
            if tensor.ndim > 1:
                tensor.mul_(torch.rand(tensor.shape, generator=generator) < 0.1)
    return model.eval()


def vit(seed=0, hidden_size=32):
    config = ViTConfig(
        hidden_size=hidden_size, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=8,
        patch_size=2, num_labels=10, id2label=dict(enumerate(NAMES)), label2id={n: i for i, n in enumerate(NAMES)},
    )  # fmt: skip
    return pruned(ViTForImageClassification(config), seed)


def resnet(seed=0):
    config = TimmWrapperConfig(
        architecture="resnet18", model_args={"channels": [8, 8, 8, 8], "layers": [1, 1, 1, 1]}, pretrained_cfg=PIXELS,
        num_labels=10, id2label=dict(enumerate(NAMES)), label2id={n: i for i, n in enumerate(NAMES)},
    )  # fmt: skip
    return pruned(TimmWrapperForImageClassification(config), seed)


MODELS = pytest.mark.parametrize("make", [vit, resnet])


def images(dtype=torch.float32):
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


@torch.no_grad()
def logits(model):
    return model(pixel_values=images(model.dtype)).logits


def assert_same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), name


def differs(one, other):
    one, other = one.state_dict(), other.state_dict()
    return any(not torch.equal(one[name], other[name]) for name in one)


@MODELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_load_sparse_is_the_model_bit_for_bit(make, dtype, tmp_path):
    model = make().to(dtype)
    path = save_sparse(model, tmp_path / "packed")
    assert path == tmp_path / "packed" / SPARSE_FILE
    assert sorted(p.name for p in path.parent.iterdir()) == ["config.json", SPARSE_FILE]
    again = load_sparse(path.parent)
    assert type(again) is type(model) and not again.training and again.dtype == dtype
    assert_same_weights(again, model)
    assert torch.equal(logits(again), logits(model))
    assert again.config.id2label == dict(enumerate(NAMES))
    assert again.config.name_or_path == str(path.parent)


@MODELS
def test_a_loaded_model_is_ordinary(make, tmp_path):
    model = make()
    save_sparse(model, tmp_path / "packed")
    again = load_sparse(tmp_path / "packed").train()
    again(pixel_values=images(), labels=torch.tensor([1, 2])).loss.backward()
    assert all(p.grad is not None for p in again.parameters() if p.requires_grad)
    again.load_state_dict(model.state_dict())  # train mode has moved the BatchNorm statistics
    save_dense(model, tmp_path / "dense")
    save_dense(again, tmp_path / "again")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    save_sparse(again, tmp_path / "again")
    assert_same_weights(load_sparse(tmp_path / "again"), model)


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


@MODELS
def test_a_stock_loader_stops_at_the_packed_file(make, tmp_path):
    """Else it would go on with random weights and a warning; the file's name is that of a transformers variant."""
    save_sparse(make(), tmp_path)
    with pytest.raises(OSError, match="no file named model.safetensors"):
        AutoModelForImageClassification.from_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatched"):
        AutoModelForImageClassification.from_pretrained(tmp_path, variant="sparse")


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


def test_damaged_shards_are_refused(tmp_path):
    model = vit()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    good = index.read_text()
    entries = json.loads(good)
    for text, message in [
        ("{", "not an index"),
        ('{"weight_map": 3}', "not an index"),
        (json.dumps({"weight_map": {"a": "../a.safetensors"}}), "same folder"),
        (good.replace("classifier.bias", "other.bias"), "1 missing: other.bias; 1 unexpected: classifier.bias"),
    ]:
        index.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_weights(model, tmp_path)
    index.write_text(good)
    (tmp_path / entries["weight_map"]["classifier.bias"]).unlink()
    with pytest.raises(FileNotFoundError, match="model-0"):
        load_weights(model, tmp_path)


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


def test_load_sparse_says_what_is_not_there(tmp_path):
    save_dense(vit(), tmp_path)
    with pytest.raises(FileNotFoundError, match=f"no {SPARSE_FILE}.*save_sparse"):
        load_sparse(tmp_path)
    save_sparse(vit(), tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no config.json"):
        load_sparse(tmp_path)
    (tmp_path / SPARSE_FILE).touch()
    with pytest.raises(FileNotFoundError, match="is a file; give the folder that holds it"):
        load_sparse(tmp_path / SPARSE_FILE)
    with pytest.raises(FileNotFoundError, match="neither a folder"):
        load_sparse(tmp_path / "elsewhere")


def test_load_sparse_refuses_what_does_not_fit(tmp_path):
    model = vit()
    path = save_sparse(model, tmp_path)
    tensors = read_sparse_file(path)
    name, renamed = "vit.encoder.layer.0.attention.attention.query.weight", "vit.layers.0.attention.q_proj.weight"
    less = {key: tensor for key, tensor in tensors.items() if key != name}
    for changed, message in [
        (less, f"1 missing: {renamed}"),
        ({**tensors, "more.weight": torch.ones(3)}, "1 unexpected: more.weight"),
        ({**tensors, name: torch.ones(3, 3)}, rf"1 of another shape: {renamed} \(3, 3\) for \(32, 32\)"),
    ]:
        write_sparse_file(changed, path)
        with pytest.raises(ValueError, match=message):
            load_sparse(tmp_path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="truncated or damaged"):
        load_sparse(tmp_path)
    write_sparse_file(tensors, path)
    assert_same_weights(load_sparse(tmp_path), model)
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="BertConfig.*no image classifier"):
        load_sparse(tmp_path)


def test_load_sparse_downloads_two_files_of_one_commit(tmp_path, monkeypatch):
    model = vit()
    snapshot = tmp_path / "snapshots" / "0123abcd"
    save_sparse(model, snapshot)
    asked = []

    def download(repo, name, revision, token):
        asked.append((repo, name, revision, token))
        return str(snapshot / name)

    monkeypatch.setattr(loading, "hf_hub_download", download)
    again = load_sparse("owner/name", revision="v1", token="t")
    assert_same_weights(again, model)
    assert again.config.name_or_path == "owner/name"
    assert asked == [("owner/name", SPARSE_FILE, "v1", "t"), ("owner/name", "config.json", "0123abcd", "t")]


def test_hub_errors_are_told_apart(monkeypatch):
    def raises(error):
        def download(*args, **kwargs):
            raise error

        monkeypatch.setattr(loading, "hf_hub_download", download)

    raises(RemoteEntryNotFoundError.__new__(RemoteEntryNotFoundError))
    with pytest.raises(FileNotFoundError, match=f"'owner/name' on the Hub lacks {SPARSE_FILE}.*save_sparse"):
        load_sparse("owner/name")
    raises(LocalEntryNotFoundError("no connection"))
    with pytest.raises(LocalEntryNotFoundError, match="no connection"):
        load_sparse("owner/name")


@MODELS
def test_load_weights_restores_the_model(make, tmp_path):
    model, other = make(0), make(1)
    save_dense(model, tmp_path)
    assert differs(model, other)
    parameters, state = list(other.parameters()), torch.get_rng_state()
    load_weights(other.train(), tmp_path)
    assert_same_weights(other, model)
    assert torch.equal(logits(other.eval()), logits(model))
    assert all(a is b for a, b in zip(parameters, other.parameters(), strict=True))  # an optimizer holds on to them
    assert torch.equal(torch.get_rng_state(), state)


def test_the_raw_file_would_not_restore_a_vit(tmp_path):
    """Why load_weights exists: the names on disk are not those in memory, and strict=False hides it."""
    model, other = vit(0), vit(1)
    save_dense(model, tmp_path)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert differs(model, other)
    load_weights(other, tmp_path)
    assert not differs(model, other)


@pytest.mark.parametrize("disk, own", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_load_weights_keeps_the_dtype_of_the_model(disk, own, tmp_path):
    model, other = vit(0).to(disk), vit(1).to(own)
    save_dense(model, tmp_path)
    load_weights(other, tmp_path)
    assert {p.dtype for p in other.parameters()} == {own}
    assert_same_weights(other, model.to(own))


def test_load_weights_of_mixed_dtypes_is_exact(tmp_path):
    def mixed(seed):
        model = vit(seed).to(torch.bfloat16)
        model.classifier.to(torch.float32)
        pruned(model.classifier, seed)  # values that bfloat16 does not have
        return model

    model, other = mixed(0), mixed(1)
    save_dense(model, tmp_path)
    load_weights(other, tmp_path)
    assert_same_weights(other, model)


def test_load_weights_refuses_and_leaves_the_model_alone(tmp_path):
    model, other = vit(0), vit(1)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    save_dense(model, tmp_path)
    good = load_file(tmp_path / "model.safetensors")
    less = {name: tensor for name, tensor in good.items() if name != "classifier.bias"}
    for changed, message in [
        (less, "1 missing: classifier.bias"),
        ({**good, "more": torch.ones(2)}, "1 unexpected: more"),
        ({**less, "classifier.bias": torch.ones(3)}, r"1 of another shape: classifier.bias \(3,\) for \(10,\)"),
    ]:
        save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            load_weights(other, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10")
    with pytest.raises(ValueError, match="truncated or damaged"):
        load_weights(other, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no checkpoint folder"):
        load_weights(other, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_load_weights_notices_what_is_attached_to_the_model(tmp_path):
    save_dense(vit(0), tmp_path)
    other = vit(1)
    other.register_buffer("mask", torch.ones(3))
    with pytest.raises(ValueError, match="1 missing: mask"):
        load_weights(other, tmp_path)


def test_load_weights_into_a_plain_module(tmp_path):
    model, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert differs(model, other)
    load_weights(other, tmp_path)
    assert_same_weights(other, model)
    with pytest.raises(ValueError, match="unexpected: bias"):
        load_weights(torch.nn.Linear(3, 2, bias=False), tmp_path)
    with pytest.raises(ValueError, match="shape: weight"):
        load_weights(torch.nn.Linear(4, 2), tmp_path)


def test_state_file_round_trip(tmp_path):
    mask = torch.rand(5, 6, generator=torch.Generator().manual_seed(0)) < 0.3
    tensors = {"mask": mask, "turned": mask.t(), "tied": mask, "scale": torch.tensor(0.5), "none": torch.empty(0)}
    path = save_state(tensors, tmp_path / "new" / STATE_FILE, {"step": "12", "schedule": "cubic"})
    found, metadata = load_state(path)
    assert metadata == {"step": "12", "schedule": "cubic"}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    with open(path, "r+b") as file:  # safetensors maps files into memory: what was read must not hang on this one
        file.write(b"\0" * path.stat().st_size)
    assert torch.equal(found["mask"], mask) and found["scale"] == 0.5
    save_state({"mask": ~mask}, path)
    assert load_state(path)[1] == {} and torch.equal(load_state(path)[0]["mask"], ~mask)
    assert [p.name for p in path.parent.iterdir()] == [STATE_FILE]


def test_damaged_state_files_are_refused(tmp_path):
    path = tmp_path / STATE_FILE
    with pytest.raises(FileNotFoundError, match=f"{STATE_FILE}.*start anew"):
        load_state(path)
    save_state({"mask": torch.ones(50, dtype=torch.bool)}, path, {"step": "12"})
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-20] ^= 1  # a weight that would come back to life
    later = whole.replace(b'"12"', b'"13"')
    assert later != whole
    for damaged in (whole[:-1], whole[:30], b"", bytes(flipped), later):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=STATE_FILE):
            load_state(path)
    save_file({"mask": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="digest"):
        load_state(path)
    for wrong in ({"step": 12}, {"tscnc_sha256": "x"}):
        with pytest.raises(ValueError, match="text to text"):
            save_state({}, path, wrong)


def test_a_timm_config_does_not_choose_files_to_load(tmp_path):
    config = resnet().config
    config.model_args = config.model_args | {"checkpoint_path": str(tmp_path / "evil.pth"), "cache_dir": "elsewhere"}
    config.save_pretrained(tmp_path)
    assert "evil" in (tmp_path / "config.json").read_text()
    assert read_config(tmp_path).model_args == resnet().config.model_args
