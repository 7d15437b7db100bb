"""Averages and perturbed weights in a run: what is evaluated, published and resumed."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from tests.trainers import never_collapsed
from tscnc_hf import sparsity_report


OPTIONS = {
    "objective": "trades", "adversary": "kl-pgd", "num_train_epochs": 4, "per_device_train_batch_size": 16,
    "learning_rate": 5e-3, "pruning_interval": 3, "logging_steps": 1, "eval_strategy": "epoch",
}  # fmt: skip
BOTH = OPTIONS | {"ema_decay": 0.8, "awp_gamma": 0.01, "awp_start": 0.3}


def state(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_the_average_is_what_is_evaluated_published_and_left(kind, build, make_trainer, watcher, digits, tmp_path):
    raw, shadow = [], None

    def look(event, trainer_state, model):
        nonlocal shadow
        raw.append(state(model))
        step = trainer_state.global_step
        decay = min(0.8, (1 + step) / (10 + step))
        for name, tensor in raw[-1].items():
            if tensor.is_floating_point():
                shadow[name] = decay * shadow[name] + (1 - decay) * tensor
            else:
                shadow[name] = tensor

    pair = build(kind)
    options = OPTIONS | {"ema_decay": 0.8, "output_dir": str(tmp_path / "out"), "save_strategy": "epoch"}
    trainer = make_trainer(pair, callbacks=[watcher(look)], **options)
    shadow = state(trainer.model)
    trainer.train()
    masks = trainer.compressor.pruner.masks
    final = state(trainer.model)
    for name, tensor in final.items():
        expected = shadow[name] * masks[name].view_as(tensor) if name in masks else shadow[name]
        torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(
        final["classifier.weight" if kind == "vit" else "timm_model.fc.weight"], list(raw[-1].values())[-2]
    )
    assert sparsity_report(trainer.model).sparsity == pytest.approx(0.9, abs=1e-3)

    logged = [entry for entry in trainer.state.log_history if "eval_accuracy" in entry][-1]
    again = trainer.evaluate()
    for key in ("eval_accuracy", "eval_robust_accuracy", "eval_loss"):
        assert logged[key] == pytest.approx(again[key], rel=1e-6)
    trainer.save_model()
    published = AutoModelForImageClassification.from_pretrained(tmp_path / "out").state_dict()
    assert published.keys() == final.keys() and all(torch.equal(published[name], final[name]) for name in final)
    last = tmp_path / "out" / "checkpoint-16"
    checkpoint = load_file(last / "tscnc_state.safetensors")
    as_loaded = AutoModelForImageClassification.from_pretrained(last).state_dict()  # what was evaluated, too
    for name, tensor in final.items():
        assert torch.equal(checkpoint[f"average.{name}"], tensor) and torch.equal(as_loaded[name], tensor)
        assert torch.equal(checkpoint[f"trained.{name}"], raw[-1][name])


@pytest.mark.parametrize("kind, more", [("vit", {}), ("resnet", {}), ("vit", {"tsc_on": "gates"})])
def test_a_cut_run_goes_on_exactly_and_the_best_model_is_an_average(kind, more, build, make_trainer, tmp_path):
    options = BOTH | more | {"save_strategy": "epoch", "pruning_end": 0.5, "load_best_model_at_end": True}
    options |= {"metric_for_best_model": "robust_accuracy", "compute_metrics": never_collapsed}
    whole = make_trainer(build(kind, dropout=0.2), output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    cut = make_trainer(build(kind, seed=5, dropout=0.2), output_dir=str(tmp_path / "cut"), **options)
    cut.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
    one, other = state(whole.model), state(cut.model)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    metric = whole.evaluate()
    assert metric["eval_robust_accuracy"] == pytest.approx(whole.state.best_metric)
    last = [json.dumps(entry) for entry in whole.state.log_history if "loss" in entry][-3:]
    assert [json.dumps(entry) for entry in cut.state.log_history if "loss" in entry][-3:] == last


def test_a_checkpoint_without_average_is_refused(build, make_trainer, tmp_path):
    options = OPTIONS | {"save_strategy": "epoch"}
    make_trainer(build("vit"), output_dir=str(tmp_path / "plain"), **options).train()
    checkpoint, other = tmp_path / "plain" / "checkpoint-8", {"output_dir": str(tmp_path / "other"), "ema_decay": 0.9}
    with pytest.raises(ValueError, match=r"trained with ema_decay=0.0 \(now 0.9\)"):
        make_trainer(build("vit"), **other, **options).train(resume_from_checkpoint=str(checkpoint))
    with pytest.raises(ValueError, match="has no average of the weights, this run has one: resume with the ema_decay"):
        make_trainer(build("vit"), **other, **options).compressor.load_state(checkpoint)


def test_weights_are_perturbed_from_the_start_asked_for(build, make_trainer):
    def losses(**options):
        trainer = make_trainer(build("resnet"), **(OPTIONS | {"eval_strategy": "no"} | options))
        trainer.train()
        tracked = [
            tensor for name, tensor in trainer.model.state_dict().items() if name.endswith("num_batches_tracked")
        ]
        assert {int(count) for count in tracked} == {16}  # the search for a direction does not count
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    plain, late, always = losses(), losses(awp_gamma=0.02, awp_start=0.5), losses(awp_gamma=0.02)
    assert late[:8] == plain[:8] and late[8] > plain[8]
    assert always[0] > plain[0]


def test_two_trainings_one_after_the_other(build, make_trainer):
    """The second starts an average of its own."""
    trainer = make_trainer(build("vit"), ema_decay=0.9, **(OPTIONS | {"eval_strategy": "no"}))
    trainer.train()
    assert trainer.compressor.average is None
    first = state(trainer.model)
    trainer.train()
    assert trainer.compressor.average is None
    assert any(not torch.equal(first[name], tensor) for name, tensor in state(trainer.model).items())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ema_decay": 1.0}, r"ema_decay=1.0 is outside \[0, 1\)"),
        ({"awp_gamma": -1.0}, "awp_gamma=-1.0 is outside"),
        ({"awp_start": 2.0}, r"awp_start=2.0 is outside \[0, 1\]"),
    ],
)
def test_wrong_options(options, message, make_config):
    with pytest.raises(ValueError, match=message):
        make_config(**options)
