"""What saving does beside the weights: no results are lost, none stand beside other weights, no checkpoint by name."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageClassification

from tscnc_hf import load_sparse
from tscnc_hf.evaluation.run import evaluate
from tscnc_hf.training.resume.storage import StorageError


def test_a_folder_that_is_called_like_a_checkpoint_holds_a_model(build, make_trainer, tmp_path):
    trainer = make_trainer(build("vit"))
    for name in ("checkpoint-final", "checkpoint-7"):
        trainer.save_model(str(tmp_path / name))
        names = {path.name for path in (tmp_path / name).iterdir()}
        assert {"README.md", "model.sparse.safetensors", "tscnc_config.json"} <= names
        assert not {"training_args.bin", "tscnc_state.safetensors"} & names
        load_sparse(tmp_path / name)


def test_training_checkpoints_are_ones_still(build, make_trainer, tmp_path):
    trainer = make_trainer(build("vit"), max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    names = {path.name for path in (tmp_path / "out" / "checkpoint-2").iterdir()}
    assert "tscnc_state.safetensors" in names and "README.md" not in names


def test_saving_keeps_the_results_of_other_folders(build, make_trainer, digits, tmp_path):
    """Of the weights that are saved they stay; of others they get another name; damaged ones too."""
    trainer, folder = make_trainer(build("vit"), max_steps=2), tmp_path / "other"
    trainer.train()
    trainer.save_model(str(folder))
    options = {
        "epsilon": 0.1,
        "attacks": "clean",
        "n": 4,
        "progress": False,
        "processing_class": trainer.processing_class,
    }
    evaluate(trainer.model, digits.test, folder=folder, **options)
    before = (folder / "results.json").read_bytes()
    trainer.save_model(str(folder))
    assert (folder / "results.json").read_bytes() == before
    with torch.no_grad():
        next(trainer.model.parameters()).add_(1)
    trainer.save_model(str(folder))
    (kept,) = folder.glob("_results-of-*.json")
    assert kept.read_bytes() == before and not (folder / "results.json").exists()
    (folder / "results.json").write_text('{"mod')
    trainer.save_model(str(folder))
    assert (folder / "_results-of-unknown-weights.json").read_text() == '{"mod'


def test_a_test_that_fails_has_the_model_saved_before(build, make_trainer, digits, tmp_path):
    trainer = make_trainer(build("vit"), max_steps=2)
    trainer.train()
    with pytest.raises(ValueError, match="attack 'pgd-none' does not exist"):
        trainer.test(digits.test, attacks=["clean", "pgd-none"])
    stock = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert all(torch.equal(stock.state_dict()[name], value) for name, value in trainer.model.state_dict().items())
    stamp = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    results = trainer.test(digits.test.subset(range(8)), attacks=["clean"])
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == stamp  # nothing has changed since
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results


def test_results_of_weights_that_were_changed_since_are_not_published(build, make_trainer, digits, tmp_path):
    trainer, folder = make_trainer(build("vit")), tmp_path / "out"
    before = trainer.test(digits.test.subset(range(8)), attacks=["clean", "pgd-1"], full=False)
    trainer.save_model()
    assert json.loads((folder / "results.json").read_text()) == before  # of these weights still
    assert "PGD-1" in (folder / "README.md").read_text()
    with torch.no_grad():
        next(trainer.model.parameters()).add_(1)
    trainer.create_model_card()
    assert "PGD-1" not in (folder / "README.md").read_text()
    trainer.save_model()
    (kept,) = folder.glob("_results-of-*.json")
    assert json.loads(kept.read_text()) == before and not (folder / "results.json").exists()
    assert "PGD-1" not in (folder / "README.md").read_text()


def test_what_was_tested_is_what_the_folder_holds(build, make_trainer, digits, tmp_path):
    folder, data, options = tmp_path / "out", digits.test.subset(range(8)), {"attacks": ["clean"], "full": False}
    trainer = make_trainer(build("vit"), max_steps=1)
    trainer.train()
    trainer.test(data, **options)
    with torch.no_grad():  # at the same step, as when the best model is loaded
        next(trainer.model.parameters()).add_(1)
    results = trainer.test(data, **options)
    assert json.loads((folder / "results.json").read_text()) == results
    stock = AutoModelForImageClassification.from_pretrained(folder)
    assert all(torch.equal(stock.state_dict()[name], value) for name, value in trainer.model.state_dict().items())
    kept = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match="holds a model with other weights.*another output_dir, or call save_model"):
        make_trainer(build("vit", seed=3)).test(data, **options)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == kept
    assert make_trainer((stock, trainer.processing_class)).test(data, **options)["identity"] == results["identity"]


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file", "20.png"), OSError("image is truncated")])
def test_an_image_that_cannot_be_read_is_no_full_disk(error, build, make_trainer, digits, monkeypatch):
    class Items:
        def __len__(self):
            return 32

        def __getitem__(self, place):
            if place == 20:
                raise error
            return digits.test[place]

    trainer = make_trainer(build("vit"))
    with pytest.raises(OSError) as caught:
        trainer.test(Items(), attacks=["clean"], full=False)
    assert caught.value is error
    full = OSError(28, "No space left on device")
    monkeypatch.setattr("tscnc_hf.evaluation.state.write_json", lambda *args: (_ for _ in ()).throw(full))
    with pytest.raises(StorageError, match="The results could not be written"):
        trainer.test(digits.test.subset(range(8)), attacks=["clean"], full=False)


def test_a_test_without_what_comes_on_top(build, make_trainer, digits):
    results = make_trainer(build("vit")).test(digits.test.subset(range(8)), attacks=["clean", "pgd-1"], full=False)
    assert not {"curve", "lipschitz"} & results.keys() and results["robustness"]["masking"] is None


def test_what_is_published_is_what_training_was(build, make_trainer, digits):
    trainer = make_trainer(
        build("vit"), max_steps=1, epsilon=0.02, target_sparsity=0.5, pruning_exclude=["classifier"]
    )
    trainer.train()
    trainer.args.epsilon, trainer.args.target_sparsity, trainer.args.objective = "77/255", 0.25, "natural"
    trainer.args.pruning_exclude.clear()
    results = trainer.test(digits.test.subset(range(8)), n=8, full=False, epsilon="55/255", norm="l2")
    trainer.save_model()
    folder = Path(trainer.args.output_dir)
    method = json.loads((folder / "tscnc_config.json").read_text())
    for found in (method, json.loads((folder / "config.json").read_text())["tscnc"]):
        assert (found["epsilon"], found["target_sparsity"], found["objective"]) == (0.02, 0.5, "trades")
    assert results["robustness"]["threat_model"] | {"seed": 0} == {"norm": "l2", "epsilon": 55 / 255, "seed": 0}
    assert results["sparsity"]["sparsity"] == pytest.approx(0.5, abs=1e-3)  # of the same weights
    card = (folder / "README.md").read_text()
    assert "l2 norm is at most **0.2157 (55/255)**" in card and "77/255" not in card
    assert "within 0.02 (5.1/255))" in card
    assert trainer.args.epsilon == 77 / 255

    trainer.args.target_sparsity = 0.5
    trainer.args.pruning_exclude.append("classifier")
    trainer.train()  # with the options as they are
    assert trainer.publisher.options()["epsilon"] == 77 / 255


def test_a_radius_that_is_set_later_is_a_number(make_config):
    args = make_config()
    args.epsilon, args.attack_step_size = "8/255", "2/255"
    assert (args.epsilon, args.attack_step_size) == (8 / 255, 2 / 255)
    for name, value in (("epsilon", "8"), ("epsilon", "a lot"), ("attack_step_size", 8)):
        with pytest.raises(ValueError, match=f"{name}="):
            setattr(args, name, value)
    args.norm, args.epsilon, args.attack_step_size = "l2", "3/2", None
    assert args.epsilon == 1.5 and args.attack_step_size is None
