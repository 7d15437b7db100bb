"""Weights exchanged after the schedule, in runs: when, which, exactly as many, and to the same end when resumed."""

import math

import pytest
import torch
from transformers import TrainerCallback

from tests.method.pruning.test_regrowth import rigl


# 16 steps, pruning ends after the 4th, exchanges until the 13th
OPTIONS = {
    "objective": "pgd-at", "adversary": "pgd", "learning_rate": 5e-3, "num_train_epochs": 4,
    "per_device_train_batch_size": 16, "pruning_start": 0.0, "pruning_end": 0.25, "pruning_interval": 2,
    "regrow_fraction": 0.4, "regrow_interval": 3, "logging_steps": 1, "optim": "adamw_torch", "weight_decay": 0.1,
}  # fmt: skip
EXCHANGES = [7, 10]


class Before(TrainerCallback):
    """Looks before anybody else: gradients before clipping, and what the optimizer's step has left."""

    def __init__(self, trainer):
        self.trainer, self.gradients, self.steps = trainer, {}, {}
        norm_of = trainer._of_what_is_kept
        trainer._of_what_is_kept = lambda *given: self.look() or norm_of(*given)

    def look(self):
        self.gradients = {name: w.grad.clone() for name, w in self.trainer.compressor.pruner.weights.items()}

    def on_optimizer_step(self, args, state, control, **kwargs):
        pruner = self.trainer.compressor.pruner
        weights = {name: weight.detach().clone() for name, weight in pruner.weights.items()}
        self.steps[state.global_step + 1] = weights, pruner.masks, self.gradients


def train(make_trainer, pair, watcher, **options):
    """The trainer, what there was before each step's masks, and the masks after it; zeros are held throughout."""
    masks, zeros = {}, {}

    def look(event, state, model):
        pruner = trainer.compressor.pruner
        masks[state.global_step] = pruner.masks
        zeros[state.global_step] = pruner.pruned_count
        for name, mask in pruner.masks.items():
            assert (pruner.weights[name][~mask] == 0).all()
            if trainer.compressor.average is not None:
                assert (trainer.compressor.average.tensors[name][~mask] == 0).all()

    trainer = make_trainer(pair, callbacks=[watcher(look)], **(OPTIONS | options))
    before = Before(trainer)
    trainer.callback_handler.callbacks.insert(0, before)
    trainer.train()
    target = trainer.compressor.pruner.target_count(trainer.args.target_sparsity)
    assert all(count == target for step, count in zeros.items() if step >= 4)
    changed = [
        step
        for step in range(5, 17)
        if any(not torch.equal(mask, masks[step - 1][name]) for name, mask in masks[step].items())
    ]
    return trainer, before.steps, masks, changed


@pytest.mark.parametrize(
    "kind, more",
    [
        ("vit", {}),
        ("vit", {"pruning_scope": "erk", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 8}),
        ("resnet", {"pruning_scope": "uniform", "channels_last": True, "max_grad_norm": 0.0, "ema_decay": 0.9}),
        ("vit", {"pruning_latent": True, "awp_gamma": 0.01}),
    ],
)
def test_exchanges_are_rigls(kind, more, build, make_trainer, watcher):
    trainer, before, masks, changed = train(make_trainer, build(kind), watcher, **more)
    assert changed == EXCHANGES
    for step in EXCHANGES:
        weights, old, gradients = before[step]
        share = 0.2 * (1 + math.cos(math.pi * (step - 4) / 9))
        names = list(old)
        groups = [names] if trainer.args.pruning_scope == "global" else [[name] for name in names]
        scores = {name: weight.abs() for name, weight in weights.items()}
        expected = rigl(old, scores, gradients, share, groups)
        assert [name for name in names if not torch.equal(masks[step][name], expected[name])] == []


