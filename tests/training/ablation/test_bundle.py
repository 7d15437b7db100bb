"""What is carried away of a finished cell, and weights that are rounded before they are measured."""

import io
import tarfile

import pytest
import torch
from torch import nn

from tscnc_hf.training.ablation.bundle import bundle, check_names
from tscnc_hf.training.ablation.grid import round_


FILES = {
    "model.sparse.safetensors": 5000, "model.safetensors": 9000, "trained.safetensors": 9000, "config.json": 10,
    "README.md": 20, "figures/layers.png": 30, "checkpoint-3/model.safetensors": 40, "state/batch-000000.json": 5,
}  # fmt: skip
KEPT = {"model.sparse.safetensors", "config.json", "README.md", "figures/layers.png"}


@pytest.fixture
def folder(tmp_path):
    for name, size in FILES.items():
        path = tmp_path / "cell" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(range(256)) * (size // 256) + b"x" * (size % 256))
    return tmp_path / "cell"


@pytest.mark.parametrize("part_bytes, parts", [(1 << 20, 1), (3000, 7)])
def test_everything_but_dense_weights_in_parts_of_a_size(folder, tmp_path, part_bytes, parts):
    found = bundle(folder, tmp_path / "back", "TSC + teacher-0.9-s0", part_bytes)
    assert len(found) == parts and all(path.stat().st_size <= part_bytes for path in found)
    assert found[0].name == "TSC-teacher-0.9-s0.tar" + (".00" if parts > 1 else "")
    whole = io.BytesIO(b"".join(path.read_bytes() for path in sorted((tmp_path / "back").iterdir())))
    with tarfile.open(fileobj=whole) as tar:
        tar.extractall(tmp_path / "there", filter="data")
    (there,) = (tmp_path / "there").iterdir()
    assert {str(path.relative_to(there)) for path in there.rglob("*") if path.is_file()} == KEPT
    assert all((there / name).read_bytes() == (folder / name).read_bytes() for name in KEPT)


def test_an_older_one_is_replaced(folder, tmp_path):
    bundle(folder, tmp_path / "back", "a", 3000)
    bundle(folder, tmp_path / "back", "a")
    assert [path.name for path in (tmp_path / "back").iterdir()] == ["a.tar"]


def test_two_cells_do_not_have_one_bundle():
    check_names(["TSC-0.9-s0", "TSC + CNC-0.9-s0", "plain-0.9-s0"])
    with pytest.raises(ValueError, match="'TSC - CNC-0.9-s0' would both be TSC-CNC-0.9-s0.tar"):
        check_names(["TSC + CNC-0.9-s0", "TSC - CNC-0.9-s0"])


def test_a_folder_without_a_packed_file_is_refused(folder, tmp_path):
    (folder / "model.sparse.safetensors").unlink()
    with pytest.raises(ValueError, match="has no packed file"):
        bundle(folder, tmp_path / "back", "a")


@pytest.mark.parametrize("name, narrow", [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_rounded_weights_are_what_the_dtype_holds(name, narrow):
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    model[0].weight.data[0] = 0.0
    before = {key: value.clone() for key, value in model.state_dict().items()}
    round_(model, name)
    for key, value in model.state_dict().items():
        floating = value.is_floating_point()
        assert value.dtype == before[key].dtype
        assert torch.equal(value, before[key].to(narrow).to(value.dtype) if floating else before[key])
    assert (model[0].weight[0] == 0).all() and not torch.equal(model[0].weight, before["0.weight"])


def test_a_value_that_would_be_infinite_is_refused():
    model = nn.Linear(2, 2)
    model.weight.data[0, 0] = 7e4
    with pytest.raises(ValueError, match="weight has values up to 7e[+]04, too large for fp16"):
        round_(model, "fp16")
