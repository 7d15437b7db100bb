"""Names and folders to models: every door gives what was saved, or says what is wrong."""

import io
import json

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, BertConfig, ViTImageProcessor, ViTModel

from tests.small_models import MODELS, NAMES, assert_same_weights, differs, images, logits, pruned, resnet, vit
from tscnc_hf import SparseConfig, slim
from tscnc_hf.artifact.models import loading
from tscnc_hf.artifact.models.building import timm_model
from tscnc_hf.artifact.models.config import config_digest, input_format, read_config, read_processor
from tscnc_hf.artifact.models.loading import load_model, load_slim, load_sparse, load_weights
from tscnc_hf.artifact.models.saving import disk_state, save_sparse
from tscnc_hf.artifact.packed.file import SPARSE_FILE, read_sparse_file, write_sparse_file
from tscnc_hf.artifact.repository.opening import open_repository, read_model
from tscnc_hf.artifact.repository.push import push_folder


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
    model.save_pretrained(tmp_path / "dense")
    again.save_pretrained(tmp_path / "again")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "again"))
    plain = lambda tensors: {name.removeprefix("timm_model."): tensor for name, tensor in tensors.items()}  # noqa: E731
    one, other = plain(one), plain(other)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    save_sparse(again, tmp_path / "again")
    assert_same_weights(load_sparse(tmp_path / "again"), model)


@MODELS
def test_a_stock_loader_stops_at_the_packed_file(make, tmp_path):
    """Else it would go on with random weights and a warning; the file's name is that of a transformers variant."""
    save_sparse(make(), tmp_path)
    with pytest.raises(OSError, match="no file named model.safetensors"):
        AutoModelForImageClassification.from_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatched"):
        AutoModelForImageClassification.from_pretrained(tmp_path, variant="sparse")


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


def test_load_sparse_says_what_is_not_there(tmp_path):
    vit().save_pretrained(tmp_path)
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
    model.save_pretrained(tmp_path)
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
    model.save_pretrained(tmp_path)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert differs(model, other)
    load_weights(other, tmp_path)
    assert not differs(model, other)


@pytest.mark.parametrize("disk, own", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_load_weights_keeps_the_dtype_of_the_model(disk, own, tmp_path):
    model, other = vit(0).to(disk), vit(1).to(own)
    model.save_pretrained(tmp_path)
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
    model.save_pretrained(tmp_path)
    load_weights(other, tmp_path)
    assert_same_weights(other, model)


def test_load_weights_refuses_and_leaves_the_model_alone(tmp_path):
    model, other = vit(0), vit(1)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    model.save_pretrained(tmp_path)
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
    vit(0).save_pretrained(tmp_path)
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


def say_in_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("kind", ["one file", "shards", "mixed", "packed"])
@pytest.mark.parametrize("stored, said", [("float32", "float16"), ("float16", "float32"), ("bfloat16", None)])
def test_a_dtype_in_the_config_does_not_round_what_is_stored(stored, said, kind, tmp_path):
    """Else an evaluation would be of another model than the card, which sees the packed file."""
    model = vit().to(getattr(torch, stored))
    if kind == "mixed":  # the whole gets the dtype that holds all of it
        model.classifier.to(torch.float32)
        pruned(model.classifier, 1)
    if kind == "packed":
        save_sparse(model, tmp_path)
    else:
        model.save_pretrained(tmp_path, max_shard_size="20KB" if kind == "shards" else "1GB")
    say_in_config(tmp_path, dtype=said)
    found, expected = load_slim(tmp_path), model.to(torch.float32) if kind == "mixed" else model
    assert_same_weights(found, expected)
    assert_same_weights(found, as_repository(tmp_path))
    assert found.dtype == found.config.dtype == expected.dtype
    assert load_slim(tmp_path, dtype=torch.float64).dtype == torch.float64
    assert load_slim(tmp_path, dtype="bfloat16").dtype == torch.bfloat16


def test_the_dtype_is_that_of_the_file_also_on_the_hub(hub, tmp_path):
    for name, size in (("one", "1GB"), ("shards", "20KB")):
        vit().save_pretrained(tmp_path / name, max_shard_size=size)
        ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / name)
        say_in_config(tmp_path / name, dtype="float16")
        push_folder(tmp_path / name, f"tester/{name}")
        assert_same_weights(load_slim(f"tester/{name}"), vit())


