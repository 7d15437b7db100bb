"""Pushing from the Trainer: every hub_strategy, one commit a push, and a run that goes on from what the Hub has."""

import json

import pytest
import torch
from huggingface_hub import snapshot_download

from tscnc_hf import load_sparse


PUBLISHED = {"README.md", "config.json", "model.safetensors", "model.sparse.safetensors", "preprocessor_config.json",
             "tscnc_config.json", "figures/layers.png"}  # fmt: skip
STEPS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "hub_always_push": True}


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_every_strategy_pushes_whole_folders_in_one_commit_each(strategy, build, make_trainer, hub, tmp_path):
    options = STEPS | {"push_to_hub": True, "hub_strategy": strategy, "hub_model_id": "tester/run"}
    trainer = make_trainer(build("vit"), hub_private_repo=True, **options)
    trainer.train()
    trainer.save_model()  # pushes
    commits = hub.commits("tester/run")[1:]
    during = [(message, set(files) - {".gitattributes"}) for _, message, files in commits[:-1]]
    assert commits[-1][1] == "Model save" and hub.repos["tester/run"].private
    expected = {"end": [], "every_save": ["", ""], "checkpoint": ["last-checkpoint", "last-checkpoint"]}
    folders = expected.get(strategy, ["checkpoint-2", "checkpoint-4"])
    assert [message for message, _ in during] == [f"Training in progress, step {s}" for s in (2, 4)][: len(folders)]
    for (_, files), folder in zip(during, folders, strict=True):
        assert {name for name in files if "/" not in name or name.startswith("figures/")} >= PUBLISHED
        kept = {name.removeprefix(f"{folder}/") for name in files if folder and name.startswith(f"{folder}/")}
        assert not folder or {"model.safetensors", "optimizer.pt", "tscnc_state.safetensors"} <= kept
    ever = hub.ever("tester/run")
    assert not [name for name in ever if name.endswith("training_args.bin")]
    if strategy in ("end", "every_save"):
        assert not [name for name in ever if name.endswith((".pt", ".pth", ".bin")) or "checkpoint" in name]
    assert {path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(("checkpoint", "_"))} == {
        "checkpoint-4"
    }
    found, trained = load_sparse("tester/run").state_dict(), trainer.model.state_dict()
    assert found.keys() == trained.keys() and all(torch.equal(found[name], trained[name]) for name in trained)


def test_a_run_goes_on_from_the_checkpoint_on_the_hub(build, make_trainer, hub, tmp_path):
    whole = make_trainer(build("vit"), output_dir=str(tmp_path / "whole"), **STEPS)
    whole.train()
    pushing = {"push_to_hub": True, "hub_strategy": "all_checkpoints", "hub_model_id": "tester/run"}
    make_trainer(build("vit"), **STEPS, **pushing).train()
    folder = snapshot_download("tester/run", allow_patterns=["checkpoint-2/*"])
    again = make_trainer(build("vit", seed=5), output_dir=str(tmp_path / "again"), **STEPS)
    again.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_a_push_in_the_background_that_fails_is_told_and_the_next_one_sends_all(
    build, make_trainer, hub, caplog, monkeypatch
):
    from transformers.utils import logging

    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    options = STEPS | {"push_to_hub": True, "hub_strategy": "every_save", "hub_model_id": "tester/run"}
    trainer = make_trainer(build("vit"), **options)
    hub.before_upload = lambda blob: False
    trainer.train()
    assert len(hub.commits("tester/run")) == 1
    assert caplog.text.count("A push during training failed") == 2 and "is as it was before" in caplog.text
    hub.before_upload = None
    trainer.push_to_hub("All of it")
    assert hub.commits("tester/run")[-1][1] == "All of it" and PUBLISHED <= hub.files("tester/run")


def test_push_to_hub_without_the_option_on_a_branch_and_in_the_background(build, make_trainer, hub):
    trainer = make_trainer(build("resnet"), max_steps=2)
    trainer.train()
    options = {"revision": "try", "private": True, "dataset_name": "digits"}
    commit = trainer.push_to_hub("By hand", blocking=False, **options).result()
    assert hub.commits("tester/out", "try")[-1][:2] == (commit.oid, "By hand") and hub.repos["tester/out"].private
    assert hub.files("tester/out") == {".gitattributes"}
    card = hub.content("tester/out", "README.md", "try").decode()
    assert "# tester/out" in card and "An image classifier for digits" in card
    assert json.loads(hub.content("tester/out", "tscnc_config.json", "try"))["dataset_name"] == "digits"


def test_results_of_other_weights_do_not_stay_in_the_folder(build, make_trainer, digits, tmp_path):
    trainer = make_trainer(build("vit"), max_steps=2)
    trainer.train()
    trainer.test(digits.test.subset(range(16)), attacks=("clean",))
    trainer.save_model()
    results, card = tmp_path / "out" / "results.json", tmp_path / "out" / "README.md"
    assert results.is_file() and "not evaluated yet" not in card.read_text().split("\n\n|")[0]
    before = results.read_bytes()
    trainer.train()
    trainer.save_model()
    (kept,) = results.parent.glob("_results-of-*.json")
    assert kept.read_bytes() == before
    assert not results.exists() and "its accuracy is not evaluated yet" in card.read_text()
