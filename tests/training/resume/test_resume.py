"""A run that was cut off and goes on ends exactly where an uncut one does."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer

from tests.trainers import never_collapsed
from tscnc_hf.artifact.files.identity import RunIdentity
from tscnc_hf.artifact.models.building import timm_model
from tscnc_hf.data.loading import load_image_data
from tscnc_hf.training.resume.checkpoints import FILE_LIST, ResumeError
from tscnc_hf.training.resume.compatible import IDENTITY_FILE, check_identity, decisive_options
from tscnc_hf.training.trainer import TSCNCTrainer


# Everything with a state or a draw of its own: dropout, crops, shuffling, attack noise, moments, masks, scheduler.
OPTIONS = {
    "num_train_epochs": 4,
    "per_device_train_batch_size": 16,
    "objective": "pgd-at",
    "adversary": "pgd",
    "optim": "adamw_torch",
    "weight_decay": 0.1,
    "lr_scheduler_type": "cosine",
    "learning_rate": 5e-3,
    "pruning_start": 0.1,
    "pruning_end": 0.8,
    "pruning_interval": 3,
    "logging_steps": 1,
}


def run(make_trainer, pair, folder: Path, resume: Path | None = None, **options) -> TSCNCTrainer:
    trainer = make_trainer(pair, output_dir=str(folder), **(OPTIONS | options))
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def curves(trainer: TSCNCTrainer, after: int) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry and entry["step"] > after]


def differing(one: TSCNCTrainer, other: TSCNCTrainer) -> list[str]:
    """Names of what differs in any bit: weights and statistics, moments, masks, scales."""
    names = []
    for part in (
        lambda trainer: trainer.model.state_dict(),
        lambda trainer: trainer.compressor.pruner.masks,
        lambda trainer: trainer.compressor.scales,
        lambda trainer: {
            f"{index}.{name}": torch.as_tensor(value)
            for index, state in trainer.optimizer.state_dict()["state"].items()
            for name, value in state.items()
        },
    ):
        first, second = part(one), part(other)
        assert first.keys() == second.keys() and len(first) > 0
        names += [name for name in first if not torch.equal(first[name], second[name])]
    return names


@pytest.mark.parametrize("kind", ["vit", "resnet"])
@pytest.mark.parametrize(
    ("step", "saving"),
    [(8, {"save_strategy": "epoch"}), (6, {"save_strategy": "steps", "save_steps": 6})],
    ids=["after an epoch", "within an epoch"],
)
def test_a_resumed_run_equals_an_uncut_one(kind, step, saving, build, make_trainer, tmp_path):
    whole = run(make_trainer, build(kind, dropout=0.2), tmp_path / "whole", **saving)
    assert whole.state.max_steps == 16
    checkpoint = shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", tmp_path / "cut" / f"checkpoint-{step}")
    stored = load_file(checkpoint / "tscnc_state.safetensors")
    pruned = sum(int((~mask).sum()) for name, mask in stored.items() if name.startswith("mask."))
    assert 0 < pruned < whole.compressor.pruner.pruned_count  # cut off while the schedule runs

    shutil.rmtree(tmp_path / "whole")
    torch.rand(100)
    resumed = run(make_trainer, build(kind, seed=7, dropout=0.2), tmp_path / "cut", resume=checkpoint)
    assert resumed.state.global_step == 16
    assert differing(whole, resumed) == []
    assert curves(resumed, step) == curves(whole, step)
    assert len(curves(resumed, step)) == 16 - step


def test_another_network_or_preprocessing_with_weights_of_the_same_shapes_is_refused(build, make_trainer, tmp_path):
    run(make_trainer, build("vit"), tmp_path / "whole", save_strategy="steps", save_steps=8)
    checkpoint = tmp_path / "whole" / "checkpoint-8"

    def refused(message, model, processor):
        with pytest.raises(ValueError, match=message):
            run(make_trainer, (model, processor), tmp_path / "cut", checkpoint, save_strategy="no")

    for name, value, was in (("num_attention_heads", 4, "2"), ("hidden_act", "relu", "'gelu'")):
        torch.manual_seed(0)
        model, processor = build("vit")
        config = copy.deepcopy(model.config)
        setattr(config, name, value)
        refused(rf"model.{name}={was} \(now {value!r}\)", type(model)(config), processor)
    model, processor = build("vit")
    model.config.id2label = {**model.config.id2label, 0: "nought"}
    refused(r"model.id2label.0='0' \(now 'nought'\)", model, processor)
    model, processor = build("vit")
    processor.image_mean = [0.1] * 3
    refused(r"image_mean=.*\(now \[0.1, 0.1, 0.1\]\)", model, processor)
    # one that says nothing of it, of a version before, goes on
    path = checkpoint / "run_identity.json"
    identity = json.loads(path.read_text())
    for name in ("model", "image_mean", "image_std"):
        del identity["options"][name]
    path.write_text(json.dumps(identity).ljust(path.stat().st_size))  # whole files are known by their size
    assert run(make_trainer, build("vit"), tmp_path / "cut", checkpoint).state.global_step == 16


def test_a_cut_with_accumulation_and_one_with_the_masks_frozen(build, make_trainer, tmp_path):
    options = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "save_strategy": "steps"}
    options |= {"save_steps": 7, "pruning_end": 0.4}
    whole = run(make_trainer, build("vit", dropout=0.2), tmp_path / "whole", **options)
    for step in (7, 14):
        checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
        resumed = run(make_trainer, build("vit", seed=7, dropout=0.2), tmp_path / f"cut-{step}", checkpoint, **options)
        assert differing(whole, resumed) == []


def test_a_cut_during_epsilon_warmup_with_evaluation_and_a_best_model(build, make_trainer, tmp_path):
    options = {"epsilon_warmup": 0.8, "eval_strategy": "epoch", "save_strategy": "epoch", "pruning_end": 0.4}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "robust_accuracy"}
    whole = run(make_trainer, build("vit", dropout=0.2), tmp_path / "whole", **options)
    checkpoint = tmp_path / "whole" / "checkpoint-8"
    resumed = run(make_trainer, build("vit", seed=7, dropout=0.2), tmp_path / "cut", checkpoint, **options)
    assert differing(whole, resumed) == []
    assert resumed.state.best_metric == whole.state.best_metric
    assert resumed.state.best_global_step == whole.state.best_global_step


def test_a_moved_folder_takes_its_best_model_along(build, make_trainer, tmp_path):
    """A finished run; where it was there is another one by now."""
    options = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_chosen", "target_sparsity": 0.0}
    made = []

    def chosen(prediction):
        step = made[-1].state.global_step if made else 0
        return never_collapsed(prediction) | {"chosen": -abs(step - 2.0)}

    def trainer(folder):
        made.append(make_trainer(build("vit"), output_dir=str(folder), compute_metrics=chosen, **options))
        return made[-1]

    first = trainer(tmp_path / "old")
    first.train()
    assert first.state.best_global_step == 2
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    for gone in (False, True):
        if gone:
            shutil.rmtree(tmp_path / "old")
        again = trainer(tmp_path / "new")
        again.train(resume_from_checkpoint=True)
        assert Path(again.state.best_model_checkpoint) == tmp_path / "new" / "checkpoint-2"
        assert all(torch.equal(w, again.model.state_dict()[name]) for name, w in first.model.state_dict().items())


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_cut_with_gates_and_a_best_model(kind, build, make_trainer, tmp_path):
    options = {"tsc_on": "gates", "tsc_weight": 1e-2, "gate_learning_rate": 0.3, "cnc_interval": 3}
    options |= {"eval_strategy": "epoch", "save_strategy": "epoch", "pruning_end": 0.4}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "robust_accuracy"}
    whole = run(make_trainer, build(kind, dropout=0.2), tmp_path / "whole", **options)
    assert any(name.endswith("gate.log_alpha") for name in whole.model.state_dict())
    checkpoint = tmp_path / "whole" / "checkpoint-8"
    resumed = run(make_trainer, build(kind, seed=7, dropout=0.2), tmp_path / "cut", checkpoint, **options)
    assert differing(whole, resumed) == []
    assert curves(resumed, 8) == curves(whole, 8)
    plain = make_trainer(build(kind), output_dir=str(tmp_path / "plain"), **OPTIONS)
    with pytest.raises(ValueError, match=r"tsc_weight=0.01 \(now 1e-05\), tsc_on='gates' \(now 'weights'\)"):
        plain.train(resume_from_checkpoint=str(checkpoint))
    with pytest.raises(ValueError, match="resume with the tsc_on and gate_layers"):
        plain.compressor.load_state(checkpoint)


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """The folder that `finished` fills; not to be changed."""
    return tmp_path_factory.mktemp("short")


SHORT = {"num_train_epochs": 2, "save_strategy": "epoch"}


@pytest.fixture
def finished(short_run, build, make_trainer) -> Path:
    """The last checkpoint of a run in which nothing is left to train."""
    if not (short_run / "checkpoint-8").exists():
        run(make_trainer, build("vit"), short_run, **SHORT)
    return short_run / "checkpoint-8"


@pytest.mark.parametrize("step", [4, 8])
def test_other_options_than_those_of_the_checkpoint_are_named(step, finished, build, make_trainer, tmp_path):
    other = {"epsilon": 0.2, "target_sparsity": 0.5, "seed": 3, "adam_beta1": 0.8}
    trainer = make_trainer(build("vit", seed=1), output_dir=str(tmp_path / "other"), **OPTIONS | SHORT | other)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    checkpoint = finished.with_name(f"checkpoint-{step}")
    with pytest.raises(ValueError) as refused:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    message = str(refused.value)
    for text in ("epsilon=0.1 (now 0.2)", "target_sparsity=0.9 (now 0.5)", "seed=42 (now 3)", "beta1=0.9 (now 0.8)"):
        assert text in message
    assert message.startswith(f"{checkpoint} was trained with") and message.count("(now") == 4 and "\n" not in message
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())


def test_another_batch_is_refused_where_the_steps_are_as_many(finished, build, make_trainer, tmp_path):
    """Four of 16 images each, or of 20 and 4 at the end."""
    with pytest.raises(ResumeError, match="trained with 16 images a step, now there would be 20: .*per_device_train"):
        run(make_trainer, build("vit"), tmp_path / "on", finished, **(SHORT | {"per_device_train_batch_size": 20}))
    more = SHORT | {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "num_train_epochs": 3}
    run(make_trainer, build("vit"), tmp_path / "same", finished, **more)


def test_what_a_run_is_made_of_is_one_of_the_files_of_its_checkpoints(finished, make_config, tmp_path):
    listed = json.loads((finished / FILE_LIST).read_text())["files"]
    assert listed[IDENTITY_FILE] == (finished / IDENTITY_FILE).stat().st_size
    kept = json.loads((finished / IDENTITY_FILE).read_text())
    options = kept["options"]
    assert (options["optim"], options["pruning_interval"], options["seed"]) == ("adamw_torch", 3, 42)
    assert not {"output_dir", "hub_token", "logging_steps", "max_steps"} & options.keys()
    assert kept["data"]["train"]["images"] == 64 and kept["data"]["validation"]["images"] == 32
    assert kept["code"]["torch"] == torch.__version__.split("+")[0] and kept["weights"] == {}

    def now(**changed) -> RunIdentity:
        asked, usual = decisive_options(make_config(**OPTIONS | SHORT | changed))
        inputs = {name: options[name] for name in ("model", "image_mean", "image_std")}
        return RunIdentity(asked | inputs, kept["data"], kept["code"], usual=usual)

    folder = shutil.copytree(finished, tmp_path / "checkpoint-8")
    assert check_identity(folder, now()) is None
    cut = kept | {"options": {name: value for name, value in options.items() if name != "tsc_weight"}}
    (folder / IDENTITY_FILE).write_text(json.dumps(cut))  # as if it were new: it was as it is by default, then
    assert check_identity(folder, now(tsc_weight=0.0)) is None
    with pytest.raises(ValueError, match=r"trained with tsc_weight=0.0 \(now 1e-05\): go on"):
        check_identity(folder, now())
    (folder / IDENTITY_FILE).write_text("[1")
    with pytest.raises(ValueError, match="run_identity.json is missing or damaged"):
        check_identity(folder, now())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"augmentation": "none"}, "train.augmentation='random crops of the padded image' (now None)"),
        ({"seed": 1}, "train.augmentation_seed=0 (now 1)"),
        ({"train_limit": 63}, "train.images=64 (now 63)"),
        ({"validation_fraction": 0.2}, "validation_fraction=0.1 (now 0.2), validation.images=144 (now 288)"),
        ({"image_size": 16}, "train.image_size=[3, 8, 8] (now [3, 16, 16])"),
        ({"test_limit": 5}, "test_limit=None (now 5), test.images=359 (now 5)"),
    ],
)
def test_other_data_than_that_of_the_checkpoint_is_refused_and_named(
    change, named, build, make_trainer, tmp_path, digits_run
):
    """Through the recipes' `ImageData`, and through the data sets alone."""
    data = load_image_data("digits", **({"augmentation": "crop", "train_limit": 64} | change))
    kind = "resnet" if "image_size" in change else "vit"  # which would refuse the images
    trainer = make_trainer(
        build(kind), train=data.train, evaluate=data.validation, output_dir=str(digits_run), **SHORT
    )
    trainer.data_identity = data.identity
    with pytest.raises(ValueError) as refused:
        trainer.train(resume_from_checkpoint=True)
    assert "checkpoint-8 was trained with" in str(refused.value) and named in str(refused.value)
    assert trainer.state.global_step == 0


