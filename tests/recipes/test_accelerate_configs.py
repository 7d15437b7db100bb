"""The files of `recipes/accelerate` as a user gives them to `accelerate launch`: as many processes as they say."""

import json
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

from tests.processes import run_python
from tscnc_hf.training.trainer import TSCNCTrainer


ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes" / "accelerate"
# Processes and batch size of each: 16 images a step. ddp.yaml starts the processes that it would start for GPUs; the
# recipe's use_cpu puts them on the CPU. fsdp2.yaml: tests/training/test_sharded_training.py
SIZES = {"single": (1, 16), "ddp_cpu": (2, 8), "ddp": (2, 8)}

VIT = """
dataset: digits
channels: rgb
train_limit: 96
test_limit: 40
augmentation: crop
test_attacks: [clean, pgd-2]
patch_size: 4
hidden_size: 32
num_hidden_layers: 2
num_attention_heads: 2
objective: trades
adversary: pgd
epsilon: 0.1
attack_steps: 1
eval_attack_steps: 1
tsc_weight: 1e-6
cnc_weight: 1e-2
ema_decay: 0.9
target_sparsity: 0.8
pruning_interval: 1
num_train_epochs: 1
optim: sgd
learning_rate: 0.1
logging_steps: 1
save_strategy: epoch
report_to: none
use_cpu: true
cpu_threads: 1
"""


def launch(name: str, folder: Path) -> Path:
    processes, size = SIZES[name]
    config, out = folder / "vit.yaml", folder / name
    config.write_text(VIT)
    command = ["-m", "accelerate.commands.launch", "--config_file", CONFIGS / f"{name}.yaml"]
    if processes > 1:
        command += ["--main_process_port", "0"]  # a free one
    command += [ROOT / "recipes" / "vit_cifar10.py", "--config", config, "--output_dir", out]
    command += ["--per_device_train_batch_size", str(size)]
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    run_python(command, environment=environment, cwd=folder)
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("accelerate")
    return {name: launch(name, folder) for name in SIZES}


@pytest.mark.launched
@pytest.mark.parametrize("name", SIZES)
def test_as_many_processes_as_the_file_says_shared_the_run(name, runs):
    processes, _ = SIZES[name]
    state = json.loads((runs[name] / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["global_step"] == state["max_steps"] == 96 // 16  # two runs beside each other would take 12 steps
    files = {path.name for path in (runs[name] / "checkpoint-6").glob("rng_state*")}  # each process writes its own
    assert files == ({f"rng_state_{rank}.pth" for rank in range(processes)} if processes > 1 else {"rng_state.pth"})


@pytest.mark.launched
@pytest.mark.parametrize("name", [name for name in SIZES if name != "single"])
def test_several_processes_train_and_test_as_one(name, runs):
    one, two = (load_file(runs[which] / "model.safetensors") for which in ("single", name))
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        assert torch.allclose(tensor, two[key], rtol=0, atol=1e-5), key
    one, two = (json.loads((runs[which] / "results.json").read_text()) for which in ("single", name))
    assert one["robustness"]["attacks"] == two["robustness"]["attacks"]
    assert one["sparsity"]["zeros"] == two["sparsity"]["zeros"] == round(0.8 * one["sparsity"]["prunable"])


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_knows_every_option(path):
    load_config_from_file(str(path))  # it refuses a key that it does not know


def test_processes_that_do_not_know_of_each_other_are_refused(make_config, tiny_vit, digits, monkeypatch):
    """As with ddp_cpu.yaml, but without use_cpu."""
    config = make_config()
    monkeypatch.setenv("WORLD_SIZE", "2")
    model, processor = tiny_vit
    with pytest.raises(RuntimeError, match="2 processes were started, but each would train alone.*use_cpu"):
        TSCNCTrainer(model, config, train_dataset=digits.train, processing_class=processor)