def test_a_value_that_is_rounded_to_zero_is_no_damage(tmp_path):
    model = vit()
    with torch.no_grad():
        model.classifier.weight[0, 0] = 1e-9
    save_sparse(model, tmp_path)
    assert_same_weights(load_sparse(tmp_path), model)
    model.to(torch.float16)
    assert model.classifier.weight[0, 0] == 0
    for load in (load_sparse, load_slim):
        for dtype in (torch.float16, "float16"):
            assert_same_weights(load(tmp_path, dtype=dtype), model)


def test_a_timm_config_does_not_choose_files_to_load(tmp_path):
    config = resnet().config
    config.model_args = config.model_args | {"checkpoint_path": str(tmp_path / "evil.pth"), "cache_dir": "elsewhere"}
    config.save_pretrained(tmp_path)
    assert "evil" in (tmp_path / "config.json").read_text()
    assert read_config(tmp_path).model_args == resnet().config.model_args


@pytest.mark.parametrize("architecture", ["local-dir:elsewhere", "hf-hub:someone/else", "HF_HUB:someone/else"])
def test_a_timm_config_does_not_send_elsewhere(architecture, tmp_path):
    resnet().save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    say_in_config(tmp_path, architecture=architecture)
    for load in (load_model, load_slim, as_repository):
        with pytest.raises(ValueError, match=f"names the architecture '{architecture}'.*timm's own name there"):
            load(tmp_path)
    config = resnet().config
    assert_same_weights(load_slim(tmp_path, config=config), resnet())  # of one's own code


def test_code_beside_an_image_processor_is_never_run(tmp_path, monkeypatch):
    """transformers asks whether to, and runs it if "y" is what stdin has."""
    vit().save_pretrained(tmp_path)
    says = {"image_processor_type": "Own", "auto_map": {"AutoImageProcessor": "own.Own"}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(says))
    ran = tmp_path / "ran"
    code = f"from transformers import ViTImageProcessor as Own\nopen({str(ran)!r}, 'w').close()\n"
    (tmp_path / "own.py").write_text(code)
    for door in (load_model, read_processor, input_format):
        monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
        with pytest.raises(ValueError, match="code of its own.*never run here.*such as ViTImageProcessor"):
            door(str(tmp_path))
        assert not ran.exists()


# ---- every door, every kind of damage ----


def slimmed():
    """A ViT whose layers are of unequal width, which only a record can say."""
    model = vit()
    for layer, dead in zip(model.vit.layers, (10, 30), strict=True):
        layer.mlp.fc1.weight.data[:dead] = 0
        layer.mlp.fc1.bias.data[:dead] = 0
    small, report = slim(model)
    assert report.config == "recorded"
    return small


def stock_packed(folder):
    return AutoModelForImageClassification.from_pretrained(
        folder, variant="sparse", quantization_config=SparseConfig()
    )


def into(make):
    def load(folder):
        model = make()
        load_weights(model, folder)
        return model

    return load


def as_repository(folder):
    return read_model(open_repository(folder))[0]


KINDS = {"vit": (vit, "classifier.weight"), "timm": (resnet, "fc.weight"), "slimmed": (slimmed, "classifier.weight")}
BOTH = {"load_model": lambda folder: load_model(folder)[0], "load_slim": load_slim, "repository": as_repository}


