"""Weights that do not move: frozen before training, in the middle of it, or skipped in some steps."""

import copy

import pytest
import torch
from transformers import AutoModelForImageClassification

from tscnc_hf.method.matrices import weight_matrices


SCHEDULE = {"num_train_epochs": 2, "per_device_train_batch_size": 16, "optim": "adamw_torch", "weight_decay": 0.1}
SCHEDULE |= {"pruning_start": 0.125, "pruning_end": 0.75, "pruning_interval": 2, "target_sparsity": 0.5}
SCHEDULE |= {"objective": "natural", "adversary": "none"}
EVERYTHING = {"awp_gamma": 0.01, "ema_decay": 0.9, "tsc_weight": 1e-4, "cnc_weight": 1e-2}
WAYS = {
    "magnitude": {},
    "uniform": {"pruning_scope": "uniform", "pruning_criterion": "scaled-magnitude"},
    "latent": {"pruning_latent": True, "pruning_scope": "erk"},
    "taylor": {"pruning_criterion": "taylor"},
    "movement": {"pruning_criterion": "movement"},
    "learned": {"pruning_criterion": "learned"},
    "rates": {"pruning_criterion": "taylor", "pruning_scope": "learned"},
    "learned rates": {"pruning_criterion": "learned", "pruning_scope": "learned"},
    "floors": {"pruning_layer_floor": 0.2, "pruning_layer_sparsity": {"classifier": 0.25}},
    "hidden": {"pruning_structure": "hidden", "pruning_criterion": "taylor", "target_sparsity": 0.2},
    "gates": {"pruning_criterion": "gates", "tsc_on": "gates", "gate_learning_rate": 0.3},
}
PATCHES = "vit.embeddings.patch_embeddings.projection.weight"
FIRST = "vit.layers.0.mlp.fc2.weight"


def weights(model, names):
    return {name: copy.deepcopy(model.get_parameter(name).detach()) for name in names}


def zeros(model, exclude=()):
    return sum(int((record.weight == 0).sum()) for record in weight_matrices(model, exclude))


def freezes_at(watcher, step, names):
    def look(event, state, model):
        if state.global_step == step:
            for name in names:
                model.get_parameter(name).requires_grad_(False)

    return watcher(look)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_frozen_is_left_alone_and_the_others_reach_the_target(way, build, make_trainer, tmp_path, caplog):
    model, processor = build("vit")
    names = [PATCHES, FIRST]
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    before = weights(model, names)
    trainer = make_trainer((model, processor), **(SCHEDULE | EVERYTHING | WAYS[way]))
    with caplog.at_level("WARNING"):
        trainer.train()
    assert f"left alone by pruning, constraints and weight perturbation: {PATCHES}, {FIRST}" in caplog.text
    pruner, target = trainer.compressor.pruner, trainer.args.target_sparsity
    assert not pruner.records.keys() & set(names)
    found = zeros(model, trainer.args.pruning_exclude)
    wanted = pruner.target_count(target)
    assert found == wanted if way != "hidden" else wanted <= found < 1.5 * wanted
    trainer.save_model()
    published = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    for name in names:
        assert torch.equal(model.get_parameter(name), before[name])
        assert torch.equal(published.get_parameter(name), before[name])


@pytest.mark.parametrize("way", WAYS)
def test_what_is_frozen_in_the_middle_keeps_what_it_has(way, build, make_trainer, watcher, caplog):
    model, processor = build("vit")
    seen = {}

    def look(event, state, model):
        seen[state.global_step] = weights(model, [FIRST])[FIRST]

    options = SCHEDULE | EVERYTHING | WAYS[way] | {"ema_decay": 0.0}
    callbacks = [freezes_at(watcher, 4, [FIRST]), watcher(look)]
    trainer = make_trainer((model, processor), callbacks=callbacks, **options)
    with caplog.at_level("WARNING"):
        trainer.train()
    assert f"{FIRST} got requires_grad=False after training had begun" in caplog.text
    assert all(torch.equal(seen[step], seen[4]) for step in range(5, 9))
    assert not torch.equal(seen[4], seen[1])
    masks = trainer.compressor.pruner.masks
    count = sum(mask.numel() for name, mask in masks.items() if name != FIRST)
    found = zeros(model, [*trainer.args.pruning_exclude, FIRST])
    wanted = round(trainer.args.target_sparsity * count)
    assert found == wanted if way != "hidden" else wanted <= found < 1.5 * wanted
    assert torch.equal(model.get_parameter(FIRST) != 0, masks[FIRST])


