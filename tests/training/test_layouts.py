"""The same effective batch on one process, in micro-batches and on two processes: the same training and evaluation."""

import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from tests.processes import run_processes
from tscnc_hf.artifact.models.building import vit_from_config
from tscnc_hf.data.loading import load_image_data
from tscnc_hf.training.adversary import Adversary
from tscnc_hf.training.config import TSCNCConfig
from tscnc_hf.training.trainer import TSCNCTrainer


pytestmark = pytest.mark.launched

ATTACKED = {"attack_steps": 2, "epsilon_warmup": 0.5}
CASES = {
    "natural": {"objective": "natural", "adversary": "none"},
    "pgd-at": {
        "objective": "pgd-at",
        "adversary": "mixed",
        "natural_fraction": 0.1,
        "epsilon_warmup": 0.4,
        "teacher": "dense",
        "distill_weight": 1.0,
        "regrow_fraction": 0.3,
        "regrow_interval": 2,
        "label_smoothing_factor": 0.1,
    },
    "trades": {"objective": "trades", "adversary": "kl-pgd", **ATTACKED},
    "gates": {"objective": "trades", "adversary": "kl-pgd", **ATTACKED, "tsc_on": "gates", "tsc_weight": 1e-2},
    "l2": {"objective": "mart", "adversary": "pgd", **ATTACKED, "norm": "l2", "epsilon": 0.5},
}
# each micro-batch finds weights of its own that are worst for it, so accumulation is another method there
CASES["awp"] = {"objective": "trades", "adversary": "kl-pgd", **ATTACKED, "awp_gamma": 0.01}
EVERY_TERM = {
    "max_steps": 20,
    "optim": "sgd",  # adaptive optimizers blow rounding errors up where the true gradient is zero, as of key biases
    "learning_rate": 0.1,
    "weight_decay": 0.01,
    "max_grad_norm": 2.0,
    "epsilon": 0.1,
    "tsc_weight": 1e-5,
    "cnc_weight": 1e-2,
    "target_sparsity": 0.8,
    "pruning_interval": 2,
    "ema_decay": 0.9,
    "eval_attack_steps": 2,
    "per_device_eval_batch_size": 8,
    "logging_steps": 5,
    "eval_strategy": "no",
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
}
SAVING, CUT = {"save_strategy": "steps", "save_steps": 11}, "checkpoint-11"  # within the second epoch and the schedule