def test_another_size_of_inputs_than_that_of_the_checkpoint_is_refused_and_named(make_config, tmp_path):
    data = load_image_data("digits", augmentation="none", train_limit=32)
    small = {"model_args": {"channels": [8] * 4, "layers": [1] * 4}}

    def trainer(**options):
        model, processor = timm_model("resnet18", data.class_names, data.image_size, **small, **options)
        how = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "target_sparsity": 0}
        args = make_config(output_dir=str(tmp_path), **how)
        return TSCNCTrainer(model, args, train_dataset=data.train, processing_class=processor)

    trainer(input_size=16, interpolation="nearest").train()
    with pytest.raises(ResumeError, match="trained with .*resized.height=16 .now None."):
        trainer().train(resume_from_checkpoint=True)
    with pytest.raises(ResumeError, match="resized.interpolation='nearest' .now 'bilinear'."):
        trainer(input_size=16).train(resume_from_checkpoint=True)


@pytest.fixture(scope="module")
def digits_folder(tmp_path_factory):
    """The folder that `digits_run` fills; not to be changed."""
    return tmp_path_factory.mktemp("digits-run") / "run"


@pytest.fixture
def digits_run(digits_folder, build, make_trainer) -> Path:
    """The folder of a finished run of a recipe's data."""
    if not digits_folder.exists():
        data = load_image_data("digits", augmentation="crop", train_limit=64)
        options = {"output_dir": str(digits_folder), "per_device_train_batch_size": 16}
        trainer = make_trainer(build("vit"), train=data.train, evaluate=data.validation, **SHORT | options)
        trainer.data_identity = data.identity
        trainer.train()
    return digits_folder


