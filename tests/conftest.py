"""Small models built from config and small data: no network, no GPU."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The networks are tiny: more threads only wait for each other, for minutes when another process wants the cores too.
os.environ["OMP_NUM_THREADS"] = "1"  # here and in what tests start
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no pool of processes that stays

import base64
import gc
import signal
from pathlib import Path

import psutil
import pytest

from tests.processes import adopt_orphans, end, left_behind


adopt_orphans()
pytest_plugins = ["tests.trainers"]  # models of several kinds, and trainers for a few steps

CLASS_NAMES = [str(digit) for digit in range(10)]


# Files that take more than half a minute, the longest first: what runs last is short then, and no process waits.
LONG = (
    "evaluation/test_run",
    "docs/test_blocks",
    "recipes/test_configs",
    "training/resume/test_faults",
    "training/ablation/test_grid",
    "evaluation/measures/test_masking",
    "recipes/test_accelerate_configs",
    "training/resume/test_sharded_training",
    "evaluation/test_whole_evaluation",
    "recipes/test_recipes",
    "training/test_combinations",
    "cli/test_evaluate",
    "training/test_hub_strategies",
    "training/resume/test_resume",
    "training/test_teacher",
    "training/test_trainer",
    "training/test_pruned_training",
)


def pytest_collection_modifyitems(items):
    places = {f"tests/{name}.py": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.nodeid.split("::")[0], len(LONG)))


@pytest.fixture(scope="module", autouse=True)
def _modules_are_no_garbage():
    """Each training collects garbage more than once, and would look through all of torch and transformers: 0.3 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_process_is_left():
    yield
    if left := left_behind():
        said = [f"{process.pid} ({' '.join(process.cmdline())[:200]})" for process in left]
        end(left)
        psutil.wait_procs(left)
        pytest.fail(f"processes were left behind, and are killed: {', '.join(said)}")


# A white pixel.
BLANK = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAsTj2FAAAAABJRU5ErkJggg=="
)


@pytest.fixture
def drawn_figures():
    """Figures are drawn as users get them."""


@pytest.fixture(autouse=True)
def _blank_figures(request, monkeypatch):
    """Figures are made, but not drawn: that takes as long as the trainings of most tests."""
    if "drawn_figures" in request.fixturenames or request.node.get_closest_marker("launched"):
        return

    def save(fig, path, photographs=False):
        from tscnc_hf.artifact.files.atomic import atomic_file

        with atomic_file(path) as temporary:
            temporary.write_bytes(BLANK)
        return Path(path)

    monkeypatch.setattr("tscnc_hf.artifact.card.figures.save_figure", save)


@pytest.fixture(autouse=True)
def _seed():
    import torch  # which a process that only distributes tests can do without

    torch.manual_seed(0)


@pytest.fixture
def ctrl_c():
    """SIGINT does what it does in the foreground, here and in what the test starts, also if it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def digits():
    from tscnc_hf.data.loading import load_image_data

    return load_image_data("digits", augmentation="crop")


@pytest.fixture
def tiny_vit():
    from tscnc_hf.artifact.models.building import vit_from_config

    return vit_from_config(
        CLASS_NAMES, (8, 8), 3, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2
    )


@pytest.fixture
def tiny_resnet():
    from tscnc_hf.artifact.models.building import timm_model

    return timm_model(
        "resnet18", CLASS_NAMES, (8, 8), 3, model_args={"channels": [8, 8, 8, 8], "layers": [1, 1, 1, 1]}
    )


@pytest.fixture
def make_config(tmp_path):
    """A `TSCNCConfig` for a few quick steps on the CPU."""
    from tscnc_hf.training.config import TSCNCConfig

    def make(**options):
        defaults = {
            "output_dir": str(tmp_path / "out"),
            "num_train_epochs": 2,
            "per_device_train_batch_size": 32,
            "per_device_eval_batch_size": 128,
            "learning_rate": 1e-3,
            "attack_steps": 1,
            "eval_attack_steps": 2,
            "epsilon": 0.1,
            "tsc_weight": 1e-5,
            "cnc_weight": 1e-3,
            "target_sparsity": 0.9,
            "pruning_interval": 1,
            "logging_steps": 2,
            "eval_strategy": "no",
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            "report_to": "none",
        }
        if options.get("pruning_start", 0.25) == options.get("pruning_end", 0.75):
            del defaults["pruning_interval"]  # at once
        return TSCNCConfig(**(defaults | options))

    return make


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for the Hub that huggingface_hub in this process talks to, with an empty cache."""
    from tests.hub import LocalHub, connect

    hub = LocalHub()
    connect(hub, monkeypatch, tmp_path / "hf-home")
    yield hub
    hub.shutdown()
    hub.server_close()


# ---- small networks that are trained for real, so that attacks have something to do ----


class AsTheyAre:
    """Says that a model takes pixels as they are."""

    image_mean, image_std = [0.0], [1.0]


@pytest.fixture(scope="session")
def as_they_are():
    return AsTheyAre


@pytest.fixture(scope="session")
def train_network(digits):
    """`train_network(epsilon, seed=0)`: a convolutional network of the digits, in evaluation mode."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    from tscnc_hf.method.adversarial.pgd import pgd, seeded_generator

    def train(epsilon: float, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, stride=2), nn.ReLU(),
            nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10),
        )  # fmt: skip
        optimizer = torch.optim.Adam(model.parameters(), 2e-3)
        generator = seeded_generator("cpu", seed, "train")
        for _ in range(300):
            batch = digits.train.__getitems__(torch.randint(len(digits.train), (128,), generator=generator).tolist())
            x, y = batch["pixel_values"].float(), batch["labels"]
            if epsilon:
                x = pgd(model, x, y, epsilon=epsilon, steps=3, generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        model.zero_grad(set_to_none=True)
        return model.eval()

    return train


@pytest.fixture(scope="session")
def robust_network(train_network):
    return train_network(0.1)


@pytest.fixture(scope="session")
def plain_network(train_network):
    return train_network(0.0)