def damages(tensors, head):
    """(tensors with one thing wrong, what must be said of it)"""
    inner = next(name for name in tensors if tensors[name].ndim == 4 or name.endswith("fc1.weight"))
    for name in (head, inner):
        last = name.removeprefix("vit.").split(".", 3)[-1].replace("intermediate.dense", "mlp.fc1")
        yield {key: tensor for key, tensor in tensors.items() if key != name}, f"1 missing: .*{last}"
        yield tensors | {name: tensors[name][:-1].contiguous()}, f"1 of another shape: .*{last} .* for "
    yield tensors | {"vit.layers.7.mlp.fc1.weight": torch.ones(2)}, "1 unexpected: .*layers.7.mlp.fc1.weight"


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("kind", KINDS)
def test_dense_weights_are_all_there_and_no_others_whatever_the_door(kind, sharded, tmp_path):
    make, head = KINDS[kind]
    model = make()
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    processor.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, max_shard_size="20KB" if sharded else "1GB", state_dict=disk_state(model))
    doors = BOTH | {"load_weights": into(make)}
    for load in doors.values():
        assert_same_weights(load(tmp_path), model)
    if kind != "slimmed":
        assert_same_weights(AutoModelForImageClassification.from_pretrained(tmp_path), model)
    tensors = {}
    for path in tmp_path.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    for changed, message in damages(tensors, head):
        if sharded:
            names = sorted(changed)
            parts = [names[::2], names[1::2]]
            index = {"metadata": {}, "weight_map": {}}
            for number, part in enumerate(parts, 1):
                file = f"model-0000{number}-of-00002.safetensors"
                save_file({name: changed[name] for name in part}, tmp_path / file, {"format": "pt"})
                index["weight_map"] |= dict.fromkeys(part, file)
            (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        else:
            save_file(changed, tmp_path / "model.safetensors", {"format": "pt"})
        for load in doors.values():
            with pytest.raises(ValueError, match=message):
                load(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_weights_are_all_there_and_no_others_whatever_the_door(kind, tmp_path):
    make, head = KINDS[kind]
    model = make()
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    path = save_sparse(model, tmp_path)
    doors = BOTH | {"load_sparse": load_sparse}
    if kind != "slimmed":
        doors["transformers"] = stock_packed
    for load in doors.values():
        assert_same_weights(load(tmp_path), model)
    tensors = read_sparse_file(path)
    for changed, message in damages(tensors, head):
        write_sparse_file(changed, path, config=config_digest(tmp_path))
        for load in doors.values():
            with pytest.raises(ValueError, match=message):
                load(tmp_path)


def test_transformers_alone_does_not_load_what_is_packed_and_slimmed(tmp_path):
    save_sparse(slimmed(), tmp_path)
    with pytest.raises((ValueError, RuntimeError), match="shape|size|mismatch"):
        stock_packed(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "empty", "no shard"])
def test_damaged_dense_files_are_errors_that_name_them(damage, tmp_path):
    model = vit()
    model.save_pretrained(tmp_path, max_shard_size="20KB" if damage == "no shard" else "1GB")
    path = sorted(tmp_path.glob("*.safetensors"))[0]
    if damage == "no shard":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: 1000 if damage == "truncated" else 0])
    for load in (load_slim, into(vit), as_repository):
        with pytest.raises((ValueError, FileNotFoundError, OSError), match=str(tmp_path)):
            load(tmp_path)


def test_config_and_weights_are_of_the_revision_that_was_asked_for(hub, tmp_path):
    """Main has a wide model, a branch the slimmed one, dense, and another the same, packed."""
    wide, small = vit(), slimmed()
    wide.save_pretrained(tmp_path / "wide")
    small.save_pretrained(tmp_path / "dense")
    save_sparse(small, tmp_path / "packed")
    for name, revision in (("wide", None), ("dense", "slim"), ("packed", "packed")):
        ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / name)
        push_folder(tmp_path / name, "tester/model", revision=revision)
    for load in (load_slim, lambda name, **options: load_model(name, **options)[0]):
        assert_same_weights(load("tester/model"), wide)
        for revision in ("slim", "packed"):
            found = load("tester/model", revision=revision)
            assert_same_weights(found, small)
            assert found.config.tscnc["slim"] == small.config.tscnc["slim"]
            assert found.config.name_or_path == "tester/model"
    assert_same_weights(load_sparse("tester/model", revision="packed"), small)
    with pytest.raises(FileNotFoundError, match="on the Hub lacks"):
        load_sparse("tester/model", revision="slim")
    with pytest.raises(OSError, match="nowhere"):
        load_slim("tester/model", revision="nowhere")