def test_other_code_is_a_warning(finished, build, make_trainer, tmp_path, caplog):
    checkpoint = shutil.copytree(finished.with_name("checkpoint-4"), tmp_path / "old" / "checkpoint-4")
    kept = json.loads((checkpoint / IDENTITY_FILE).read_text())
    kept["code"]["torch"] = "1.0.0"
    (checkpoint / IDENTITY_FILE).write_text(json.dumps(kept))
    listed = json.loads((checkpoint / FILE_LIST).read_text())
    listed["files"][IDENTITY_FILE] = (checkpoint / IDENTITY_FILE).stat().st_size
    (checkpoint / FILE_LIST).write_text(json.dumps(listed))
    trainer = run(make_trainer, build("vit", seed=1), tmp_path / "on", checkpoint, **SHORT)
    assert trainer.state.global_step == 8
    assert f"{checkpoint} was written with torch='1.0.0' (now '" in caplog.text


def test_training_may_get_longer_but_not_shorter_than_it_was(finished, build, make_trainer, tmp_path, caplog):
    trainer = run(make_trainer, build("vit"), tmp_path / "longer", finished, **SHORT | {"num_train_epochs": 3})
    assert (
        trainer.state.global_step == 12
        and trainer.compressor.pruner.pruned_count == trainer.compressor.pruner.target_count(0.9)
    )
    assert "The run was to have 8 steps and now has 12" in caplog.text
    with pytest.raises(ValueError, match="the checkpoint has 8 steps and training would end after 4"):
        run(make_trainer, build("vit"), tmp_path / "shorter", finished, **SHORT | {"num_train_epochs": 1})


