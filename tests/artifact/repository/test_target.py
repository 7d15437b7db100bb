"""What a target would leave of each layer, before training."""

import pytest
import timm
import torch
from torch import nn

from tscnc_hf.artifact.repository.inspection import inspect_model, summary_rows, target_rows, what_would_be_left
from tscnc_hf.artifact.repository.opening import open_repository
from tscnc_hf.method.matrices import weight_matrices
from tscnc_hf.method.pruning.pruner import Pruner


@pytest.mark.parametrize("scope", ["global", "uniform", "erk"])
def test_it_is_what_pruning_leaves(scope):
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=3, channels=[8, 8, 16, 16], layers=[1, 1, 1, 1])
    with torch.no_grad():
        model.conv1.weight *= 1e-3
    rows = what_would_be_left(list(weight_matrices(model)), 0.95, scope)
    pruner = Pruner(weight_matrices(model), allocation=scope)
    pruner.update(0.95)
    assert {row["name"]: row["kept"] for row in rows} == {name: int(m.sum()) for name, m in pruner.masks.items()}
    stem = rows[0]
    assert stem["name"] == "conv1.weight" and stem["rows"] == 64 and stem["numel"] == 64 * 147
    if scope == "global":
        assert stem["kept"] == stem["live_rows"] == 1  # what the floor keeps: easy to see in the table
    for row in rows:
        mask = pruner.masks[row["name"]].flatten(1)
        assert row["live_rows"] == int(mask.any(1).sum())


def test_zeros_that_are_there_are_not_left():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    nn.init.zeros_(model[0].weight)
    first, second = what_would_be_left(list(weight_matrices(model)), 0.25)
    assert first["kept"] == first["live_rows"] == 0 and second["kept"] == 64


def test_as_a_table_and_refused_where_it_makes_no_sense(tiny_vit, tmp_path):
    tiny_vit[0].save_pretrained(tmp_path)
    repository = open_repository(tmp_path)
    found = inspect_model(repository, spectrum=False, target=0.9, scope="uniform")
    assert "rows" not in found["sparsity"]
    header, *rows = target_rows(found)
    assert header[2] == "left at 0.9" and len(rows) == len(found["target"]["rows"])
    assert all(row[3] in ("10.0 %", "10.1 %", "9.9 %", "10.2 %", "9.8 %") for row in rows)
    assert not any(label == "COLLAPSED" for label, _ in summary_rows(found))
    for target in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="a fraction of zeros"):
            inspect_model(repository, spectrum=False, target=target)
