"""The side file of a training checkpoint."""

import pytest
import torch
from safetensors.torch import save_file

from tscnc_hf.artifact.files.state import STATE_FILE, load_state, save_state


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