# ---- a folder that holds another run ----


def test_a_new_run_among_the_checkpoints_of_another_is_refused(finished, build, make_trainer, tmp_path):
    folder = shutil.copytree(finished.parent, tmp_path / "run")
    trainer = make_trainer(build("vit"), output_dir=str(folder), **OPTIONS | SHORT)
    elsewhere = str(finished.with_name("checkpoint-4"))
    for resume in (None, False, elsewhere):
        with pytest.raises(ValueError, match="2 checkpoints, up to checkpoint-8, of an earlier run") as refused:
            trainer.train(resume_from_checkpoint=resume)
        assert trainer.state.global_step == 0 and "\n" not in str(refused.value)
        for way in ("resume_from_checkpoint=True", "--resume true", "another output_dir", f"{folder}/checkpoint-*"):
            assert way in str(refused.value)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert trainer.state.global_step == 8


def test_the_same_trainer_may_train_twice_and_another_may_not(build, make_trainer, tmp_path):
    trainer = run(make_trainer, build("vit"), tmp_path / "run", **SHORT)
    trainer.train()
    assert trainer.state.global_step == 8
    with pytest.raises(ValueError, match="of an earlier run"):
        run(make_trainer, build("vit"), tmp_path / "run", **SHORT)
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    other = make_trainer(build("vit"), output_dir=str(tmp_path / "run"), **OPTIONS | SHORT | {"seed": 1})
    with pytest.raises(ValueError, match="seed=42"):
        other.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="holds checkpoint-8 of an earlier run"):  # still not its own
        other.train()


