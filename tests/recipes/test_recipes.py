"""The scripts as a user starts them, and their folders as a stranger without this package reads them."""

import io
import json
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.processes import run_python
from tests.results_page import check_results
from tscnc_hf import load_sparse
from tscnc_hf.artifact.models.loading import logits_fn
from tscnc_hf.data.loading import load_image_data


pytestmark = pytest.mark.launched

ROOT = Path(__file__).parents[2]

VIT = """
dataset: digits
channels: rgb
train_limit: 96
test_limit: 40
augmentation: crop
test_attacks: [clean, fgsm, pgd-2]
compare_dense: true
teacher: dense-twin
distill_weight: 0.5
patch_size: 4
hidden_size: 32
num_hidden_layers: 2
num_attention_heads: 2
objective: trades
epsilon: 0.1
attack_steps: 1
eval_attack_steps: 1
tsc_weight: 1e-6
cnc_weight: 1e-3
target_sparsity: 0.5
pruning_interval: 1
num_train_epochs: 2
per_device_train_batch_size: 32
learning_rate: 2e-3
logging_steps: 1
eval_strategy: epoch
save_strategy: epoch
load_best_model_at_end: true
metric_for_best_model: robust_accuracy
report_to: none
use_cpu: true
cpu_threads: 1
"""

TIMM = """
architecture: resnet18
model_args: {channels: [8, 8, 8, 8], layers: [1, 1, 1, 1]}
image_column: Bild
label_column: Tier
augmentation: flip
validation_fraction: 0.2
test_attacks: [clean, pgd-2]
objective: pgd-at
adversary: fgsm-rs
epsilon: 8/255
target_sparsity: 0.9
pruning_interval: 1
num_train_epochs: 2
per_device_train_batch_size: 16
learning_rate: 1e-2
save_strategy: epoch
eval_strategy: epoch
report_to: none
use_cpu: true
cpu_threads: 1
"""


def environment(cache: Path) -> dict:
    return {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cache), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def launch(recipe: str, options: str, folder: Path, *more: str) -> str:
    config = folder / f"{recipe}.yaml"
    config.write_text(options)
    command = [ROOT / "recipes" / f"{recipe}.py", "--config", config, "--output_dir", folder / recipe, *more]
    return run_python(command, environment=environment(folder), cwd=folder).stdout


def write_parquet(folder: Path) -> Path:
    """Cats are dark, dogs are bright; the columns have names that nobody could guess."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for split, count in (("train", 60), ("test", 20)):
        labels = [i % 2 for i in range(count)]
        images = []
        for label in labels:
            buffer = io.BytesIO()
            pixels = random.integers(0, 128, (12, 10, 3), dtype=np.uint8) + 127 * label
            Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
            images.append({"bytes": buffer.getvalue(), "path": None})
        features = datasets.Features(
            {"Bild": datasets.Image(), "other": datasets.Image(), "Tier": datasets.ClassLabel(names=["Katze", "Hund"])}
        )
        table = datasets.Dataset.from_dict({"Bild": images, "other": images, "Tier": labels}, features=features)
        table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, tuple[Path, str]]:
    """Both recipes run once: name -> (output folder, what was printed)."""
    folder = tmp_path_factory.mktemp("recipes")
    data = write_parquet(folder / "animals")
    size = ["--image_size", "10"]
    return {
        "vit_cifar10": (folder / "vit_cifar10", launch("vit_cifar10", VIT, folder, "--target_sparsity", "0.9")),
        "timm_cifar10": (
            folder / "timm_cifar10", launch("timm_cifar10", TIMM, folder, "--dataset", str(data), *size)
        ),
    }  # fmt: skip


STRANGER = """
import json, sys
sys.modules["tscnc_hf"] = None  # importing it now raises ImportError
import numpy as np, torch
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

