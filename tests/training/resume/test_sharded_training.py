"""Two processes share a model by FSDP2, the method fully on: the same training, masks and files as of one process."""

import json
from pathlib import Path

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from tests.hub import LocalHub
from tests.processes import run_python
from tests.sharded_runs import CASES, CUT, REPOSITORY, run
from tscnc_hf.artifact.models.loading import load_sparse
from tscnc_hf.training.resume.fsdp import check_optimizer_layout, check_sharding
from tscnc_hf.training.trainer import TSCNCTrainer


pytestmark = pytest.mark.launched
ROOT = Path(__file__).parents[3]
ONCE_SHARED = ("weights", "gates")


@pytest.fixture(scope="module")
def hub():
    hub = LocalHub()
    yield hub
    hub.shutdown()
    hub.server_close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory, hub) -> dict:
    """Case -> what each of the two processes found, that were started with the recipe's own file."""
    folder = tmp_path_factory.mktemp("shared")
    command = ["-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file"]
    command += [ROOT / "recipes" / "accelerate" / "fsdp2.yaml", ROOT / "tests" / "sharded_runs.py", folder]
    environment = {"ACCELERATE_USE_CPU": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    environment |= hub.environment(folder / "home")
    run_python(command, environment=environment, cwd=folder)
    found = {}
    for case in (*CASES, "resumed"):
        ranks = [folder / f"{case}.{rank}" for rank in range(2)]
        found[case] = [json.loads(Path(f"{path}.json").read_text()) | {"tensors": load_file(path)} for path in ranks]
    return found | {"folder": folder}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    return {case: run(case, tmp_path_factory.mktemp("alone") / case) for case in ONCE_SHARED}


def part(found: dict, kind: str) -> dict[str, torch.Tensor]:
    tensors = {name: tensor for name, tensor in found["tensors"].items() if name.startswith(f"{kind}.")}
    assert tensors, kind
    return tensors


def largest_difference(one: dict, other: dict, kind: str) -> float:
    first, second = part(one, kind), part(other, kind)
    assert first.keys() == second.keys()
    return max(float((first[name].float() - second[name].float()).abs().max()) for name in first)


@pytest.mark.parametrize("case", [*CASES, "resumed"])
def test_two_processes_really_share_the_weights(case, shared):
    for found in shared[case]:
        assert (found["processes"], found["backend"]) == (2, "gloo")
        assert (found["type"], found["class"]) == ("DistributedType.FSDP", "FSDPViTForImageClassification")
        # after each step every parameter was a DTensor and every pruned weight zero
        assert found["steps"] == found["sharded_steps"] == (3 if case == "resumed" else 8)
    first, second = (found["tensors"] for found in shared[case])
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("case", ONCE_SHARED)
def test_training_is_that_of_one_process(case, shared, alone):
    one, two = alone[case], shared[case][0]
    assert (one["processes"], one["sharded_steps"]) == (1, 0)
    for name, expected in part(one, "gradient").items():
        torch.testing.assert_close(two["tensors"][name], expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    assert largest_difference(one, two, "mask") == 0
    masks = part(one, "mask").values()
    assert sum(int((~mask).sum()) for mask in masks) == round(0.8 * sum(mask.numel() for mask in masks))
    for kind in ("now", "average"):
        assert largest_difference(one, two, kind) < 1e-5, kind
    for ours, theirs in zip(one["log"], two["log"], strict=True):
        terms = [name for name in ours if name == "loss" or name.endswith("_loss")]
        assert len(terms) == 5
        for name in terms:
            assert theirs[name] == pytest.approx(ours[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("case", ONCE_SHARED)
def test_evaluation_and_choice_of_the_best_are_those_of_one_process(case, shared, alone):
    one, two = alone[case], shared[case][0]
    assert len(one["evaluations"]) == len(two["evaluations"]) == 5
    figures = ("accuracy", "robust_accuracy", "median_effective_condition_number", "rank_deficient")
    for ours, theirs in zip(one["evaluations"], two["evaluations"], strict=True):
        for name in figures:
            assert theirs[f"eval_{name}"] == pytest.approx(ours[f"eval_{name}"], rel=1e-3), name
    assert largest_difference(one, two, "logits") < 1e-4
    assert one["best"] == two["best"] and (one["best"] is None) == (case == "weights")
    ours, theirs = one["results"], two["results"]
    assert theirs["robustness"]["attacks"] == ours["robustness"]["attacks"]
    assert theirs["sparsity"]["zeros"] == ours["sparsity"]["zeros"]


@pytest.mark.parametrize("case", ONCE_SHARED)
def test_what_was_saved_is_a_plain_model(case, shared):
    folder = shared["folder"] / case / "out"
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["ViTForImageClassification"]
    assert not list(folder.glob("pytorch_model*")) and "gate" not in " ".join(load_file(folder / "model.safetensors"))
    dense, packed = AutoModelForImageClassification.from_pretrained(folder), load_sparse(folder)
    expected = part(shared[case][0], "average")
    layers = {name for name in expected if name.endswith(".gate.log_alpha")}
    assert bool(layers) == (case == "gates")
    plain = dense.state_dict()
    for name, tensor in packed.state_dict().items():
        assert torch.equal(tensor, plain[name]), name
        if f"average.{name.removesuffix('.weight')}.gate.log_alpha" not in layers:
            assert torch.equal(tensor, expected[f"average.{name}"]), name
    for name, mask in part(shared[case][0], "mask").items():
        assert (plain[name.removeprefix("mask.")][~mask] == 0).all()
    card, results = (folder / "README.md").read_text(), json.loads((folder / "results.json").read_text())
    assert "80.0 %" in card and results == shared[case][0]["results"]


def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(shared):
    whole, resumed = shared["adamw"][0], shared["resumed"][0]
    for kind in ("now", "average", "mask"):
        assert largest_difference(whole, resumed, kind) == 0, kind
    checkpoint = shared["folder"] / "adamw" / "out" / CUT
    names = {path.name for path in checkpoint.iterdir()}
    assert {"model.safetensors", "tscnc_state.safetensors", "optimizer.bin", "scheduler.pt"} <= names
    assert not any(name.startswith("pytorch_model") for name in names)  # the weights are there once
    state = load_file(checkpoint / "tscnc_state.safetensors")
    assert {name.split(".")[0] for name in state} >= {"mask", "score", "latent", "gate", "gated", "average", "scale"}
    AutoModelForImageClassification.from_pretrained(checkpoint)


def test_rounding_of_the_computation_does_not_reach_the_constraints(shared):
    """A forward in bf16, of the evaluation before, left weights in bf16 in the place of some shards."""
    exact, rounded = part(shared["gates"][0], "gradient"), part(shared["adamw"][0], "gradient")
    assert exact.keys() == rounded.keys()
    for name, expected in exact.items():
        torch.testing.assert_close(rounded[name], expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def test_pushes_while_training_gather_on_both(hub, shared):
    messages = [message for _, message, _ in hub.commits(REPOSITORY)]
    assert "Training in progress, step 5" in messages
    files = hub.files(REPOSITORY)
    assert {"config.json", "model.safetensors", "model.sparse.safetensors", "README.md"} <= files
    assert {"last-checkpoint/model.safetensors", "last-checkpoint/optimizer.bin"} <= files


def test_a_checkpoint_with_fsdp2_does_not_go_on_without(shared, tmp_path):
    checkpoint = shared["folder"] / "adamw" / "out" / CUT
    with pytest.raises(ValueError, match="of a run with FSDP2 and this one is without.*Resume with FSDP2"):
        run("adamw", tmp_path, resume=checkpoint)
    (tmp_path / "optimizer.pt").touch()
    with pytest.raises(ValueError, match="of a run without FSDP2 and this one is with it.*Resume without FSDP2"):
        check_optimizer_layout(tmp_path, sharded=True)


PLUGIN = {"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT"}
REFUSED = {
    "version 1": ({"fsdp_version": 1}, {}, "FSDP version 1 is not supported.*fsdp_version: 2.*fsdp2.yaml"),
    "state dict": ({"state_dict_type": "SHARDED_STATE_DICT"}, {}, "must be FULL_STATE_DICT"),
    "loading": ({"cpu_ram_efficient_loading": True}, {}, "fsdp_cpu_ram_efficient_loading.*Set it to false"),
    "offload": ({"cpu_offload": True}, {}, "fsdp_offload_params"),
    "checkpointing": ({"activation_checkpointing": True}, {}, "Use activation_checkpointing=True, of the training"),
    "compile": ({}, {"torch_compile": True}, "torch_compile"),
    "awp": ({}, {"awp_gamma": 0.01}, "awp_gamma.*use DDP"),
    "batch size": ({}, {"auto_find_batch_size": True}, "auto_find_batch_size"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_not_be_exact_is_refused(what, build, make_trainer, monkeypatch):
    plugin, options, message = REFUSED[what]
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # the plugin writes it
    trainer = make_trainer(build("vit"), **options)
    trainer.is_fsdp_enabled = True  # accelerate allows it with several accelerators only
    fsdp = FullyShardedDataParallelPlugin(**(PLUGIN | plugin))
    monkeypatch.setattr(trainer.accelerator.state, "fsdp_plugin", fsdp, raising=False)
    with pytest.raises(ValueError, match=message):
        check_sharding(trainer)


def test_what_the_recipe_says_is_not_refused(build, make_trainer, monkeypatch):
    trainer = make_trainer(build("vit"))
    trainer.is_fsdp_enabled = True
    monkeypatch.setattr(
        trainer.accelerator.state, "fsdp_plugin", FullyShardedDataParallelPlugin(**PLUGIN), raising=False
    )
    check_sharding(trainer)
    with pytest.raises(RuntimeError, match="evaluate after train.*eval_on_start"):
        trainer.evaluate()
    trainer.model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="a Sequential: what is saved is rebuilt from a config.*Timm"):
        check_sharding(trainer)


def test_the_trainer_asks(build, make_trainer, monkeypatch):
    monkeypatch.setattr(TSCNCTrainer, "create_accelerator_and_postprocess", _with_version_1)
    with pytest.raises(ValueError, match="FSDP version 1 is not supported"):
        make_trainer(build("vit"))


CREATE = TSCNCTrainer.create_accelerator_and_postprocess


def _with_version_1(self):
    CREATE(self)
    self.is_fsdp_enabled = True
    self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=1)
