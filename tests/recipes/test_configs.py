"""The files of `recipes/configs`, launched at a tiny size on data laid out as the Hub's; no recipe goes unlaunched."""

import io
import json
import math
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from tests.processes import run_python


pytestmark = pytest.mark.launched

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
TINY_RESNET = {"channels": [8, 8, 8, 8], "layers": [1, 1, 1, 1]}
TINY_VIT = {"embed_dim": 32, "depth": 1, "num_heads": 2}

# A tiny run of anything; a config's own options come through wherever they are not named here.
TINY = {
    "max_steps": 4, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 8, "logging_steps": 1,
    "gradient_accumulation_steps": 1, "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": "false",
    "validation_fraction": 0.25, "train_limit": 16, "test_limit": 8, "test_attacks": "clean", "attack_steps": 1,
    "pruning_interval": 1, "disable_tqdm": "true", "use_cpu": "true", "bf16": "false", "cpu_threads": 1,
}  # fmt: skip
TINY_TIMM = {"model_args": json.dumps(TINY_RESNET), "pretrained": "false"}
NO_WORKERS = {"dataloader_num_workers": 0, "dataloader_persistent_workers": "false"}

# config -> recipe, data set, and what else has to be smaller
RUNS = {
    "vit_digits_demo": ("vit_cifar10", "digits", {"compare_dense": "false", "hidden_size": 32}),
    "vit_cifar10": ("vit_cifar10", "cifar10", {"hidden_size": 32, "num_hidden_layers": 1}),
    "timm_cifar10": ("timm_cifar10", "cifar10", {"model_args": json.dumps(TINY_RESNET), "target_sparsity": 0}),
    "finetune": ("finetune", "cifar10", {"model_name_or_path": "timm_cifar10"}),  # dense, as the config's header says
    "timm_cifar100": (
        "timm_cifar10", "cifar100",
        {"model_args": json.dumps(TINY_RESNET), "input_size": 64, "interpolation": "nearest"},
    ),
    "timm_imagefolder": ("timm_cifar10", "folder", TINY_TIMM | NO_WORKERS),
    "imagenet_resnet50": ("timm_cifar10", "imagenet", TINY_TIMM | {"image_size": 64} | NO_WORKERS),
    "imagenet_vit_s16": (
        "timm_cifar10", "imagenet",
        {"model_args": json.dumps(TINY_VIT), "pretrained": "false", "dataloader_num_workers": 2},
    ),
}  # fmt: skip

# One process is told to be one user after the other: most of a launch is the time that imports take.
ONE_AFTER_THE_OTHER = """
import json, runpy, sys
for recipe, *options in json.loads(sys.argv[1]):
    sys.argv = [recipe, *options]
    runpy.run_path(recipe, run_name="__main__")
"""


def stored(number: int, height: int, width: int, kind: str = "PNG") -> dict:
    noise = np.random.default_rng(number).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((width, height)).save(buffer, kind)
    return {"bytes": buffer.getvalue(), "path": None}


def write_split(folder: Path, split: str, images: list[dict], image_column: str = "image", **labels) -> None:
    """`labels`: column = (class names, label of each image)."""
    folder.mkdir(exist_ok=True)
    features = {name: datasets.ClassLabel(names=names) for name, (names, _) in labels.items()}
    made = datasets.Dataset.from_dict(
        {image_column: images} | {name: values for name, (_, values) in labels.items()},
        features=datasets.Features({image_column: datasets.Image()} | features),
    )
    made.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))


def write_data(root: Path) -> dict[str, str]:
    """Columns, splits and labels as the Hub has them; images as users have them."""
    ten, hundred = [f"thing {i}" for i in range(10)], [f"small thing {i}" for i in range(100)]
    twenty, thousand = [f"kind {i}" for i in range(20)], [f"class {i}" for i in range(1000)]
    for split, count in (("train", 40), ("test", 10)):
        images, numbers = [stored(i, 32, 32) for i in range(count)], list(range(count))
        write_split(root / "cifar10", split, images, "img", label=(ten, [i % 10 for i in numbers]))
        fine, coarse = (hundred, [i % 20 for i in numbers]), (twenty, [i % 20 for i in numbers])
        write_split(root / "cifar100", split, images, "img", fine_label=fine, coarse_label=coarse)
        for i in numbers:
            file = root / "folder" / {"train": "train", "test": "val"}[split] / f"{'ab'[i % 2]}" / f"{i}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(stored(i, 80 + i, 100, "JPEG")["bytes"])
    for split, count in (("train", 40), ("validation", 10), ("test", 10)):
        images = [stored(i, 240 + i, 300 - i, "JPEG") for i in range(count)]
        labels = [-1] * count if split == "test" else [i % 20 for i in range(count)]
        write_split(root / "imagenet", split, images, label=(thousand, labels))
    return {"digits": "digits"} | {name: str(root / name) for name in ("cifar10", "cifar100", "folder", "imagenet")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, str]:
    """All configs launched: the folder with an output folder for each, and what was printed."""
    root = tmp_path_factory.mktemp("configs")
    (root / "data").mkdir()
    sources, commands = write_data(root / "data"), []
    for config, (recipe, source, smaller) in RUNS.items():
        options = TINY | {"dataset": sources[source], "output_dir": config} | smaller
        command = [str(RECIPES / f"{recipe}.py"), "--config", str(RECIPES / "configs" / f"{config}.yaml")]
        commands.append(command + [str(text) for name, value in options.items() for text in (f"--{name}", value)])
    (root / "users.py").write_text(ONE_AFTER_THE_OTHER)
    command = ["-m", "accelerate.commands.launch", "--config_file", RECIPES / "accelerate/single.yaml"]
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "hf"), "CUDA_VISIBLE_DEVICES": ""}
    done = run_python([*command, root / "users.py", json.dumps(commands)], cwd=root, environment=environment)
    return root, done.stdout


