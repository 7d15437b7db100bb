"""What save_sparse and save_pretrained write, and what a stranger makes of it."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageClassification,
    ViTForImageClassification,
)

from tests.small_models import MODELS, assert_same_weights, resnet, vit
from tscnc_hf import SparseConfig
from tscnc_hf.artifact.files.identity import weights_digest
from tscnc_hf.artifact.models.loading import load_sparse, load_weights
from tscnc_hf.artifact.models.saving import disk_state, save_sparse
from tscnc_hf.artifact.packed.file import SPARSE_FILE, read_sparse_file, write_sparse_file
from tscnc_hf.artifact.repository.inspection import inspect_model, summary_rows
from tscnc_hf.artifact.repository.opening import open_repository, read_model, read_tensors


@MODELS
def test_the_packed_file_has_the_names_of_the_dense_one_and_is_smaller(make, tmp_path):
    model = make()
    model.save_pretrained(tmp_path, state_dict=disk_state(model))
    path = save_sparse(model, tmp_path)
    dense, packed = load_file(tmp_path / "model.safetensors"), read_sparse_file(path)
    assert dense.keys() == packed.keys() and all(torch.equal(dense[name], packed[name]) for name in dense)
    assert path.stat().st_size < 0.6 * (tmp_path / "model.safetensors").stat().st_size
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors", SPARSE_FILE]


def test_a_timm_model_is_read_and_packed_under_either_spelling_of_its_names(tmp_path):
    model, plain, wrapped = resnet(), tmp_path / "plain", tmp_path / "wrapped"
    model.save_pretrained(plain, state_dict=disk_state(model))
    model.save_pretrained(wrapped)
    names = {folder: set(load_file(folder / "model.safetensors")) for folder in (plain, wrapped)}
    assert names[wrapped] == {name for name in model.state_dict()} != names[plain]
    assert names[plain] == {name.removeprefix("timm_model.") for name in names[wrapped]}
    for folder in (plain, wrapped):
        load_weights(other := resnet(1), folder)
        assert_same_weights(other, model)
        assert set(read_sparse_file(save_sparse(model, folder))) == names[plain]
        write_sparse_file(load_file(folder / "model.safetensors"), folder / SPARSE_FILE)
        found = AutoModelForImageClassification.from_pretrained(
            folder, variant="sparse", quantization_config=SparseConfig()
        )
        for one in (load_sparse(folder), found, read_model(open_repository(folder))[0]):
            assert_same_weights(one, model)
        with pytest.raises(ValueError, match="dense weights that are not this model's"):
            save_sparse(resnet(1), folder)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_what_nobody_could_load_is_refused(tmp_path):
    for attach in (
        torch.nn.utils.parametrizations.weight_norm,
        torch.nn.utils.weight_norm,
        torch.nn.utils.spectral_norm,
        lambda layer: torch.nn.utils.prune.random_unstructured(layer, "weight", 0.5),
        lambda layer: torch.nn.utils.prune.random_unstructured(layer, "bias", 0.5),
    ):
        model = vit()
        attach(model.classifier)
        with pytest.raises(ValueError, match="1 layers.*classifier.*remove_parametrizations"):
            save_sparse(model, tmp_path / "out")
    with pytest.raises(ValueError, match="got Linear.*PreTrainedModel"):
        save_sparse(torch.nn.Linear(2, 2), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mixed_dtypes_are_not_packed(tmp_path):
    model = vit()
    model.classifier.to(torch.bfloat16)
    with pytest.raises(ValueError, match="torch.bfloat16.*one floating dtype"):
        save_sparse(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_never_holds_two_models(tmp_path):
    first, second = vit(0), vit(1)
    first.save_pretrained(tmp_path)
    save_sparse(first, tmp_path)
    with pytest.raises(ValueError, match="not this model's.*Call model.save_pretrained"):
        save_sparse(second, tmp_path)
    assert_same_weights(load_sparse(tmp_path), first)
    second.save_pretrained(tmp_path)
    for read in (read_tensors, load_sparse):
        with pytest.raises(ValueError, match="holds other weights than the dense file beside it"):
            read(tmp_path)
    save_sparse(second, tmp_path)
    assert_same_weights(load_sparse(tmp_path), second)


@pytest.mark.parametrize("make", [vit, resnet])
def test_dense_and_packed_lie_in_one_folder_in_any_order(make, tmp_path):
    model = make()
    save_sparse(model, tmp_path)
    model.save_pretrained(tmp_path)  # a timm model under its wrapper's names
    assert_same_weights(load_sparse(tmp_path), model)
    save_sparse(model, tmp_path)
    model.save_pretrained(tmp_path, state_dict=disk_state(model))  # and under its own
    assert_same_weights(load_sparse(tmp_path), model)
    save_sparse(load_sparse(tmp_path), tmp_path)
    assert_same_weights(AutoModelForImageClassification.from_pretrained(tmp_path), model)


def test_names_as_they_are_in_memory_are_the_same_model(tmp_path):
    model = vit()
    save_sparse(model, tmp_path)
    model.save_pretrained(tmp_path, save_original_format=False)
    assert_same_weights(load_sparse(tmp_path), model)
    vit(1).save_pretrained(tmp_path, save_original_format=False)
    with pytest.raises(ValueError, match="holds other weights than the dense file beside it"):
        load_sparse(tmp_path)


def test_a_model_that_torch_pruned_packs_as_small_as_another(tmp_path):
    """`prune.remove` leaves -0.0 where a negative weight was."""
    model = vit()
    for layer in [module for module in model.modules() if isinstance(module, torch.nn.Linear)]:
        torch.nn.init.normal_(layer.weight)
        torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.95)
        torch.nn.utils.prune.remove(layer, "weight")
    assert any(weight[weight == 0].signbit().any() for weight in model.parameters())
    plain = copy.deepcopy(model)
    for weight in plain.parameters():
        weight.data.add_(0.0)
    sizes = [save_sparse(one, tmp_path / name).stat().st_size for name, one in (("minus", model), ("plain", plain))]
    assert sizes[0] == sizes[1]
    for one in (model, plain):
        assert_same_weights(load_sparse(tmp_path / "minus"), one)
    assert weights_digest(model) == weights_digest(plain) == weights_digest(load_sparse(tmp_path / "minus"))
    model.save_pretrained(tmp_path / "minus")
    assert_same_weights(load_sparse(tmp_path / "minus"), plain)  # beside the dense file with its signs
    found = inspect_model(open_repository(tmp_path / "minus"))
    assert found["minus_zeros"] > 1000 and "minus zeros" in dict(summary_rows(found))
    assert found["sizes"]["limit_bytes"] == inspect_model(open_repository(tmp_path / "plain"))["sizes"]["limit_bytes"]


def test_what_is_packed_is_compared_with_shards_too(tmp_path):
    first = vit(0)
    first.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    load_weights(other := vit(2), tmp_path)
    assert_same_weights(other, first)
    with pytest.raises(ValueError, match="not this model's"):
        save_sparse(vit(1), tmp_path)
    save_sparse(first, tmp_path)
    assert_same_weights(load_sparse(tmp_path), first)


def test_an_interrupted_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    first = vit(0)
    first.save_pretrained(tmp_path)
    save_sparse(first, tmp_path)

    def breaks(self, folder, **kwargs):
        (Path(folder) / "model.safetensors").write_bytes(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(ViTForImageClassification, "save_pretrained", breaks)
    with pytest.raises(OSError, match="disk full"):
        save_sparse(vit(1), tmp_path)
    assert_same_weights(load_sparse(tmp_path), first)
    assert_same_weights(AutoModelForImageClassification.from_pretrained(tmp_path), first)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors", SPARSE_FILE]
