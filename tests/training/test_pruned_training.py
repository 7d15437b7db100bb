"""Every way of pruning through the Trainer: exact, resumed exactly, under accumulation, autocast and gates."""

import copy
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForImageClassification

from tests.trainers import never_collapsed
from tscnc_hf import slim
from tscnc_hf.data.image_datasets import ImageTensorDataset
from tscnc_hf.method.criteria import register_criterion
from tscnc_hf.method.matrices import weight_matrices


SCHEDULE = {"num_train_epochs": 4, "per_device_train_batch_size": 16, "optim": "adamw_torch", "weight_decay": 0.1}
SCHEDULE |= {"pruning_start": 0.125, "pruning_end": 0.75, "pruning_interval": 3}  # steps 2 to 12 of 16
WAYS = {
    "latent": {"pruning_latent": True, "pruning_schedule": "linear"},
    "learned": {"pruning_criterion": "learned", "pruning_schedule": "one-shot", "pruning_scope": "uniform"},
    "movement": {"pruning_criterion": "movement"},
    "lamp": {"pruning_criterion": "lamp", "pruning_latent": True},
    "taylor": {"pruning_criterion": "taylor", "pruning_scope": "erk"},
    "rates": {"pruning_criterion": "scaled-magnitude", "pruning_scope": "learned"},
    "2:4": {"pruning_structure": "2:4", "pruning_exclude": ["embeddings"], "pruning_layer_floor": 0.01},
    "units": {"pruning_structure": "units", "target_sparsity": 0.3},
    "gates": {"pruning_criterion": "gates", "tsc_on": "gates", "gate_learning_rate": 0.3},
}


def zeros(trainer) -> int:
    records = weight_matrices(trainer.model, trainer.args.pruning_exclude)
    return sum(int((record.weight == 0).sum()) for record in records)


def state_of(trainer) -> dict[str, torch.Tensor]:
    moments = trainer.optimizer.state_dict()["state"]
    flat = {f"{i}.{key}": torch.as_tensor(value) for i, state in moments.items() for key, value in state.items()}
    return copy.deepcopy(trainer.model.state_dict() | trainer.compressor.pruner.state() | flat)


@pytest.mark.parametrize("way", WAYS)
def test_exact_and_resumed_exactly_from_the_middle_of_the_schedule(way, build, make_trainer, tmp_path):
    options = SCHEDULE | {"save_strategy": "steps", "save_steps": 5} | WAYS[way]
    whole = make_trainer(build("vit", dropout=0.2), output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    target = whole.compressor.pruner.target_count(whole.args.target_sparsity)
    found = zeros(whole)
    assert found == whole.compressor.pruner.pruned_count
    assert found == target if way != "units" else target <= found < 1.2 * target
    expected = state_of(whole)
    for step in (5, 10):
        checkpoint = shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", tmp_path / f"cut-{step}")
        resumed = make_trainer(build("vit", seed=7, dropout=0.2), output_dir=str(tmp_path / f"on-{step}"), **options)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        again = state_of(resumed)
        assert again.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(expected[name], again[name])] == []