SAVINGS = pytest.mark.parametrize(
    "save", [lambda model, folder: model.save_pretrained(folder), save_sparse], ids=["dense", "packed"]
)


@SAVINGS
@pytest.mark.parametrize("after", ["read_config", "load_slim"])
def test_what_is_pushed_while_a_model_is_read_is_not_mixed_in(save, after, hub, tmp_path, monkeypatch):
    save(vit(0), tmp_path / "one")
    save(vit(1), tmp_path / "other")
    for folder, side in (("one", 8), ("other", 9)):
        ViTImageProcessor(size={"height": side, "width": side}).save_pretrained(tmp_path / folder)
    push_folder(tmp_path / "one", "tester/model")
    then = getattr(loading, after)

    def push_after(*args, **options):
        found = then(*args, **options)
        push_folder(tmp_path / "other", "tester/model")
        return found

    monkeypatch.setattr(loading, after, push_after)
    model, processor = load_model("tester/model")
    assert len(hub.commits("tester/model")) == 3
    assert_same_weights(model, vit(0))
    assert processor.size["height"] == 8


def test_options_of_from_pretrained_reach_both_kinds_of_weights(tmp_path):
    model = vit()
    model.save_pretrained(tmp_path / "dense")
    save_sparse(model, tmp_path / "packed")
    for folder in (tmp_path / "dense", tmp_path / "packed"):
        found = load_slim(folder, dtype=torch.bfloat16, attn_implementation="eager")
        assert_same_weights(found, vit().to(torch.bfloat16))
        assert found.config._attn_implementation == "eager"


def test_buffers_that_a_model_computes_itself_are_no_weights(tmp_path):
    """Files of older timm versions store them."""
    options = {"img_size": 32, "window_size": 4, "embed_dim": 12, "depths": [2], "num_heads": [2]}
    model, _ = timm_model("swin_tiny_patch4_window7_224", NAMES, (32, 32), model_args=options)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    computed = {name: tensor.clone() for name, tensor in model.named_buffers() if name not in weights}
    assert any(name.endswith("attn_mask") for name in computed)
    save_file(weights | computed, tmp_path / "model.safetensors", {"format": "pt"})
    assert_same_weights(load_slim(tmp_path), model)


# ---- a new head ----


def test_a_backbone_with_a_pooler_gets_a_head(tmp_path):
    backbone = ViTModel(vit().config)
    backbone.save_pretrained(tmp_path)
    assert any(name.startswith("pooler") for name in load_file(tmp_path / "model.safetensors"))
    with pytest.raises(ValueError, match="missing: classifier.*unexpected: .*pooler"):
        load_slim(tmp_path)
    model = load_slim(tmp_path, NAMES, new_head=True)
    state = backbone.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.vit.state_dict().items())
    assert load_slim(tmp_path, NAMES[:3]).num_labels == 3


def test_a_new_head_is_no_licence_for_other_weights(tmp_path):
    """Not even for those with as many rows as there are classes."""
    vit(hidden_size=32).save_pretrained(tmp_path)
    path, classes = tmp_path / "model.safetensors", [str(number) for number in range(32)]
    good = load_file(path)
    assert load_slim(tmp_path, classes).classifier.weight.shape == (32, 32)
    less = {name: tensor for name, tensor in good.items() if name != "vit.layernorm.weight"}
    more = good | {"vit.encoder.layer.2.output.dense.bias": torch.ones(32)}
    for changed, message in ((less, "1 missing: vit.layernorm.weight"), (more, "1 unexpected: vit.*layer.*2")):
        save_file(changed, path, {"format": "pt"})
        with pytest.raises(ValueError, match=message):
            load_slim(tmp_path, classes)