@pytest.mark.parametrize(
    "more",
    [
        {"pruning_structure": "2:4", "target_sparsity": 0.6},
        {"pruning_criterion": "taylor"},
        {"pruning_criterion": "gates", "tsc_on": "gates", "tsc_weight": 1e-2},
        {"pruning_layer_sparsity": {"classifier": 0.5}, "pruning_row_floor": 1, "target_sparsity": 0.8},
        {"pruning_criterion": "scaled-magnitude", "pruning_schedule": "one-shot"},
    ],
    ids=["2:4", "taylor", "gates", "own sparsity", "one-shot"],
)
def test_with_other_ways_to_prune(more, build, make_trainer, watcher):
    pair = build("vit")
    if "pruning_structure" in more:
        more = more | {"pruning_exclude": ["patch_embeddings"]}
    trainer, _, masks, changed = train(make_trainer, pair, watcher, **more)
    assert changed == EXCHANGES
    if "pruning_structure" in more:
        assert all(int(mask.reshape(-1, 4).sum(-1).max()) <= 2 for mask in masks[16].values())


def test_a_resumed_run_is_the_uncut_one(build, make_trainer, tmp_path):
    """Cut off before the first exchange, and after one."""
    options = OPTIONS | {
        "save_strategy": "steps",
        "save_steps": 4,
        "ema_decay": 0.9,
        "output_dir": str(tmp_path / "a"),
    }
    whole = make_trainer(build("vit", dropout=0.2), **options)
    whole.train()
    for step in (4, 8):
        cut = make_trainer(build("vit", seed=7, dropout=0.2), **(options | {"output_dir": str(tmp_path / f"{step}")}))
        cut.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
        one, other = whole.model.state_dict(), cut.model.state_dict()
        assert [name for name in one if not torch.equal(one[name], other[name])] == []
        masks = [trainer.compressor.pruner.masks for trainer in (whole, cut)]
        assert all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())


def test_a_skipped_step_exchanges_nothing(build, make_trainer):
    """As after an overflow in half precision, when gradients are not finite."""
    trainer = make_trainer(build("vit"), **OPTIONS)
    compressor = trainer.compressor
    compressor.begin(0, 16)
    compressor.pruner.update(0.9)
    for parameter in trainer.model.parameters():
        parameter.grad = torch.full_like(parameter, math.inf)
    before = compressor.pruner.masks
    optimizer = torch.optim.SGD(trainer.model.parameters(), 0.1)
    for skipped in (True, False):
        compressor.before_clipping(6, 16)
        optimizer.step_was_skipped = skipped
        if not skipped:
            compressor._gradients = {name: torch.randn_like(g) for name, g in compressor._gradients.items()}
        compressor.after_step(7, 16, optimizer)
        changed = any(not torch.equal(mask, before[name]) for name, mask in compressor.pruner.masks.items())
        assert changed == (not skipped)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"pruning_structure": "heads"}, "pruning_structure='heads' prunes whole units"),
        ({"pruning_criterion": "learned"}, "pruning_criterion='learned' has nothing to judge weights by"),
        ({"pruning_criterion": "movement"}, "pruning_criterion='movement' has nothing to judge"),
        ({"pruning_scope": "learned"}, "pruning_scope='learned' learns its factors while"),
        ({"keep_masks": True}, "keep_masks=True says that the zeros of the model stay"),
        ({"regrow_fraction": 0.0}, "regrow_interval=3 has no effect without regrow_fraction above 0"),
        ({"regrow_fraction": 1.0}, "regrow_fraction=1.0 is outside"),
        ({"regrow_interval": 0}, "regrow_interval=0 is outside"),
        ({"optim": "adamw_bnb_8bit"}, "optim='adamw_bnb_8bit' keeps moments"),
    ],
)
def test_what_cannot_be_exchanged_is_refused(options, message, make_config):
    with pytest.raises(ValueError, match=message):
        make_config(**(OPTIONS | options))


def test_a_run_too_short_for_an_exchange_is_refused(build, make_trainer):
    with pytest.raises(
        ValueError, match=r"every regrow_interval=9 steps after step 4, .* before step 13: there is no"
    ):
        make_trainer(build("vit"), **(OPTIONS | {"regrow_interval": 9})).train()
    make_trainer(build("vit"), **(OPTIONS | {"target_sparsity": 0.0, "max_steps": 1})).train()  # nothing is pruned
