"""TSC apart from the gradient, in runs: what an optimizer's step leaves is moved by the shrinkage and nothing else."""

import pytest
import torch
from transformers import TrainerCallback

from tests.method.test_shrinkage import shrunk


OPTIONS = {
    "objective": "pgd-at", "adversary": "pgd", "tsc_decoupled": True, "tsc_weight": 3.0, "cnc_weight": 0.0,
    "learning_rate": 5e-3, "lr_scheduler_type": "cosine", "weight_decay": 0.1, "optim": "adamw_torch",
    "num_train_epochs": 4, "per_device_train_batch_size": 16, "pruning_interval": 2, "logging_steps": 1,
}  # fmt: skip


class Before(TrainerCallback):
    """Looks at a step of the optimizer before anybody else: prunable weights, as latent ones are in their place."""

    def __init__(self, trainer):
        self.trainer, self.steps = trainer, []

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        pruner = self.trainer.compressor.pruner
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        weights = {name: weight.detach().clone() for name, weight in pruner.weights.items()}
        self.steps.append((weights, pruner.masks, {n: rates[id(w)] for n, w in pruner.weights.items()}))


@pytest.mark.parametrize(
    "kind, more",
    [("vit", {}), ("resnet", {"channels_last": True}), ("vit", {"pruning_latent": True}), ("vit", {"ema_decay": 0.9})],
)
def test_each_step_is_that_of_the_optimizer_less_the_shrinkage(kind, more, build, make_trainer, watcher):
    after = []

    def look(event, state, model):
        pruner = trainer.compressor.pruner
        after.append({name: tensor.detach().clone() for name, tensor in pruner.trained.items()})

    trainer = make_trainer(build(kind), callbacks=[watcher(look)], **(OPTIONS | more))
    before = Before(trainer)
    trainer.callback_handler.callbacks.insert(0, before)
    trainer.train()
    assert len(after) == len(before.steps) == 16
    assert len({max(rates.values()) for _, _, rates in before.steps}) == 16  # the schedule's
    for step, ((weights, masks, rates), found) in enumerate(zip(before.steps, after, strict=True)):
        moved = 0
        for name, weight in weights.items():
            expected = shrunk(weight, rates[name] * 3.0, float(trainer.compressor.scales[name]), 10.0).float()
            if name in masks:  # what was pruned is not moved, and what is pruned now is zero
                expected = torch.where(masks[name], expected, weight)
            kept = found[name] != 0
            torch.testing.assert_close(found[name][kept], expected[kept], rtol=1e-5, atol=1e-7)
            moved += int((expected != weight)[kept].sum())
        assert moved > 100 or rates[name] == 0, step
    assert not any("tsc_loss" in entry for entry in trainer.state.log_history)
    masks = trainer.compressor.pruner.masks
    assert all((trainer.compressor.pruner.weights[name][~mask] == 0).all() for name, mask in masks.items())
    assert trainer.compressor.pruner.pruned_count == trainer.compressor.pruner.target_count(0.9)


def test_weights_are_left_alone_while_scores_are_learned(build, make_trainer, watcher):
    """They are frozen then; before and after they are moved."""
    seen = []

    def look(event, state, model):
        dense = trainer.compressor.pruner._dense
        seen.append(dense["classifier.weight"].clone() if dense else None)

    options = {"pruning_criterion": "learned", "pruning_start": 0.25, "pruning_end": 0.75}
    trainer = make_trainer(build("vit"), callbacks=[watcher(look)], **(OPTIONS | options))
    trainer.train()
    frozen = [tensor for tensor in seen if tensor is not None]
    assert len(frozen) == 7 and all(torch.equal(frozen[0], tensor) for tensor in frozen)


def test_frozen_weights_stay(build, make_trainer):
    model, processor = build("vit")
    model.classifier.weight.requires_grad_(False)
    before = model.classifier.weight.clone()
    make_trainer((model, processor), max_steps=4, **(OPTIONS | {"target_sparsity": 0.0})).train()
    assert torch.equal(model.classifier.weight, before)


def test_a_resumed_run_is_the_uncut_one(build, make_trainer, tmp_path):
    options = OPTIONS | {"save_strategy": "steps", "save_steps": 7, "ema_decay": 0.9}
    whole = make_trainer(build("vit", dropout=0.2), output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    cut = make_trainer(build("vit", seed=7, dropout=0.2), output_dir=str(tmp_path / "cut"), **options)
    cut.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-7"))
    one, other = whole.model.state_dict(), cut.model.state_dict()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    again = make_trainer(build("vit"), output_dir=str(tmp_path / "x"), **(options | {"tsc_decoupled": False}))
    with pytest.raises(ValueError, match=r"trained with tsc_decoupled=True \(now False\)"):
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-7"))


def test_it_is_refused_where_it_can_not_be(build, make_trainer, make_config):
    with pytest.raises(ValueError, match='tsc_decoupled=True has no effect without tsc_on="weights"'):
        make_config(tsc_decoupled=True, tsc_on="gates")
    trainer = make_trainer(build("vit"), max_steps=2, **(OPTIONS | {"target_sparsity": 0.0}))
    trainer.optimizer = torch.optim.SGD([trainer.model.classifier.bias], 0.1)
    with pytest.raises(ValueError, match="no learning rate for 14 of 14 weights"):
        trainer.train()
    assert trainer.state.global_step == 0
