"""What a recipe adds to an objective: standard training first, mixed attacks, smoothed labels, one cycle, averages."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.trainers import never_collapsed
from tscnc_hf.method.adversarial.noise import PlacedNoise
from tscnc_hf.method.adversarial.objectives import objective_terms
from tscnc_hf.method.adversarial.pgd import craft, fgsm_rs, pgd


OPTIONS = {
    "objective": "trades", "adversary": "mixed", "num_train_epochs": 4, "per_device_train_batch_size": 16,
    "learning_rate": 5e-3, "logging_steps": 1, "pruning_interval": 3, "optim": "adamw_torch",
}  # fmt: skip


def noise():
    return PlacedNoise("cpu", (0, "here"), 0, 6)


def test_mixed_attacks_are_one_step_and_two_in_turn():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 10))
    x, y = torch.rand(6, 3, 4, 4), torch.randint(0, 10, (6,))
    options = {"epsilon": 0.1, "steps": 10, "step_size": None, "norm": "linf"}
    found = [craft("mixed", model, x, y, generator=noise(), turn=turn, **options) for turn in range(4)]
    one = fgsm_rs(model, x, y, epsilon=0.1, generator=noise())
    two = pgd(model, x, y, epsilon=0.1, steps=2, step_size=0.05, generator=noise())
    assert all(torch.equal(a, b) for a, b in zip(found, [one, two, one, two], strict=True))
    assert not torch.equal(one, two)


def test_each_step_of_a_run_has_its_turn(build, make_trainer, monkeypatch):
    """All micro-batches of a step the same; forward passes of the attack are what tells."""
    trainer, turns = (
        make_trainer(
            build("vit"), **(OPTIONS | {"gradient_accumulation_steps": 2, "max_steps": 4, "target_sparsity": 0})
        ),
        [],
    )
    real = trainer.adversary.attack

    def attack(model, *given):
        count = []
        hook = model.register_forward_pre_hook(lambda *_: count.append(1))
        found = real(model, *given)
        hook.remove()
        turns.append((trainer.state.global_step, len(count)))
        return found

    monkeypatch.setattr(trainer.adversary, "attack", attack)
    trainer.train()
    assert turns == [(0, 1), (0, 1), (1, 2), (1, 2), (2, 1), (2, 1), (3, 2), (3, 2)]


@pytest.mark.parametrize("objective", ["pgd-at", "trades", "mart"])
def test_standard_training_comes_first_and_then_the_radius_grows(objective, build, make_trainer, monkeypatch):
    options = OPTIONS | {"natural_fraction": 0.25, "epsilon_warmup": 0.25, "objective": objective, "adversary": "pgd"}
    trainer = make_trainer(build("resnet"), **options)
    attacked, real = [], trainer.adversary.attack
    monkeypatch.setattr(
        trainer.adversary, "attack", lambda *given: attacked.append(trainer.state.global_step) or real(*given)
    )
    trainer.train()
    assert attacked == list(range(4, 16))
    entries = {entry["step"]: entry for entry in trainer.state.log_history if "loss" in entry}
    own = {"pgd-at": {"robust_loss"}, "trades": {"natural_loss", "robust_loss"}}
    own = own.get(objective, {"robust_loss", "consistency_loss"})
    names = ("natural_loss", "robust_loss", "consistency_loss")
    for step, entry in entries.items():
        assert {name for name in names if name in entry} == (own if step > 4 else {"natural_loss"}), step
    radii = [trainer.adversary.epsilon_at(step, 16) for step in range(4, 12)]
    assert radii == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1, 0.1, 0.1])


def test_a_resumed_run_is_the_uncut_one(build, make_trainer, tmp_path):
    """Cut off in the standard part, and after an odd number of steps of the rest."""
    options = OPTIONS | {"natural_fraction": 0.3, "epsilon_warmup": 0.3, "save_strategy": "steps", "save_steps": 3}
    options |= {"label_smoothing_factor": 0.2, "ema_decay": 0.9, "lr_scheduler_type": "linear", "warmup_steps": 0.3}
    whole = make_trainer(build("resnet"), output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    for step in (3, 9):
        cut = make_trainer(build("resnet", seed=7), output_dir=str(tmp_path / f"{step}"), **options)
        cut.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        one, other = whole.model.state_dict(), cut.model.state_dict()
        assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("objective", ["natural", "pgd-at", "trades", "mart"])
def test_labels_are_smoothed_in_every_objective(objective):
    """Against cross-entropy with the target distribution written out: the term grows by what smoothing adds."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 10)).double()
    x, x_adv = torch.rand(2, 6, 3, 4, 4, dtype=torch.float64)
    y = torch.randint(0, 10, (6,))
    plain, smoothed = (objective_terms(objective, model, x, x_adv, y, label_smoothing=s) for s in (0.0, 0.4))
    log_p = F.log_softmax(model(x if objective in ("natural", "trades") else x_adv), -1)
    target = 0.6 * F.one_hot(y, 10).double() + 0.04
    added = -(target * log_p).sum(-1).mean() + log_p[torch.arange(6), y].mean()
    name = "natural_loss" if objective in ("natural", "trades") else "robust_loss"
    torch.testing.assert_close(smoothed[name] - plain[name], added)
    assert all(torch.equal(smoothed[other], plain[other]) for other in plain if other != name)


