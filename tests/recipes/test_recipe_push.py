"""`--push_to_hub` of a recipe against a stand-in for the Hub, and loading from it in a fresh cache."""

from pathlib import Path

import pytest
import torch

from tests.hub import LocalHub
from tests.processes import run_python


ROOT = Path(__file__).parents[2]
PUBLISHED = {
    "README.md",
    "config.json",
    "figures/layers.png",
    "model.safetensors",
    "model.sparse.safetensors",
    "preprocessor_config.json",
    "tscnc_config.json",
}
LOAD = """
import sys, torch
from transformers import AutoModelForImageClassification
from tscnc_hf import load_sparse
dense, packed = AutoModelForImageClassification.from_pretrained(sys.argv[1]), load_sparse(sys.argv[1])
same = all(torch.equal(a, b) for a, b in zip(dense.state_dict().values(), packed.state_dict().values(), strict=True))
torch.save((same, dense.state_dict()), sys.argv[2])
"""


@pytest.mark.launched
def test_a_recipe_pushes_a_whole_folder_without_pickles(tmp_path):
    hub = LocalHub()
    options = {
        "output_dir": tmp_path / "my-model",
        "num_train_epochs": 2,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "attack_steps": 1,
        "pruning_interval": 1,
        "compare_dense": "true",
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "push_to_hub": "true",
        "hub_strategy": "checkpoint",
        "hub_always_push": "true",
        "use_cpu": "true",
    }
    command = ["recipes/vit_cifar10.py", "--config", "recipes/configs/vit_digits_demo.yaml"]
    command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
    run_python(command, cwd=ROOT, environment=hub.environment(tmp_path / "home"))

    repo = "tester/my-model"
    assert PUBLISHED <= hub.files(repo) and "results.json" in hub.files(repo)
    assert not [path for path in hub.ever(repo) if path.endswith("training_args.bin") or "dense-twin" in path]
    pickles = [path for path in hub.ever(repo) if path.endswith((".pt", ".pth", ".bin"))]
    assert all(path.startswith("last-checkpoint/") for path in pickles)  # what resuming needs, if asked for
    in_progress = [files for _, message, files in hub.commits(repo) if message.startswith("Training in progress")]
    assert in_progress and all(PUBLISHED <= set(files) for files in in_progress)
    assert any(path.startswith("last-checkpoint/") for path in hub.ever(repo))
    card = hub.content(repo, "README.md").decode()
    assert "PGD-20" in card and "model-index" in card and f'from_pretrained("{repo}")' in card
    assert "python recipes/vit_cifar10.py --config" in card.replace(" \\\n    ", " ")  # not by accelerate launch

    run_python(["-c", LOAD, repo, tmp_path / "loaded.pt"], environment=hub.environment(tmp_path / "fresh-home"))
    same, loaded = torch.load(tmp_path / "loaded.pt")
    assert same

    from transformers import AutoModelForImageClassification

    local = AutoModelForImageClassification.from_pretrained(tmp_path / "my-model").state_dict()
    assert all(torch.equal(local[name], loaded[name]) for name in local)