@pytest.mark.parametrize(
    "way",
    [{}, WAYS["learned"], {"pruning_criterion": "movement", "pruning_start": 0.5625, "pruning_interval": 1}],
    ids=["magnitude", "learned", "not begun"],
)
def test_a_run_cut_shorter_than_its_schedule_ends_it_at_once(way, build, make_trainer, tmp_path):
    """Cut off at step 9 of 16, before masks are final at 12 (or chosen at all); of 11 steps they are at 8."""
    options = SCHEDULE | {"save_strategy": "steps", "save_steps": 9, "output_dir": str(tmp_path)} | way
    make_trainer(build("vit"), **options).train()
    with pytest.raises(ValueError, match="not final after 9, and training would end with 9: set max_steps to 10"):
        make_trainer(build("vit"), max_steps=9, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    trainer = make_trainer(build("vit"), max_steps=11, logging_steps=1, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    pruner = trainer.compressor.pruner
    assert zeros(trainer) == pruner.pruned_count == pruner.target_count(0.9)
    reached = {log["step"]: log["sparsity"] for log in trainer.state.log_history if "sparsity" in log}
    assert reached[10] == pruner.pruned_count / pruner.prunable_count
    assert trainer.masks_frozen() and not pruner.active


@pytest.mark.parametrize("options", [{}, {"pruning_latent": True}, {"pruning_criterion": "learned"}])
def test_one_shot_prunes_all_of_it_at_the_start(options, build, make_trainer):
    trainer = make_trainer(build("vit"), pruning_schedule="one-shot", logging_steps=1, **SCHEDULE, **options)
    trainer.train()
    target = trainer.compressor.pruner.target_count(0.9) / trainer.compressor.pruner.prunable_count
    sparsity = [log["sparsity"] for log in trainer.state.log_history if "sparsity" in log]
    assert sparsity == [0.0] * 2 + [target] * 14


def test_weights_stand_still_while_scores_are_learned(build, make_trainer, watcher):
    model, processor = build("vit")
    seen = {}

    def look(event, state, model):
        seen[state.global_step] = copy.deepcopy(model.state_dict())

    options = SCHEDULE | WAYS["learned"] | {"pruning_interval": 1}
    trainer = make_trainer((model, processor), callbacks=[watcher(look)], **options)
    trainer.train()
    masks = trainer.compressor.pruner.masks
    for name, now in seen[11].items():
        before = seen[2][name]
        if name in masks:  # the values are those from before, or zero
            dense = torch.where(now != 0, now, seen[3][name])
            assert torch.equal(torch.where(dense != 0, dense, before), torch.where(before != 0, before, dense))
        else:
            assert torch.equal(now, before), name  # biases and norms, too
    chosen = [{name: seen[step][name] != 0 for name in masks} for step in range(3, 13)]
    assert any(not torch.equal(chosen[0][name], chosen[-1][name]) for name in masks)  # something was learned
    final = trainer.model.state_dict()
    assert all(not torch.equal(final[name], seen[12][name]) for name in masks)  # and fine-tuned
    assert all(torch.equal(final[name] != 0, masks[name]) for name in masks)


def test_the_same_with_accumulation(build, make_trainer):
    """One batch of 32 or two of 16 a step: the same scores, masks and weights."""
    options = SCHEDULE | WAYS["learned"] | {"objective": "natural", "adversary": "none", "optim": "sgd"}
    options |= {"learning_rate": 0.1, "tsc_weight": 0, "cnc_weight": 1e-2}
    results = []
    for size, parts in ((32, 1), (16, 2)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts}
        trainer = make_trainer(build("vit"), **(options | sizes))
        trainer.train()
        results.append((trainer.model.state_dict(), trainer.compressor.pruner.masks))
    for one, other in zip(*results, strict=True):
        for name in one:
            torch.testing.assert_close(other[name], one[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", ["latent", "learned", "taylor"])
def test_under_autocast_with_a_best_model_and_an_average(way, build, make_trainer):
    options = SCHEDULE | WAYS[way] | {"bf16": True, "ema_decay": 0.9, "pruning_end": 0.5}
    options |= {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    options |= {"metric_for_best_model": "robust_accuracy", "compute_metrics": never_collapsed}
    trainer = make_trainer(build("resnet-stride-8"), **options)
    trainer.train()
    assert trainer.state.best_global_step >= 8
    assert zeros(trainer) == trainer.compressor.pruner.target_count(0.9)


def test_zeros_of_a_sparse_checkpoint_are_kept(build, make_trainer, tmp_path):
    first = make_trainer(build("vit"), output_dir=str(tmp_path / "first"))
    first.train()
    first.save_model()
    sparse = AutoModelForImageClassification.from_pretrained(tmp_path / "first")
    were = {record.name: record.weight.detach() == 0 for record in weight_matrices(sparse)}
    options = {"keep_masks": True, "target_sparsity": 0, "output_dir": str(tmp_path / "second")}
    trainer = make_trainer((sparse, build("vit")[1]), optim="adamw_torch", weight_decay=0.5, **options)
    trainer.train()
    records = list(weight_matrices(trainer.model))
    assert all(torch.equal(record.weight == 0, were[record.name]) for record in records)
    assert all(not torch.equal(record.weight, dict(first.model.named_parameters())[record.name]) for record in records)
    assert [log["sparsity"] for log in trainer.state.log_history if "sparsity" in log] == [
        pytest.approx(0.9, abs=1e-4)
    ] * 2

    sparse = AutoModelForImageClassification.from_pretrained(tmp_path / "first")
    options |= {"target_sparsity": 0.95, "output_dir": str(tmp_path / "third")}
    trainer = make_trainer((sparse, build("vit")[1]), **options)
    trainer.train()
    assert zeros(trainer) == trainer.compressor.pruner.target_count(0.95)
    assert all((record.weight[were[record.name]] == 0).all() for record in weight_matrices(trainer.model))


@pytest.mark.parametrize("criterion", ["magnitude", "movement", "lamp"])
def test_zeros_stay_whatever_the_criterion_says(criterion, build, make_trainer):
    model, processor = build("vit")
    with torch.no_grad():
        for number, record in enumerate(weight_matrices(model)):
            record.weight[torch.rand_like(record.weight) < (0.3, 0.9)[number % 2]] = 0
    were = {record.name: record.weight.detach() == 0 for record in weight_matrices(model)}
    options = SCHEDULE | {"keep_masks": True, "target_sparsity": 0.8, "pruning_criterion": criterion}
    trainer = make_trainer((model, processor), learning_rate=1e-2, **options)
    trainer.train()
    assert zeros(trainer) == trainer.compressor.pruner.target_count(0.8)
    assert all((record.weight[were[record.name]] == 0).all() for record in weight_matrices(trainer.model))


def test_what_cannot_be_kept_is_refused(build, make_trainer):
    model, processor = build("vit")
    with torch.no_grad():
        next(iter(weight_matrices(model))).weight.zero_()
    options = {"keep_masks": True, "target_sparsity": 0.8, "pruning_scope": "uniform"}
    with pytest.raises(ValueError, match="keep_masks=True keeps the zeros .* scope='uniform' .* has to get"):
        make_trainer((model, processor), **options)
    with pytest.raises(ValueError, match="keep_masks=True, but no prunable weight of the model is zero"):
        make_trainer(build("vit"), keep_masks=True)
    model, processor = build("vit")
    with torch.no_grad():
        model.classifier.weight.zero_()
    with pytest.raises(ValueError, match="keeps zeros, and classifier.weight, the last layer .*, has nothing"):
        make_trainer((model, processor), keep_masks=True, target_sparsity=0.8)
    make_trainer((model, processor), keep_masks=False, target_sparsity=0.8)
    with pytest.raises(ValueError, match=r"target_sparsity=0.01 is less than the 0.0\d+ that the model has"):
        make_trainer((model, processor), keep_masks=True, target_sparsity=0.01)


def test_the_ends_stay_dense(build, make_trainer):
    model, processor = build("resnet")
    trainer = make_trainer((model, processor), pruning_dense_first=True, pruning_dense_last=True)
    trainer.train()
    records = list(weight_matrices(model))
    assert (records[0].weight != 0).all() and (records[-1].weight != 0).all()
    assert trainer.args.pruning_exclude == [records[0].name, records[-1].name]
    assert trainer.compressor.pruner.prunable_count == sum(record.weight.numel() for record in records[1:-1])
    assert zeros(trainer) == trainer.compressor.pruner.target_count(0.9)


def test_a_criterion_of_your_own(build, make_trainer):
    calls = []

    def largest(matrices, gradients):
        calls.append({name: float(gradient.abs().sum()) for name, gradient in gradients.items()})
        return {record.name: -record.weight.abs() for record in matrices}

    register_criterion("prune-the-largest", largest, gradients="mean")
    trainer = make_trainer(build("vit"), pruning_criterion="prune-the-largest")
    trainer.train()
    assert zeros(trainer) == trainer.compressor.pruner.target_count(0.9)
    assert calls and all(value > 0 for call in calls for value in call.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pruning_row_floor": 20}, r"0\.9 is not reachable with the floors .*row_floor=20.*the largest is 0\.\d+"),
        ({"pruning_layer_sparsity": {"head": 0.5}}, "'head', which no prunable weight has"),
        ({"pruning_structure": "2:5"}, "input channels, which groups of 5 do not divide"),
        (
            {"pruning_structure": "1:2", "target_sparsity": 0.3, "pruning_exclude": ["patch"]},
            "does not give 1:2, which has 0.5 zeros",
        ),
        ({"pruning_structure": "heads"}, "not reachable with whole units"),
        ({"pruning_criterion": "gates"}, "'gates' needs gates"),
    ],
)
def test_what_cannot_be_reached_is_said_before_training(options, message, build, make_trainer):
    with pytest.raises(ValueError, match=message):
        make_trainer(build("vit"), **options)


@pytest.mark.parametrize("kind", ["vit", "resnet", pytest.param("mobilenet", marks=pytest.mark.launched)])
def test_units_that_training_has_pruned_are_cut_out_by_slim(kind, build, make_trainer, digits):
    model, processor = build(kind)
    side = 32 if kind == "mobilenet" else 8
    train = digits.train.subset(range(64))
    if side == 32:
        images = train.images.repeat_interleave(4, 2).repeat_interleave(4, 3)
        train = ImageTensorDataset(images, train.labels, train.class_names)
    trainer = make_trainer(
        (model, processor), train=train, pruning_structure="units", target_sparsity=0.3, per_device_train_batch_size=16
    )
    trainer.train()
    small, report = slim(trainer.model)
    x = torch.rand(8, 3, side, side)
    with torch.no_grad():
        torch.testing.assert_close(small.eval()(x).logits, trainer.model.eval()(x).logits, rtol=1e-4, atol=1e-4)
    before, after = (sum(parameter.numel() for parameter in one.parameters()) for one in (trainer.model, small))
    assert before - after >= trainer.compressor.pruner.pruned_count  # with the biases and norms of what is gone
    assert report.macs_after < report.macs_before


@pytest.mark.parametrize("text", ["unscale_() has already been called on this optimizer since", "another"])
def test_fp16_gradients_are_unscaled_once(text, build, make_trainer):
    """Without clipping, newer Trainers have unscaled them to log their norm, older ones have not."""
    trainer, calls = make_trainer(build("vit"), pruning_criterion="movement"), []

    def unscale_gradients():
        calls.append(text)
        raise RuntimeError(text)

    trainer.compressor.pruner.begin(trainer.create_optimizer())
    for parameter in trainer.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    trainer.compressor.args = SimpleNamespace(fp16=True, max_grad_norm=0, regrow_fraction=0)
    with pytest.raises(RuntimeError, match=text) if text == "another" else nullcontext():
        accelerator = SimpleNamespace(unscale_gradients=unscale_gradients)
        trainer.compressor.after_backward(accelerator, 0, 16)
    assert calls == [text]