def test_smoothing_changes_the_loss_of_a_run_and_not_its_attack(build, make_trainer, digits):
    found = []
    for smoothing in (0.0, 0.4):
        options = OPTIONS | {"adversary": "pgd", "max_steps": 1, "label_smoothing_factor": smoothing}
        trainer = make_trainer(build("vit"), target_sparsity=0.0, **options)
        batch = digits.train.__getitems__(range(8))
        attacked = trainer.adversary.attack(trainer.model, batch["pixel_values"], batch["labels"], 0, 0, 1)
        trainer.train()
        (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
        found.append((attacked, entry["natural_loss"], entry["robust_loss"]))
    assert torch.equal(found[0][0], found[1][0]) and found[0][2] == found[1][2] and found[0][1] != found[1][1]


def test_a_linear_schedule_with_warmup_is_one_cycle(build, make_trainer, watcher):
    """Torch's own, as far as it begins at 0 and ends there, and with a constant momentum."""
    rates = []
    options = {"lr_scheduler_type": "linear", "warmup_steps": 0.3, "max_steps": 40, "learning_rate": 0.2}
    options |= {"objective": "natural", "adversary": "none", "target_sparsity": 0.0, "logging_steps": 1}
    trainer = make_trainer(build("vit"), num_train_epochs=1, **options)
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.2)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.2, total_steps=41, pct_start=13 / 41, anneal_strategy="linear", cycle_momentum=False,
        div_factor=1e12, final_div_factor=1e12,
    )  # fmt: skip
    expected = []
    for _ in range(40):
        expected.append(cycle.get_last_lr()[0])
        optimizer.step(), cycle.step()
    assert len(rates) == 40 and rates == pytest.approx(expected, abs=1e-9)
    assert max(rates) == pytest.approx(0.2) and rates.index(max(rates)) == 12


def test_the_best_average_is_chosen_by_attack_while_pruning_fine_tunes(build, make_trainer, watcher):
    """
    Candidates are the evaluations from the end of the schedule on. What is loaded is the average with its own
    batch-norm statistics and the masks of that step, though the run went on and exchanged weights.
    """
    averages, masks = {}, {}

    def look(event, state, model):
        average = trainer.compressor.average
        averages[state.global_step] = {name: tensor.clone() for name, tensor in average.tensors.items()}
        masks[state.global_step] = trainer.compressor.pruner.masks

    options = OPTIONS | {"ema_decay": 0.9, "adversary": "pgd", "pruning_start": 0.0, "pruning_end": 0.25}
    options |= {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "robust_accuracy"}
    options |= {"regrow_fraction": 0.5, "regrow_interval": 3, "learning_rate": 3e-2}
    trainer = make_trainer(build("resnet"), callbacks=[watcher(look)], compute_metrics=never_collapsed, **options)
    trainer.train()
    logged = {e["step"]: e["eval_robust_accuracy"] for e in trainer.state.log_history if "eval_robust_accuracy" in e}
    candidates = {step: value for step, value in logged.items() if step >= 4}
    best = trainer.state.best_global_step
    assert candidates[best] == max(candidates.values()) == trainer.state.best_metric
    state, average = trainer.model.state_dict(), averages[best]
    assert [name for name in average if not torch.equal(state[name], average[name])] == []
    assert any("running_mean" in name for name in average)
    for name, mask in masks[best].items():
        assert (state[name][~mask] == 0).all()
    assert trainer.evaluate()["eval_robust_accuracy"] == pytest.approx(trainer.state.best_metric)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"adversary": "mixed", "attack_step_size": 0.1},
            "attack_step_size=0.1 has no effect without an adversary with",
        ),
        ({"adversary": "mixed", "attack_steps": 3}, "attack_steps=3 has no effect"),
        ({"natural_fraction": 0.5, "objective": "natural"}, "natural_fraction=0.5 has no effect without an objective"),
        ({"natural_fraction": 0.5, "epsilon_warmup": 0.6}, "are more than all of training"),
        ({"natural_fraction": 1.1}, "natural_fraction=1.1 is outside"),
    ],
)
def test_wrong_options(options, message, make_config):
    with pytest.raises(ValueError, match=message):
        make_config(**options)