def test_another_start_gives_another_end(build, make_trainer, tmp_path):
    """Without resuming the comparison of this file does find differences."""
    first = run(make_trainer, build("vit", dropout=0.2), tmp_path / "a")
    second = run(make_trainer, build("vit", seed=7, dropout=0.2), tmp_path / "b")
    assert len(differing(first, second)) > 20


def broken(name: str, change, build, make_trainer, tmp_path) -> tuple[TSCNCTrainer, Path]:
    run(make_trainer, build("vit"), tmp_path / "run", num_train_epochs=2, save_strategy="epoch")
    checkpoint = tmp_path / "run" / "checkpoint-4"
    change(checkpoint / name)
    pair = build("vit", seed=1)
    trainer = make_trainer(pair, output_dir=str(tmp_path / "again"), **(OPTIONS | {"num_train_epochs": 2}))
    return trainer, checkpoint


def drop_one_key(path: Path) -> None:
    """As if it had been saved so: its list of files says that it is whole."""
    tensors = load_file(path)
    del tensors[sorted(tensors)[0]]
    save_file(tensors, path, metadata={"format": "pt"})
    listed = json.loads((path.parent / FILE_LIST).read_text())
    listed["files"][path.name] = path.stat().st_size
    (path.parent / FILE_LIST).write_text(json.dumps(listed))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("tscnc_state.safetensors", Path.unlink, "not whole: tscnc_state.safetensors is missing"),
        ("tscnc_state.safetensors", truncate, "not whole: tscnc_state.safetensors is cut off"),
        ("run_identity.json", Path.unlink, "not whole: run_identity.json is missing"),
        ("checkpoint_files.json", Path.unlink, "not whole: checkpoint_files.json is missing"),
        ("model.safetensors", drop_one_key, "1 missing: classifier.bias"),
        ("model.safetensors", truncate, "not whole: model.safetensors is cut off"),
    ],
)
def test_an_incomplete_checkpoint_is_refused(name, change, message, build, make_trainer, tmp_path):
    trainer, checkpoint = broken(name, change, build, make_trainer, tmp_path)
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 0 and not trainer.state.log_history