CONFIGS = pytest.mark.parametrize("config", RUNS)


@CONFIGS
def test_the_options_of_the_file_were_used(config, runs):
    """All that shape a run and were not made smaller for the test."""
    used = json.loads((runs[0] / config / "tscnc_config.json").read_text())
    asked = yaml.safe_load((RECIPES / "configs" / f"{config}.yaml").read_text())
    compared = 0
    for name in (asked.keys() & used.keys()) - TINY.keys() - RUNS[config][2].keys():
        value = asked[name]
        if isinstance(used[name], float) and not isinstance(value, float):
            value = math.prod(
                float(part) ** power for part, power in zip(str(value).split("/"), (1, -1), strict=False)
            )
        assert used[name] == value, name
        compared += 1
    assert compared >= 8


@CONFIGS
def test_it_was_trained_pruned_and_tested(config, runs):
    results = json.loads((runs[0] / config / "results.json").read_text())
    asked = yaml.safe_load((RECIPES / "configs" / f"{config}.yaml").read_text())
    target = RUNS[config][2].get("target_sparsity", asked["target_sparsity"])
    assert results["sparsity"]["zeros"] == round(target * results["sparsity"]["prunable"])
    assert results["robustness"]["n"] == 8
    assert (runs[0] / config / "model.sparse.safetensors").is_file() and (runs[0] / config / "README.md").is_file()


def test_data_are_what_the_configs_say(runs):
    lines = [line.split("Data: ")[1] for line in runs[1].splitlines() if line.startswith("Data: ")]
    printed = dict(zip(RUNS, lines, strict=True))
    kept, read = "decoded in memory (", "decoded as they are read; training images: random resized crops and flips"
    assert "of 3x32x32 in 10 classes" in printed["timm_cifar10"] and kept in printed["timm_cifar10"]
    assert "in 100 classes" in printed["timm_cifar100"]
    assert "random crops of the padded image and flips" in printed["timm_cifar100"]
    assert "of 3x128x128 in 2 classes" in printed["timm_imagefolder"] and read in printed["timm_imagefolder"]
    assert "of 3x224x224 in 1000 classes" in printed["imagenet_vit_s16"] and read in printed["imagenet_vit_s16"]
    assert "tested on split 'validation'" in printed["imagenet_vit_s16"]


def test_what_was_fine_tuned_is_the_model_that_was_named(runs):
    """The same network and classes; four steps from it, not from elsewhere."""
    folder, printed = runs
    before, after = (load_file(folder / name / "model.safetensors") for name in ("timm_cifar10", "finetune"))
    assert before.keys() == after.keys()
    assert "Model: timm_cifar10, head for 10 classes kept; images of 32x32" in printed
    matrices = [name for name, tensor in before.items() if tensor.ndim > 1]
    start, end = (torch.cat([state[name].flatten() for name in matrices]) for state in (before, after))
    kept = end != 0
    assert (end - start)[kept].norm() < 0.2 * start[kept].norm()  # fresh weights would be 1.4 times away


def test_every_recipe_and_config_is_launched_or_named_as_not_run():
    tests = "".join(
        path.read_text() for path in sorted((ROOT / "tests").rglob("*.py")) if path.parent != ROOT / "tests"
    )
    not_run = [line for line in (ROOT / "README.md").read_text().splitlines() if "GPU only" in line]
    launched = {f"configs/{config}.yaml" for config in RUNS} | {f"{recipe}.py" for recipe, *_ in RUNS.values()}
    for path in [*RECIPES.glob("*.py"), *RECIPES.glob("configs/*.yaml")]:
        name = path.relative_to(RECIPES).as_posix()
        named = any(path.name in line for line in not_run)
        assert name in launched or path.name in tests or named, f"recipes/{name} is launched by no test"