for folder in sys.argv[1:]:
    model = AutoModelForImageClassification.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    size = json.loads(sys.stdin.readline())
    images = np.random.default_rng(5).integers(0, 256, (6, *size, 3), dtype=np.uint8)
    with torch.no_grad():
        inputs = torch.cat([processor(image, return_tensors="pt")["pixel_values"] for image in images])
        logits = model(pixel_values=inputs).logits
    weights = [w for name, w in model.state_dict().items() if name.endswith(".weight") and w.ndim > 1]
    print(json.dumps({
        "logits": logits.tolist(), "names": list(model.config.id2label.values()),
        "zeros": sum(int((w == 0).sum()) for w in weights), "prunable": sum(w.numel() for w in weights),
    }))
assert not any(name.startswith("tscnc_hf.") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def stranger(runs, tmp_path_factory) -> dict[str, dict]:
    """What a process that cannot import this package finds in both folders."""
    sizes = {"vit_cifar10": [8, 8], "timm_cifar10": [10, 10]}
    done = run_python(
        ["-c", STRANGER, *(runs[name][0] for name in sizes)],
        text="".join(json.dumps(size) + "\n" for size in sizes.values()),
        cwd=tmp_path_factory.mktemp("elsewhere"), environment=environment(tmp_path_factory.mktemp("cache")),
    )  # fmt: skip
    return dict(zip(sizes, map(json.loads, done.stdout.splitlines()), strict=True))


RECIPES = pytest.mark.parametrize("recipe", ["vit_cifar10", "timm_cifar10"])


@RECIPES
def test_the_folder_holds_what_it_should(recipe, runs):
    folder, printed = runs[recipe]
    for name in (
        "model.safetensors", "model.sparse.safetensors", "config.json", "README.md", "figures/layers.png",
        "results.json", "tscnc_config.json",
    ):  # fmt: skip
        assert (folder / name).stat().st_size > 0, name
    assert not (folder / "training_args.bin").exists()
    assert not list(folder.glob("*.bin")) and not list(folder.glob("*.pt*"))
    assert (folder / "model.sparse.safetensors").stat().st_size < (folder / "model.safetensors").stat().st_size
    assert str(folder) in printed
    assert "sparsity" in printed and "90.00%" in printed and "pgd-2 accuracy" in printed


@RECIPES
def test_the_options_of_file_and_command_line_were_used(recipe, runs):
    folder, _ = runs[recipe]
    options = json.loads((folder / "tscnc_config.json").read_text())
    assert options["target_sparsity"] == 0.9
    if recipe == "vit_cifar10":
        assert (options["epsilon"], options["tsc_weight"], options["objective"]) == (0.1, 1e-6, "trades")
    else:
        assert (options["epsilon"], options["objective"], options["adversary"]) == (8 / 255, "pgd-at", "fgsm-rs")
    results = json.loads((folder / "results.json").read_text())
    assert results["robustness"]["n"] == (40 if recipe == "vit_cifar10" else 20)
    assert results["robustness"]["threat_model"]["epsilon"] == options["epsilon"]


@RECIPES
def test_a_stranger_gets_the_same_logits(recipe, runs, stranger):
    folder, _ = runs[recipe]
    height = 8 if recipe == "vit_cifar10" else 10
    images = np.random.default_rng(5).integers(0, 256, (6, height, height, 3), dtype=np.uint8)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    model = load_sparse(folder)
    from transformers import AutoImageProcessor

    with torch.no_grad():
        logits = logits_fn(model, AutoImageProcessor.from_pretrained(folder))(pixels)
    assert logits.std() > 1e-3
    assert torch.allclose(torch.tensor(stranger[recipe]["logits"]), logits, rtol=0, atol=1e-5)
    digits = [str(i) for i in range(10)]
    assert stranger[recipe]["names"] == (digits if recipe == "vit_cifar10" else ["Katze", "Hund"])


@RECIPES
def test_the_zeros_a_stranger_counts_are_those_of_results_and_card(recipe, runs, stranger):
    folder, _ = runs[recipe]
    found, results = stranger[recipe], json.loads((folder / "results.json").read_text())
    assert found["zeros"] == results["sparsity"]["zeros"] == round(0.9 * found["prunable"])
    assert found["prunable"] == results["sparsity"]["prunable"]
    assert results["sparsity"]["sparsity"] == found["zeros"] / found["prunable"]
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"{found['zeros']:,} of {found['prunable']:,}" in card
    on_disk = load_file(folder / "model.safetensors")
    matrices = [w for name, w in on_disk.items() if name.endswith(".weight") and w.ndim > 1]
    assert sum(int((w == 0).sum()) for w in matrices) == found["zeros"]


@RECIPES
def test_the_results_are_those_of_the_saved_model(recipe, runs):
    folder, _ = runs[recipe]
    results = json.loads((folder / "results.json").read_text())["robustness"]
    clean, *attacked = results["attacks"]
    assert clean["name"] == "clean" and all(attack["correct"] <= clean["correct"] for attack in attacked)
    if recipe == "vit_cifar10":
        test = load_image_data("digits", test_limit=40).test
        pixels, labels = test.images.float() / 255, test.labels
        with torch.no_grad():
            predicted = load_sparse(folder)(pixel_values=(pixels - 0.5) / 0.25).logits.argmax(-1)
        assert int((predicted == labels).sum()) == clean["correct"]


def test_the_dense_twin_is_dense_and_compared(runs):
    folder, printed = runs["vit_cifar10"]
    header = next(line for line in printed.splitlines() if "dense" in line and "pruned" in line)
    assert header.split() == ["dense", "pruned"]
    (row,) = [line for line in printed.splitlines() if line.startswith("sparsity")]
    assert row.split() == ["sparsity", "0.00%", "90.00%"]
    twin = json.loads((folder.with_name(f"{folder.name}-dense-twin") / "results.json").read_text())
    assert twin["sparsity"]["zeros"] == 0
    load_sparse(folder.with_name(f"{folder.name}-dense-twin"))  # a model like any other, with its own card
    assert (folder.with_name(f"{folder.name}-dense-twin") / "README.md").is_file()
    card = (folder / "README.md").read_text(encoding="utf-8")
    (row,) = [line for line in card.splitlines() if line.startswith("| Clean accuracy")]
    own = json.loads((folder / "results.json").read_text())
    check_results(own)
    assert own["dense"] == twin
    shown = [float(number) / 100 for number in re.findall(r"\| ([\d.]+) %", row)]
    accuracies = [results["robustness"]["attacks"][0]["accuracy"] for results in (twin, own)]
    assert shown == pytest.approx(accuracies, abs=6e-4)


def test_the_dense_twin_taught(runs):
    folder, _ = runs["vit_cifar10"]
    twin = folder.with_name(f"{folder.name}-dense-twin")
    used, of_twin = (json.loads((one / "tscnc_config.json").read_text()) for one in (folder, twin))
    assert (used["teacher"], used["distill_weight"]) == (twin.name, 0.5)
    assert (of_twin["teacher"], of_twin["distill_weight"]) == (None, 0.0)


def test_a_recipe_goes_on_from_its_last_checkpoint(runs):
    """Nothing is left to train: the same weights come out."""
    folder, _ = runs["timm_cifar10"]
    before = (folder / "model.safetensors").read_bytes()
    state = json.loads((max(folder.glob("checkpoint-*")) / "trainer_state.json").read_text())
    assert state["global_step"] == state["max_steps"]
    launch(
        "timm_cifar10",
        TIMM,
        folder.parent,
        "--dataset",
        str(folder.parent / "animals"),
        "--image_size",
        "10",
        "--resume",
    )
    assert (folder / "model.safetensors").read_bytes() == before


def test_an_attack_that_does_not_exist_ends_before_training(tmp_path):
    command = [ROOT / "recipes" / "vit_cifar10.py", "--dataset", "digits", "--test_attacks", "cw", "--use_cpu"]
    done = run_python([*command, "--output_dir", tmp_path / "out"], status=None, environment=environment(tmp_path))
    assert done.returncode != 0 and "'cw' does not exist; known are clean, fgsm, pgd-K" in done.stderr
    assert not (tmp_path / "out").exists()