def test_units_with_a_frozen_weight_stay_whole(build, make_trainer, watcher):
    model, processor = build("resnet")
    name, seen = "timm_model.layer1.0.conv1.weight", {}

    def look(event, state, model):
        seen[state.global_step] = model.timm_model.layer1[0].conv2.weight.detach().flatten(2).abs().sum((0, 2)) == 0

    options = SCHEDULE | {"pruning_structure": "channels", "target_sparsity": 0.2, "pruning_latent": True}
    callbacks = [freezes_at(watcher, 4, [name]), watcher(look)]
    trainer = make_trainer((model, processor), callbacks=callbacks, **options)
    trainer.train()
    closed = model.get_parameter(name).detach().flatten(1).abs().sum(1) == 0
    assert torch.equal(seen[4], seen[8]) and torch.equal(closed, seen[8])  # what reads it has the same channels
    count = sum(mask.numel() for other, mask in trainer.compressor.pruner.masks.items() if other != name)
    assert zeros(model, [name]) >= round(0.2 * count)


def test_a_run_with_weights_that_freeze_is_resumed_exactly(build, make_trainer, watcher, tmp_path):

    options = SCHEDULE | WAYS["rates"] | {"save_strategy": "steps", "save_steps": 5}

    def run(folder, **more):
        def look(event, state, model):
            if state.global_step >= 4:
                model.get_parameter(FIRST).requires_grad_(False)

        pair = build("vit", seed=0 if not more else 7)
        pair[0].get_parameter(PATCHES).requires_grad_(False)
        if more:
            pair[0].get_parameter(PATCHES).data.add_(1)
        freezing = watcher(look, ("on_train_begin", "on_step_end"))
        trainer = make_trainer(pair, callbacks=[freezing], output_dir=str(tmp_path / folder), **options)
        trainer.train(**more)
        return trainer.model.state_dict() | trainer.compressor.pruner.state()

    whole = run("whole")
    again = run("cut", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert whole.keys() == again.keys()
    assert [name for name in whole if not torch.equal(whole[name], again[name])] == []


def test_freezing_after_the_trainer_was_made_and_a_second_training(build, make_trainer):
    model, processor = build("vit")
    trainer = make_trainer((model, processor), **SCHEDULE, ema_decay=0.5, pruning_criterion="taylor")
    model.get_parameter(PATCHES).requires_grad_(False)
    before = weights(model, [PATCHES])[PATCHES]
    trainer.train()
    assert torch.equal(model.get_parameter(PATCHES), before) and PATCHES in trainer.args.pruning_exclude
    model.get_parameter(PATCHES).requires_grad_(True)
    trainer.train()
    assert trainer.args.pruning_exclude == [] and zeros(model) == trainer.compressor.pruner.target_count(0.5)
    assert not torch.equal(model.get_parameter(PATCHES), before)


def test_only_biases_and_norms_are_trained(build, make_trainer):
    model, processor = build("vit")
    matrices = [record.name for record in weight_matrices(model)]
    for name in matrices:
        model.get_parameter(name).requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="nothing to prune: .* that is trained"):
        make_trainer((model, processor), **SCHEDULE)
    trainer = make_trainer((model, processor), **(SCHEDULE | EVERYTHING | {"target_sparsity": 0}))
    trainer.train()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and not changed & set(matrices)


def test_a_frozen_layer_gets_no_gate(build, make_trainer):
    model, processor = build("vit")
    model.get_parameter(FIRST).requires_grad_(False)
    trainer = make_trainer((model, processor), **(SCHEDULE | {"tsc_on": "gates"}))
    gated = {name for name, _ in trainer.model.named_modules() if name.endswith(".gate")}
    assert gated and not any(name.startswith(FIRST.removesuffix("weight")) for name in gated)
    model, processor = build("vit")
    model.get_parameter(FIRST).requires_grad_(False)
    with pytest.raises(ValueError, match="fc2 is frozen"):
        make_trainer((model, processor), **(SCHEDULE | {"tsc_on": "gates", "gate_layers": ["layers.0.mlp.fc2"]}))