def test_the_checkpoint_of_another_architecture_is_refused(build, make_trainer, tmp_path):
    run(make_trainer, build("resnet"), tmp_path / "run", num_train_epochs=1, save_strategy="epoch", pruning_interval=1)
    trainer = make_trainer(build("vit"), **OPTIONS | {"pruning_interval": 1})
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(ValueError, match="model.type='TimmWrapper.* .now 'ViTForImage.* more: go on"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())


def test_the_comparison_notices_the_loader_of_transformers(build, make_trainer, tmp_path, monkeypatch):
    """It reads a ViT's file by the names in memory, finds few of them, and goes on with what it has."""
    options = {"num_train_epochs": 2, "save_strategy": "epoch"}
    whole = run(make_trainer, build("vit"), tmp_path / "whole", **options)

    def load(trainer, folder, model=None):
        Trainer._load_from_checkpoint(trainer, folder, model)
        trainer.compressor.load_state(folder)

    monkeypatch.setattr(TSCNCTrainer, "_load_from_checkpoint", load)
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    resumed = run(make_trainer, build("vit", seed=7), tmp_path / "cut", checkpoint, **options)
    assert "vit.layers.0.attention.q_proj.weight" in differing(whole, resumed)


def test_a_checkpoint_says_how_it_was_made_without_a_pickle_of_ours(build, make_trainer, tmp_path):
    trainer = run(make_trainer, build("vit"), tmp_path / "run", num_train_epochs=2, save_strategy="epoch")
    checkpoint = tmp_path / "run" / "checkpoint-8"
    stored = load_file(checkpoint / "tscnc_state.safetensors")
    masks = {name.removeprefix("mask."): mask for name, mask in stored.items() if name.startswith("mask.")}
    assert masks.keys() == trainer.compressor.pruner.masks.keys()
    for name, mask in masks.items():
        assert torch.equal(mask, trainer.model.get_parameter(name) != 0)
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == 8
    assert not (checkpoint / "model.sparse.safetensors").exists()


def test_a_checkpoint_that_holds_a_model_only_is_not_resumed(build, make_trainer, tmp_path):
    options = {"objective": "natural", "target_sparsity": 0.0, "save_strategy": "steps", "save_steps": 1}
    make_trainer(build("vit"), evaluate=None, max_steps=1, save_only_model=True, **options).train()
    again = make_trainer(build("vit"), evaluate=None, max_steps=2, **options)
    with pytest.raises(ValueError, match="checkpoint-1 holds a model only.*optimizer.*save_only_model=False"):
        again.train(resume_from_checkpoint=True)