class AtTheEnd(TrainerCallback):
    """The weights after the last step, before their average takes their place."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == state.max_steps:
            self.weights = {f"now.{name}": tensor.clone() for name, tensor in model.state_dict().items()}


def run(
    case: str, folder: Path, size: int, accumulation: int = 1, images: int = 64, resume: Path | None = None, **options
) -> dict:
    """
    Train and evaluate on 37 images; the weights before ("start."), at the end ("now.") and averaged ("average."),
    the masks and all logits. Two processes call it at once.
    """
    data = load_image_data("digits", augmentation="crop")
    torch.manual_seed(0)
    sizes = {"patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model, processor = vit_from_config(data.class_names, (8, 8), 3, **sizes)
    logits, end = {}, AtTheEnd()

    def keep(given):
        logits["clean"], logits["adversarial"] = logits.get("adversarial"), given.predictions  # in turn
        return {}

    trainer = TSCNCTrainer(
        model=model,
        args=TSCNCConfig(
            str(folder / "out"), per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
            **(EVERY_TERM | CASES[case] | options),
        ),
        train_dataset=data.train.subset(range(images)),
        eval_dataset=data.validation.subset(range(37)),
        processing_class=processor,
        compute_metrics=keep,
        callbacks=[end],
    )  # fmt: skip
    start = {f"start.{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    with CaptureLogger(logging.get_logger("tscnc_hf.training.resume.resumable")) as said:
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    metrics = trainer.evaluate()
    tensors = start | end.weights | {f"average.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"mask.{name}": mask for name, mask in trainer.compressor.pruner.masks.items()}
    tensors |= {f"logits.{name}": torch.from_numpy(np.asarray(value)) for name, value in logits.items()}
    processes = trainer.accelerator.num_processes
    return {"tensors": tensors, "log": logged, "metrics": metrics, "processes": processes, "said": said.out}


def on_a_process(rank: int, folder: str, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "1"}
    torch.set_num_threads(1)
    for case in (*CASES, "resumed"):
        if case == "resumed":
            done = run("gates", Path(folder) / "resumed", 4, resume=Path(folder) / "single" / "out" / CUT)
        else:
            done = run(case, Path(folder) / case, 4, **(SAVING if case == "gates" else {}))
        found = {name: done[name] for name in ("log", "metrics", "processes", "said")}
        found |= {"world": dist.get_world_size(), "rank": dist.get_rank(), "backend": dist.get_backend()}
        save_file({name: tensor.contiguous() for name, tensor in done["tensors"].items()}, f"{folder}/{case}.{rank}")
        Path(f"{folder}/{case}.{rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> dict[str, list[dict]]:
    """Case -> what each of the two processes found; and what they did with "resumed", a run that one began."""
    folder = tmp_path_factory.mktemp("two")
    run("gates", folder / "single", 8, **SAVING)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_processes(on_a_process, str(folder), port)
    found = {case: [] for case in (*CASES, "resumed")}
    for case, ranks in found.items():
        for rank in range(2):
            about = json.loads((folder / f"{case}.{rank}.json").read_text())
            ranks.append(about | {"tensors": load_file(folder / f"{case}.{rank}")})
    return found | {"folder": folder}


def part(found: dict, kind: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in found["tensors"].items() if name.startswith(f"{kind}.")}


def largest_difference(one: dict, other: dict, kind: str) -> float:
    first, second = part(one, kind), part(other, kind)
    assert first.keys() == second.keys() and first
    return max(float((first[name].float() - second[name].float()).abs().max()) for name in first)


def assert_same_evaluation(one: dict, other: dict) -> None:
    for name in ("eval_accuracy", "eval_robust_accuracy"):
        assert one["metrics"][name] == other["metrics"][name]
    clean, adversarial = (
        (one["tensors"][f"logits.{name}"] - other["tensors"][f"logits.{name}"]).abs().amax(1)
        for name in ("clean", "adversarial")
    )
    assert len(clean) == len(adversarial) == 37
    assert clean.max() < 1e-5
    attacked = (one["tensors"]["logits.adversarial"] != one["tensors"]["logits.clean"]).any(1)  # the others are wrong
    # a rounding error may turn the sign of a pixel's gradient: 5e-5 in that image; other noise: up to 1e-3, in all
    assert attacked.sum() >= 3 and (adversarial[attacked] > 1e-5).sum() <= 1 and adversarial.max() < 1e-3


@pytest.mark.parametrize("case", CASES)
def test_a_batch_of_8_in_three_ways(case, two_processes, tmp_path):
    whole, accumulated = run(case, tmp_path, 8), run(case, tmp_path, 4, 2)
    ranks = two_processes[case]
    for rank, found in enumerate(ranks):
        assert (found["world"], found["processes"], found["rank"], found["backend"]) == (2, 2, rank, "gloo")
    assert whole["processes"] == accumulated["processes"] == 1

    for kind in ("now", "average", "mask"):
        assert part(ranks[0], kind).keys() == part(ranks[1], kind).keys()
        for name, tensor in part(ranks[0], kind).items():
            assert torch.equal(tensor, part(ranks[1], kind)[name]), name
    masks = part(whole, "mask").values()
    assert sum(int((~mask).sum()) for mask in masks) == round(0.8 * sum(mask.numel() for mask in masks))
    for name, mask in part(ranks[0], "mask").items():
        assert (ranks[0]["tensors"][name.replace("mask.", "now.", 1)].view_as(mask)[~mask] == 0).all()

    for other in (ranks[0],) if case == "awp" else (accumulated, ranks[0]):
        assert largest_difference(whole, other, "start") == 0
        for kind in ("mask", "now", "average"):
            assert largest_difference(whole, other, kind) < 1e-5, kind
        assert_same_evaluation(whole, other)
        for ours, theirs in zip(whole["log"], other["log"], strict=True):
            terms = [name for name in ours if name == "loss" or name.endswith("_loss")]
            assert len(terms) >= 4
            for name in terms:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name
    moved = [
        float((tensor - whole["tensors"][name.replace("now.", "start.", 1)]).abs().max())
        for name, tensor in part(whole, "now").items()
    ]
    assert sum(change > 1e-2 for change in moved) > 20


def test_a_last_batch_of_6_is_4_and_2(tmp_path):
    """The mean of the means of 4 and 2 images is not the mean of all 6."""
    whole, accumulated = (run("pgd-at", tmp_path, size, 8 // size, images=70) for size in (8, 4))
    assert whole["tensors"].keys() == accumulated["tensors"].keys()
    assert largest_difference(whole, accumulated, "now") < 1e-5


@pytest.mark.parametrize("use", ["train", "eval"])
def test_the_comparison_notices_another_noise(use, tmp_path, monkeypatch):
    whole, noise = run("pgd-at", tmp_path, 8), Adversary._noise
    monkeypatch.setattr(
        Adversary, "_noise", lambda self, x, *key: noise(self, x, *key, *(["another"] if use in key else []))
    )
    other = run("pgd-at", tmp_path, 8)
    if use == "train":
        assert largest_difference(whole, other, "now") > 1e-4
    else:
        assert largest_difference(whole, other, "now") == 0
        with pytest.raises(AssertionError):
            assert_same_evaluation(whole, other)


def test_another_number_of_processes_goes_on_with_a_run(two_processes, tmp_path):
    whole = run("gates", tmp_path / "whole", 8)
    folder = two_processes["folder"]
    resumed = run("gates", tmp_path / "resumed", 4, 2, resume=folder / "gates" / "out" / CUT)
    by_two = two_processes["resumed"]
    assert [found["world"] for found in by_two] == [2, 2] and resumed["processes"] == 1
    for found in (resumed, by_two[0]):
        assert largest_difference(whole, found, "mask") == 0
        for kind in ("now", "average"):
            assert largest_difference(whole, found, kind) < 1e-5, kind
        assert_same_evaluation(whole, found)
    for kind in ("now", "mask"):
        assert largest_difference(*by_two, kind) == 0
    assert "was written by 2 processes and goes on with 1. Masks, gates, schedule" in resumed["said"]
    assert "was written by 1 process and goes on with 2. Masks" in by_two[0]["said"]
    assert whole["said"] == by_two[1]["said"] == ""
    with pytest.raises(ValueError, match="with 8 steps an epoch, now there would be 4.*per_device_train_batch_size"):
        run("gates", tmp_path / "larger", 16, resume=folder / "gates" / "out" / CUT)