def test_the_list_of_weights_says_what_is_frozen(build):
    model, _ = build("vit")
    count = len(list(weight_matrices(model)))
    model.get_parameter(PATCHES).requires_grad_(False)
    text = repr(weight_matrices(model))
    assert f"{count - 1} weights are constrained and pruned" in text
    assert f"{PATCHES}: (32, 3, 4, 4), frozen (requires_grad=False)" in text
    assert len(list(weight_matrices(model))) == count  # reports count all


class Skips(torch.nn.Module):
    """Leaves its block out of the steps that it is told to."""

    def __init__(self, inner, block, steps, accumulation):
        super().__init__()
        self.config, self.inner, self.block, self.steps = inner.config, inner, block, steps
        self.calls, self.accumulation = 0, accumulation

    def forward(self, pixel_values):
        layer = self.inner.vit.layers[self.block]
        step, part = divmod(self.calls, self.accumulation)
        if self.training:
            self.calls += 1
        skip = self.training and (step in self.steps if self.accumulation == 1 else part == self.accumulation - 1)
        if not skip:
            return self.inner(pixel_values=pixel_values)
        forward, layer.forward = layer.forward, lambda hidden, *args, **kwargs: hidden
        try:
            return self.inner(pixel_values=pixel_values)
        finally:
            layer.forward = forward


LAYER = "inner.vit.layers.0.mlp.fc1.weight"


@pytest.mark.parametrize("way", ["latent", "learned", "taylor", "movement", "rates", "learned rates"])
def test_a_skipped_layer_keeps_latent_weights_and_scores(way, build, make_trainer, watcher):
    inner, processor = build("vit")
    model, states = Skips(inner, 0, {4}, 1), {}
    options = SCHEDULE | {"pruning_start": 0.125, "pruning_interval": 5}
    options |= WAYS[way] | {"tsc_weight": 0, "cnc_weight": 0}

    def look(event, state, model):
        states[state.global_step] = copy.deepcopy(trainer.compressor.pruner.state())

    trainer = make_trainer((model, processor), callbacks=[watcher(look)], **options)
    trainer.train()
    kinds = [kind for kind in ("latent", "score", "gathered") if f"{kind}.{LAYER}" in states[4]]
    assert kinds
    for kind in kinds:
        assert torch.equal(states[5][f"{kind}.{LAYER}"], states[4][f"{kind}.{LAYER}"])
        other = LAYER.replace("layers.0", "layers.1")
        moved = "score" if "score" in kinds else "latent"
        assert not torch.equal(states[5][f"{moved}.{other}"], states[4][f"{moved}.{other}"])
    if "rates" in way:
        steps = dict(zip(trainer.compressor.pruner.records, states[5]["rate.steps"].tolist(), strict=True))
        assert steps[LAYER] <= steps[LAYER.replace("layers.0", "layers.1")]


@pytest.mark.parametrize("way", ["latent", "learned", "taylor", "rates"])
@pytest.mark.parametrize("steps", [set(range(100)), set(range(3))])
def test_a_layer_without_gradients_is_not_taken_for_unimportant(way, steps, build, make_trainer):
    inner, processor = build("vit")
    model = Skips(inner, 0, steps, 1)
    options = SCHEDULE | WAYS[way]
    trainer = make_trainer((model, processor), **(options | {"tsc_weight": 0, "cnc_weight": 0}))
    trainer.train()
    assert zeros(model) == trainer.compressor.pruner.target_count(0.5)
    share = (model.get_parameter(LAYER) == 0).float().mean().item()
    assert 0.05 < share < 0.95


def test_skipped_in_the_last_micro_batch(build, make_trainer):
    inner, processor = build("vit")
    model = Skips(inner, 0, set(), 2)
    options = SCHEDULE | {"gradient_accumulation_steps": 2}
    options |= {"per_device_train_batch_size": 8, "pruning_criterion": "taylor", "tsc_weight": 0, "cnc_weight": 0}
    before = copy.deepcopy(inner.state_dict())
    trainer = make_trainer((model, processor), **options)
    trainer.train()
    assert not torch.equal(inner.state_dict()[LAYER.removeprefix("inner.")], before[LAYER.removeprefix("inner.")])
    share = (model.get_parameter(LAYER) == 0).float().mean().item()
    assert zeros(model) == trainer.compressor.pruner.target_count(0.5) and 0.05 < share < 0.95
