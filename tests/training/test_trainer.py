"""The trainer: what a step does, what is logged, what evaluation leaves alone, which checkpoint is best."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForImageClassification, EvalPrediction, TrainerCallback

from tscnc_hf.artifact.files.state import load_state
from tscnc_hf.data.image_datasets import ImageTensorDataset
from tscnc_hf.method.matrices import weight_matrices
from tscnc_hf.training import adversary as attacking
from tscnc_hf.training.config import TSCNCConfig
from tscnc_hf.training.metrics import Metrics, observed
from tscnc_hf.training.trainer import TSCNCTrainer


def prunable(model: nn.Module) -> dict[str, torch.Tensor]:
    """By the names in the state dict alone: matrices and filters. Tokens and positions are not called weight."""
    return {name: w for name, w in model.state_dict().items() if name.endswith(".weight") and w.ndim > 1}


def zeros(model: nn.Module) -> int:
    return sum(int((weight == 0).sum()) for weight in prunable(model).values())


def size(model: nn.Module) -> int:
    return sum(weight.numel() for weight in prunable(model).values())


def copy_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def loss_logs(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def enlarged(dataset: ImageTensorDataset, count: int) -> ImageTensorDataset:
    images = dataset.images[:count].repeat_interleave(4, 2).repeat_interleave(4, 3)
    return ImageTensorDataset(images, dataset.labels[:count], dataset.class_names)


# ---- any model, unchanged ----


@pytest.mark.parametrize("kind", ["vit", "resnet", pytest.param("convnext", marks=pytest.mark.launched), "mobilenet"])
def test_any_model_trains_to_exactly_the_sparsity_asked_for(kind, build, make_trainer, digits):
    model, processor = build(kind)
    before = copy_state(model)
    data = {"train": 64, "evaluate": 32}
    if kind == "mobilenet":
        data = {"train": enlarged(digits.train, 32), "evaluate": enlarged(digits.validation, 16)}
    trainer = make_trainer(
        (model, processor), **data, target_sparsity=0.83, per_device_train_batch_size=16, logging_steps=1
    )
    trainer.train()

    assert zeros(model) == round(0.83 * size(model))
    assert size(model) > 1000
    logs = loss_logs(trainer)
    assert len(logs) == trainer.state.max_steps
    for entry in logs:
        assert {"natural_loss", "robust_loss", "tsc_loss", "cnc_loss"} <= entry.keys()
        assert all(math.isfinite(value) for value in entry.values())
    assert logs[-1]["sparsity"] == zeros(model) / size(model)
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    still = {name for name, _ in model.named_parameters()} - set(moved)
    assert all("k_proj.bias" in name for name in still), still  # softmax does not see a key bias
    metrics = trainer.evaluate()
    assert 0 <= metrics["eval_robust_accuracy"] <= metrics["eval_accuracy"] <= 1


@pytest.mark.parametrize("scope", ["global", "uniform"])
def test_excluded_weights_stay_dense_and_layers_are_alike_under_uniform_scope(scope, build, make_trainer):
    model, processor = build("vit")
    make_trainer((model, processor), pruning_scope=scope, pruning_exclude=["classifier"]).train()
    others = {name: w for name, w in prunable(model).items() if name != "classifier.weight"}
    assert (model.classifier.weight != 0).all()
    assert sum(int((w == 0).sum()) for w in others.values()) == round(0.9 * sum(w.numel() for w in others.values()))
    shares = [float((w == 0).float().mean()) for w in others.values()]
    assert (max(shares) - min(shares) < 0.01) == (scope == "uniform")


# ---- the log ----


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"objective": "natural", "adversary": "none"}, {"natural_loss"}),
        ({"objective": "pgd-at", "adversary": "pgd"}, {"robust_loss"}),
        ({"objective": "trades", "adversary": "kl-pgd"}, {"natural_loss", "robust_loss"}),
        (
            {"objective": "trades", "adversary": "fgsm-rs", "label_smoothing_factor": 0.1},
            {"natural_loss", "robust_loss"},
        ),
    ],
)
def test_the_logged_terms_add_up_to_the_logged_loss(options, names, build, make_trainer):
    # 80 images: five micro-batches an epoch, so that the last optimizer step of an epoch has only one
    trainer = make_trainer(
        build("vit"), train=80, per_device_train_batch_size=16, gradient_accumulation_steps=2, **options
    )
    trainer.train()
    logs = loss_logs(trainer)
    assert len(logs) == 3
    names = names | {"tsc_loss", "cnc_loss"}
    for entry in logs:
        assert {name for name in entry if name.endswith("_loss")} == names
        assert sum(entry[name] for name in names) == pytest.approx(entry["loss"], rel=1e-5)
        assert all(entry[name] != 0 for name in names)


def test_a_second_training_starts_its_log_anew(build, make_trainer):
    trainer = make_trainer(build("vit"), logging_steps=3, target_sparsity=0)
    trainer.train()  # four steps: the last one is not in any log
    trainer.train()
    (entry,) = loss_logs(trainer)
    terms = sum(value for name, value in entry.items() if name.endswith("_loss"))
    assert terms == pytest.approx(entry["loss"], rel=1e-5)


def test_terms_are_those_of_plain_torch(build, make_trainer, digits):
    """One step of TRADES on a network without dropout, written out in float64."""
    model, processor = build("vit")
    trainer = make_trainer((model, processor), tsc_weight=0, cnc_weight=0, trades_beta=3.0)
    batch = digits.train.__getitems__(range(16))
    adversarial = (batch["pixel_values"] + 0.1).clamp(max=1)
    with torch.no_grad():
        model.classifier.weight.mul_(100)  # so that the divergence is no rounding error beside the cross-entropy
    trainer.attack = lambda *args: adversarial
    model.train()
    loss, outputs = trainer.compute_loss(model, dict(batch), return_outputs=True)

    twin, _ = build("vit")
    twin.load_state_dict(model.state_dict())
    twin.double()
    clean = twin(pixel_values=(batch["pixel_values"].double() - 0.5) / 0.25).logits.log_softmax(-1)
    attacked = twin(pixel_values=(adversarial.double() - 0.5) / 0.25).logits.log_softmax(-1)
    cross_entropy = -clean[range(16), batch["labels"]].mean()
    divergence = (clean.exp() * (clean - attacked)).sum(-1).mean()
    assert divergence > 0.005
    assert loss.item() == pytest.approx((cross_entropy + 3 * divergence).item(), rel=1e-4)
    assert outputs["loss"] is loss


# ---- pruning ----


def test_masks_hold_when_any_later_callback_looks_and_follow_the_schedule(build, make_trainer, watcher):
    model, processor = build("vit")
    seen = {"on_optimizer_step": [], "on_step_end": []}

    def look(event, state, given):
        assert given is model
        seen[event].append({name: w == 0 for name, w in prunable(given).items()})

    trainer = make_trainer(
        (model, processor),
        callbacks=[watcher(look, list(seen))],
        per_device_train_batch_size=8,
        optim="adamw_torch",
        learning_rate=1e-2,
        weight_decay=0.1,
        target_sparsity=0.87,
        pruning_start=0.25,
        pruning_end=0.75,
    )
    trainer.train()

    n, steps, start, end = size(model), 16, 4, 12
    for event, states in seen.items():
        assert len(states) == steps
        for step, state in enumerate(states, 1):
            progress = min(max((step - start) / (end - start), 0), 1)
            wanted = 0.87 * (1 - (1 - progress) ** 3)
            assert sum(int(zero.sum()) for zero in state.values()) == round(wanted * n), (event, step)
        assert_same(states[end - 1], states[-1])


def test_pruning_at_once_and_interval(build, make_trainer, watcher):
    for options, expected in (
        ({"pruning_start": 0.5, "pruning_end": 0.5}, [0, 0, 0, 0.9, 0.9, 0.9, 0.9, 0.9]),
        (
            {"pruning_start": 0.0, "pruning_end": 0.75, "pruning_interval": 4},
            [0, 0, 0, 0.9 * (1 - (2 / 6) ** 3), 0.9 * (1 - (2 / 6) ** 3), 0.9, 0.9, 0.9],
        ),
    ):
        model, processor = build("vit")
        counts = []
        look = watcher(lambda event, state, given, counts=counts: counts.append(zeros(given)))
        make_trainer((model, processor), callbacks=[look], per_device_train_batch_size=16, **options).train()
        assert counts == [round(share * size(model)) for share in expected]


def test_frozen_masks_keep_dead_gradients_out_of_clipping(build, make_trainer):
    model, processor = build("vit")
    norms = []

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            frozen = state.global_step >= 2
            dead = [p.grad[p == 0] for p in model.parameters() if frozen and p.ndim == 2 and (p == 0).any()]
            norms.append(float(torch.cat(dead).abs().max()) if dead else None)

    make_trainer((model, processor), callbacks=[Gradients()], pruning_start=0, pruning_end=0.5).train()
    assert norms == [None, None, 0.0, 0.0]


@pytest.mark.parametrize("way", [{}, {"pruning_latent": True}, {"pruning_criterion": "learned"}], ids=str)
def test_clipping_measures_what_is_kept(way, build, make_trainer):
    """
    In each step the gradient is as long as it may be without what is pruned, which gets the same factor, and is no
    longer either; and that norm is logged. Scores all move, and all count. Gradients before clipping are taken where
    nothing else of ours has touched them.
    """
    model, processor = build("vit")
    steps, limit = [], 0.01

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            gradients = {n: p.grad.double().clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
            steps.append((state.global_step, raw.pop(), gradients, trainer.compressor.pruner.masks))

    options = {"pruning_start": 0, "pruning_end": 0.75, "pruning_interval": 1, **way}
    options |= {"target_sparsity": 0.9, "max_grad_norm": limit, "logging_steps": 1}
    trainer = make_trainer((model, processor), callbacks=[], **options)
    trainer.callback_handler.callbacks.insert(0, Gradients())  # before latent weights take the pruned ones' place
    raw, before = [], trainer.compressor.before_clipping

    def keep(*args):
        raw.append({name: p.grad.double().clone() for name, p in trainer.model.named_parameters()})
        before(*args)

    trainer.compressor.before_clipping = keep
    trainer.train()
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(steps) == len(logged) == 4
    for (step, given, clipped, masks), said in zip(steps, logged, strict=True):
        learns = "pruning_criterion" in way and step < 3  # scores in place of the weights, all else stands still
        if learns:
            given = {name: gradient for name, gradient in given.items() if name in masks}
        assert given.keys() == clipped.keys()
        everything = {name: torch.ones_like(gradient, dtype=torch.bool) for name, gradient in given.items()}
        kept = everything if learns else everything | {name: masks[name] for name in given.keys() & masks.keys()}
        norm = float(torch.cat([gradient[kept[name]] for name, gradient in given.items()]).norm())
        assert norm > limit and said == pytest.approx(norm, rel=1e-4)
        away = float(torch.cat([gradient[~kept[name]] for name, gradient in given.items()]).norm())
        for name, gradient in given.items():
            frozen = 0.0 if step == 3 else norm / max(norm, away)  # pruned weights do not move once masks are final
            expected = gradient * limit / norm * torch.where(kept[name], 1.0, frozen)
            torch.testing.assert_close(clipped[name], expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("way", [{}, {"pruning_latent": True}], ids=str)
def test_without_clipping_the_logged_norm_is_that_of_what_is_kept(way, build, make_trainer):
    """And gradients are as they were, but for those of weights that stay zero."""
    options = {"pruning_start": 0, "pruning_end": 0.75, "pruning_interval": 1, "target_sparsity": 0.9, **way}
    trainer = make_trainer(build("vit"), max_grad_norm=0.0, logging_steps=1, **options)
    raw, before = [], trainer.compressor.before_clipping

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            masks, frozen = trainer.compressor.pruner.masks, state.global_step == 3
            kept = {name: masks.get(name, torch.ones_like(g, dtype=torch.bool)) for name, g in raw[-1].items()}
            for name, parameter in trainer.model.named_parameters():
                expected = raw[-1][name] * kept[name] if frozen else raw[-1][name]
                assert torch.equal(parameter.grad, expected), name
            norms.append(float(torch.cat([g[kept[name]].double() for name, g in raw[-1].items()]).norm()))
            whole.append(float(torch.cat([g.flatten().double() for g in raw[-1].values()]).norm()))

    def keep(*args):
        raw.append({name: p.grad.clone() for name, p in trainer.model.named_parameters()})
        before(*args)

    norms, whole, trainer.compressor.before_clipping = [], [], keep
    trainer.callback_handler.callbacks.insert(0, Gradients())
    trainer.train()
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert logged == pytest.approx(norms, rel=1e-5) and len(logged) == 4
    assert all(more > 1.05 * kept for more, kept in zip(whole[1:], norms[1:], strict=True))


@pytest.mark.parametrize("clipping", [{"max_grad_norm": 0.0}, {"max_grad_norm": 1.0}], ids=str)
@pytest.mark.parametrize("given", [{"pruning_start": 0, "pruning_end": 0.5}, {"keep_masks": True}], ids=str)
def test_frozen_masks_keep_dead_gradients_from_the_optimizer(given, clipping, build, make_trainer):
    """Adafactor has one statistic for a whole row, and one length for a whole update."""
    model, processor = build("vit")
    if "keep_masks" in given:
        with torch.no_grad():
            for record in weight_matrices(model):
                record.weight[torch.rand_like(record.weight) < 0.9] = 0.0
        given = given | {"target_sparsity": 0.0}
    dead = []

    def look(*_):
        pruner = trainer.compressor.pruner
        masks = pruner.masks if trainer.state.global_step >= 2 else {}
        dead.extend(pruner.weights[name].grad[~mask] for name, mask in masks.items())

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
            optimizer.optimizer.register_step_pre_hook(look)

    trainer = make_trainer((model, processor), callbacks=[Look()], optim="adafactor", **given, **clipping)
    trainer.train()
    assert sum(len(gradients) for gradients in dead) > 100 and not any(gradients.any() for gradients in dead)


@pytest.mark.parametrize("optim", ["schedule_free_adamw", "galore_adamw_layerwise", "adalomo"])
def test_optimizers_that_no_mask_reaches_are_refused(optim, tmp_path):
    TSCNCConfig(str(tmp_path), optim=optim, use_cpu=True)  # where nothing is pruned
    for pruned in ({"target_sparsity": 0.5}, {"keep_masks": True}):
        with pytest.raises(ValueError, match=rf"optim='{optim}' .*: use another one where weights are pruned"):
            TSCNCConfig(str(tmp_path), optim=optim, use_cpu=True, **pruned)


def test_gradients_of_pruned_weights_are_unscaled_with_the_others(build, make_trainer):
    """A gradient scaler's factor, here 8, is divided out as the others are clipped, when they are not there."""
    trainer = make_trainer(build("vit"), pruning_start=0, pruning_end=0.75, max_grad_norm=0.5)
    compressor, parameters = trainer.compressor, list(trainer.model.parameters())
    compressor.pruner.update(0.5)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    expected = [parameter.grad.double().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad.mul_(8.0)
    compressor.before_clipping(0, 4)
    for parameter in parameters:
        parameter.grad.div_(8.0)
    norm = torch.nn.utils.clip_grad_norm_(parameters, 0.5)
    compressor.after_clipping(norm, 8.0)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad.double(), gradient * 0.5 / float(norm), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("objective", ["trades", "pgd-at"])
def test_attacks_do_not_count_in_batch_norm(objective, build, make_trainer):
    """One forward a step trains, however many the adversary needs."""
    model, processor = build("resnet")
    make_trainer((model, processor), objective=objective, attack_steps=3).train()
    counts = {int(m.num_batches_tracked) for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    assert counts == {4}


# ---- gradient accumulation, weight decay ----


@pytest.mark.parametrize(("train", "steps"), [(48, 3), (40, 3)], ids=["whole steps", "a last step of one micro-batch"])
@pytest.mark.parametrize("kind", ["vit", "timm-vit"])
def test_one_batch_of_16_equals_two_of_8(kind, train, steps, build, make_trainer):
    """With SGD and no clipping, so that a wrong factor of the gradient shows."""
    states = []
    for size, accumulation in ((16, 1), (8, 2)):
        model, processor = build(kind)
        start = copy_state(model)
        trainer = make_trainer(
            (model, processor),
            train=train,
            num_train_epochs=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            objective="natural",
            adversary="none",
            target_sparsity=0,
            optim="sgd",
            learning_rate=0.1,
            lr_scheduler_type="constant",
            max_grad_norm=0,
            tsc_weight=1e-3,
            cnc_weight=1e-2,
        )
        trainer.train()
        assert trainer.state.global_step == steps
        states.append(copy_state(model))
    assert max((states[0][name] - start[name]).abs().max() for name in start) > 1e-2
    for name in start:
        assert torch.allclose(states[0][name], states[1][name], rtol=0, atol=1e-5), name


@pytest.mark.parametrize("kind", ["vit", "resnet", "convnext"])
def test_only_weights_of_layers_decay(kind, build, make_trainer):
    model, processor = build(kind)
    head = "fc" if kind == "resnet" else "classifier"
    trainer = make_trainer((model, processor), weight_decay=0.3, pruning_exclude=[head])
    optimizer = trainer.create_optimizer()
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    names = dict(model.named_parameters())
    assert set(decay) == {id(p) for p in names.values()}
    decayed = {name for name, p in names.items() if decay[id(p)] == 0.3}
    layers = {name for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    assert decayed == {f"{name}.weight" for name in layers}
    assert len(layers) > 5
    assert all(decay[id(p)] == 0 for name, p in names.items() if name not in decayed)
    if kind == "vit":
        assert {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"} <= set(names) - decayed


# ---- the adversary's randomness and radius ----


@pytest.fixture
def crafted(monkeypatch):
    """One (key and places of the noise, epsilon, largest perturbation) per attack of training."""
    calls, craft = [], attacking.craft

    def record(adversary, logits_fn, x, y, *, epsilon, generator, **options):
        x_adv = craft(adversary, logits_fn, x, y, epsilon=epsilon, generator=generator, **options)
        noise = {(*generator.key, place) for place in range(generator.first, generator.first + len(x))}
        calls.append((noise, epsilon, float((x_adv - x).abs().max())))
        return x_adv

    monkeypatch.setattr(attacking, "craft", record)
    return calls


def test_every_image_has_noise_of_its_own_and_the_same_in_every_run(crafted, build, make_trainer, monkeypatch):
    options = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "objective": "pgd-at"}
    options |= {"adversary": "pgd", "num_train_epochs": 1}

    def run(**more):
        crafted.clear()
        make_trainer(build("vit"), **options, **more).train()
        return set.union(*(noise for noise, _, _ in crafted))

    first = run()
    assert len(first) == 64 and len(crafted) == 8
    assert {place for *_, place in first} == set(range(16))
    assert run() == first
    assert not run(seed=1) & first
    monkeypatch.setattr(TSCNCTrainer, "_place", as_of_two_processes(TSCNCTrainer._place))
    both = []
    for rank in range(2):
        monkeypatch.setattr(TSCNCConfig, "process_index", property(lambda self, rank=rank: rank))
        both.append(run())
    assert len(both[0]) == len(both[1]) == 64 and not both[0] & both[1]
    assert {place for noise in both for *_, place in noise} == set(range(32))


def as_of_two_processes(place):
    """Only there: the rest of a trainer would wait for the other process."""

    def placed(self, *args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TSCNCConfig, "world_size", property(lambda self: 2))
            return place(self, *args)

    return placed


def test_same_key_same_adversarial_images(build, make_trainer, digits):
    model, processor = build("vit")
    trainer = make_trainer((model, processor), adversary="pgd", objective="pgd-at")
    batch = digits.validation.__getitems__(range(8))
    x, y = batch["pixel_values"], batch["labels"]

    def attack(step, micro_batch):
        trainer.state.global_step, trainer._micro_batch = step, micro_batch
        return trainer.attack(model, x, y)

    model.train()
    reference = attack(3, 1)
    torch.rand(5)
    assert torch.equal(attack(3, 1), reference)
    assert not torch.equal(attack(4, 1), reference)
    assert not torch.equal(attack(3, 0), reference)
    assert model.training and all(p.grad is None for p in model.parameters())


def test_epsilon_grows_linearly_over_its_share_of_training(crafted, build, make_trainer):
    options = {"adversary": "pgd", "objective": "pgd-at", "per_device_train_batch_size": 16, "epsilon": "8/255"}
    make_trainer(build("vit"), **options, epsilon_warmup=0.5, attack_step_size="8/255").train()
    radii = [8 / 255 * share for share in (1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1, 1)]
    assert [epsilon for _, epsilon, _ in crafted] == pytest.approx(radii)
    assert [largest for _, _, largest in crafted] == pytest.approx(radii, abs=1e-6)


def test_a_step_size_grows_with_epsilon(build, make_trainer, monkeypatch):
    sizes, craft = [], attacking.craft

    def record(*args, epsilon, step_size, **options):
        sizes.append((epsilon, step_size))
        return craft(*args, epsilon=epsilon, step_size=step_size, **options)

    monkeypatch.setattr(attacking, "craft", record)
    options = {"adversary": "pgd", "objective": "pgd-at", "per_device_train_batch_size": 16, "epsilon": "8/255"}
    make_trainer(build("vit"), **options, epsilon_warmup=0.5, attack_step_size="2/255").train()
    assert [size / epsilon for epsilon, size in sizes] == pytest.approx([0.25] * 8)
    assert sizes[0][1] == pytest.approx(0.5 / 255) and sizes[-1][1] == pytest.approx(2 / 255)


# ---- evaluation ----


class Events(TrainerCallback):
    def __init__(self):
        self.metrics = []

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.metrics.append(dict(metrics))


def test_clean_and_robust_accuracy_arrive_together_and_repeat(build, make_trainer):
    events = Events()
    trainer = make_trainer(build("vit", dropout=0.3), evaluate=140, callbacks=[events], eval_strategy="epoch")
    trainer.train()
    assert len(events.metrics) == 2
    entries = [entry for entry in trainer.state.log_history if any(key.startswith("eval_") for key in entry)]
    assert len(entries) == 2
    for metrics in events.metrics + entries:
        assert 0 <= metrics["eval_robust_accuracy"] <= metrics["eval_accuracy"] <= 1

    first, second = (trainer.evaluate() for _ in range(2))
    timing = ("_runtime", "_per_second")
    assert {k: v for k, v in first.items() if not k.endswith(timing)} == {
        k: v for k, v in second.items() if not k.endswith(timing)
    }
    assert first["eval_accuracy"] == events.metrics[-1]["eval_accuracy"]


def test_robust_accuracy_in_numbers():
    """Of four images: right and robust, right and broken, wrong and still wrong, wrong but right when attacked."""
    clean = np.array([[2.0, 1.0], [2.0, 1.0], [1.0, 2.0], [1.0, 2.0]])
    adversarial = np.array([[2.0, 1.0], [1.0, 2.0], [1.0, 2.0], [2.0, 1.0]])
    y = torch.zeros(4, dtype=torch.int64)
    for logits, expected in (
        ((clean, adversarial), {"accuracy": 0.5, "robust_accuracy": 0.25}),
        ((clean,), {"accuracy": 0.5}),
    ):
        predictions = observed([torch.from_numpy(part) for part in logits], y)
        found = Metrics()(EvalPrediction(predictions=predictions, label_ids=y.numpy()))
        assert {name: value for name, value in found.items() if name in ("accuracy", "robust_accuracy")} == expected


def test_every_evaluation_makes_the_same_adversarial_images(build, make_trainer):
    logits = []
    trainer = make_trainer(
        build("vit"),
        compute_metrics=lambda given: logits.append(given.predictions) or {},
        per_device_eval_batch_size=8,
    )
    trainer.evaluate()
    trainer.evaluate()
    clean, adversarial, clean_again, adversarial_again = logits
    assert np.array_equal(clean, clean_again) and np.array_equal(adversarial, adversarial_again)


def test_robust_accuracy_counts_images_that_are_right_clean_and_attacked(build, make_trainer, digits):
    """Counted again from the predictions; the adversarial logits come from pixels inside the ball."""
    model, processor = build("vit")
    trainer = make_trainer((model, processor), evaluate=140, epsilon=0.15, num_train_epochs=20, target_sparsity=0)
    trainer.train()
    output = trainer.predict(digits.validation)
    clean, adversarial = output.predictions, output.adversarial_predictions
    right, survived = clean.argmax(-1) == output.label_ids, adversarial.argmax(-1) == output.label_ids
    assert output.metrics["test_accuracy"] == pytest.approx(right.mean())
    assert output.metrics["test_robust_accuracy"] == pytest.approx((right & survived).mean())
    assert 0 < output.metrics["test_robust_accuracy"] < output.metrics["test_accuracy"]
    pixels = torch.stack([item["pixel_values"] for item in digits.validation])
    with torch.no_grad():
        own = model.eval()(pixel_values=(pixels - 0.5) / 0.25).logits
    assert np.abs(own.numpy() - clean).max() < 1e-4
    log_p = torch.log_softmax(torch.from_numpy(np.stack([clean, adversarial])), -1)
    losses = -log_p[:, torch.arange(len(right)), torch.from_numpy(output.label_ids)]
    assert (losses[1] > losses[0])[right].float().mean() > 0.95
    assert np.array_equal(clean[~right], adversarial[~right])  # what is wrong already is not attacked


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_evaluation_leaves_random_state_statistics_and_gradients_alone(kind, build, make_trainer):
    model, processor = build(kind, dropout=0.3)
    trainer = make_trainer((model, processor))
    model.train()
    before, random = copy_state(model), torch.random.get_rng_state()
    trainer.evaluate()
    assert torch.equal(torch.random.get_rng_state(), random)
    assert_same(copy_state(model), before)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_training_does_not_notice_being_evaluated(kind, build, make_trainer):
    states = []
    for strategy in ("no", "steps"):
        model, processor = build(kind, dropout=0.3)
        trainer = make_trainer((model, processor), eval_strategy=strategy, eval_steps=1)
        trainer.train()
        states.append(copy_state(model))
        evaluations = sum("eval_accuracy" in entry for entry in trainer.state.log_history)
        assert evaluations == (4 if strategy == "steps" else 0)
    assert_same(*states)


def test_no_attack_in_evaluation_leaves_robust_accuracy_out(build, make_trainer):
    metrics = make_trainer(build("vit"), eval_attack_steps=0).evaluate()
    assert "eval_accuracy" in metrics and "eval_robust_accuracy" not in metrics


def test_metrics_of_the_user_are_added(build, make_trainer):
    given = []

    def own(prediction: EvalPrediction) -> dict:
        given.append(prediction)
        return {"answer": 42}

    metrics = make_trainer(build("vit"), compute_metrics=own).evaluate()
    assert metrics["eval_answer"] == 42 and {"eval_accuracy", "eval_robust_accuracy"} <= metrics.keys()
    clean, adversarial = (prediction.predictions for prediction in given)
    assert metrics["eval_robust_answer"] == 42
    assert clean.shape == adversarial.shape == (32, 10) and not np.array_equal(clean, adversarial)


# ---- the best checkpoint ----


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_the_best_checkpoint_has_the_sparsity_asked_for_and_comes_back_whole(kind, build, make_trainer):
    # of a trial before training, then of clean and of adversarial images in turn
    scores = iter([0, 0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.4, 0.5, 0.5, 0.6, 0.6, 0.4])
    model, processor = build(kind)
    trainer = make_trainer(
        (model, processor),
        # six steps make no network that tells ten classes apart
        compute_metrics=lambda prediction: {"score": next(scores), "collapsed": 0.0},
        max_steps=6,
        pruning_start=0.0,
        pruning_end=0.66,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="robust_score",
        learning_rate=1e-2,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-5")
    assert trainer.state.best_metric == 0.6
    stock = AutoModelForImageClassification.from_pretrained(trainer.state.best_model_checkpoint)
    assert_same(copy_state(model), stock.state_dict())
    last = AutoModelForImageClassification.from_pretrained(trainer.state.best_model_checkpoint[:-1] + "6")
    assert any(not torch.equal(last.state_dict()[name], value) for name, value in model.state_dict().items())
    assert zeros(model) == round(0.9 * size(model))

    trainer.compressor.pruner.update(0.5)
    trainer._load_best_model()
    for name, mask in trainer.compressor.pruner.masks.items():
        assert torch.equal(mask, prunable(model)[name] != 0)
    stored, _ = load_state(f"{trainer.state.best_model_checkpoint}/tscnc_state.safetensors")
    assert {f"mask.{name}" for name in trainer.compressor.pruner.masks} <= stored.keys()


def test_without_a_checkpoint_at_the_target_none_is_best(build, make_trainer):
    trainer = make_trainer(
        build("vit"), eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        metric_for_best_model="robust_accuracy", pruning_end=1.0,
    )  # fmt: skip
    look = trainer._determine_best_metric
    best = []
    trainer._determine_best_metric = lambda metrics, trial: best.append(look(metrics, trial)) or best[-1]
    trainer.train()
    assert best == [False, False, False, True]
    assert trainer.state.best_global_step == 4


# ---- broken runs ----


def poison(step):
    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == step:
                with torch.no_grad():
                    model.classifier.weight[0, 0] = float("nan")

    return Poison()


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_checkpoint(build, make_trainer, tmp_path):
    trainer = make_trainer(build("vit"), callbacks=[poison(3)], save_strategy="steps", save_steps=2)
    with pytest.raises(FloatingPointError, match="natural_loss = nan.*after step 3.*checkpoint-2"):
        trainer.train()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["checkpoint-2"]
    stock = AutoModelForImageClassification.from_pretrained(tmp_path / "out" / "checkpoint-2")
    assert all(torch.isfinite(p).all() for p in stock.parameters())
    again = make_trainer(build("vit", seed=1), save_strategy="no")
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert again.state.global_step == 4


def test_weights_that_are_not_finite_are_never_saved(build, make_trainer, tmp_path):
    trainer = make_trainer(build("vit"), callbacks=[poison(3)], save_strategy="steps", save_steps=1)
    with pytest.raises(FloatingPointError, match=r"classifier\.weight is not finite after step 3.*checkpoint-2"):
        trainer.train()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["checkpoint-1", "checkpoint-2"]


def test_only_the_broken_term_is_named(build, make_trainer):
    trainer = make_trainer(build("vit"), tsc_weight=1e39)  # more than float32 holds
    with pytest.raises(FloatingPointError, match="tsc_loss = inf after step 0.*no checkpoint had been") as caught:
        trainer.train()
    assert "natural_loss" not in str(caught.value) and "cnc_loss" not in str(caught.value)


# ---- a model by name ----


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_model_given_as_a_folder_comes_with_its_processor(kind, build, make_config, digits, tmp_path):
    model, processor = build(kind)
    if kind == "vit":
        processor.image_mean, processor.image_std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    trainer = TSCNCTrainer(str(tmp_path / "model"), make_config(), train_dataset=digits.train.subset(range(32)))
    assert_same(copy_state(trainer.model), copy_state(model))
    assert trainer.adversary.preprocessing.mean == ([0.1, 0.2, 0.3] if kind == "vit" else [0.5] * 3)
    assert trainer.adversary.preprocessing.std == ([0.4, 0.5, 0.6] if kind == "vit" else [0.25] * 3)
    assert trainer.processing_class is not None
    trainer.train()
    assert zeros(trainer.model) == round(0.9 * size(trainer.model))


def test_an_l2_run_with_mart_attacks_and_tests_in_l2(build, make_trainer, digits):
    """An L2 radius above 1 trains, evaluates and ends in figures that say so."""
    options = {"objective": "mart", "adversary": "cw-pgd", "norm": "l2", "epsilon": 1.5, "max_steps": 2}
    trainer = make_trainer(build("resnet"), logging_steps=1, **options)
    trainer.train()
    assert {"robust_loss", "consistency_loss"} <= trainer.state.log_history[0].keys()
    x = torch.stack([digits.test[index]["pixel_values"] for index in range(8)])
    y = torch.tensor([int(digits.test[index]["labels"]) for index in range(8)])
    moved = (trainer.attack(trainer.model, x, y) - x).flatten(1).norm(dim=1)
    assert 1 < moved.max() <= 1.5 + 1e-5
    results = trainer.test(digits.test, ("clean", "pgd-2"), n=8)
    assert results["robustness"]["threat_model"]["norm"] == "l2" and "lipschitz" not in results


@pytest.mark.parametrize("adversary", ["pgd", "kl-pgd"])
def test_folding_batch_norms_changes_no_adversarial_image(adversary, build, make_trainer, digits):
    """Also after the weights and statistics have moved on, and under mixed precision."""
    batch = digits.validation.__getitems__(range(16))
    x, y = batch["pixel_values"].float(), batch["labels"]
    images = {}
    for fold in (True, False):
        trainer = make_trainer(build("resnet"), adversary=adversary, attack_steps=2, fold_batch_norm=fold)
        trainer.train()
        images[fold] = trainer.attack(trainer.model, x, y)
        assert bool(trainer.adversary._folded) is fold
        with torch.autocast("cpu", torch.bfloat16):
            assert (trainer.attack(trainer.model, x, y) - x).abs().max() <= 0.1 + 1e-6
    # where a gradient is all rounding its sign may differ
    assert ((images[True] - images[False]).abs() < 1e-5).double().mean() > 0.99


def test_a_second_training_begins_anew(build, make_trainer, digits, tmp_path, caplog):
    """Masks, moments and figures of the first one are gone, and it says so."""
    options = {"pruning_schedule": "linear", "logging_steps": 1, "max_steps": 8, "optim": "adamw_torch"}
    trainer = make_trainer(build("vit"), **options)
    trainer.train()
    trainer.test(digits.test, ("clean", "pgd-1"), n=8)
    trainer.save_model()
    page = [tmp_path / "out" / name for name in ("results.json", "figures/security_curve.png")]
    assert all(path.is_file() for path in page)
    model = copy.deepcopy(trainer.model)
    trainer.args.max_steps = 10
    trainer.train_dataset = digits.train.subset(range(40))
    with caplog.at_level("WARNING"):
        trainer.train()
    assert "Training begins anew: the" in caplog.text
    trainer.save_model()
    assert not any(path.exists() for path in page)
    sparsity = [log["sparsity"] for log in trainer.state.log_history if "sparsity" in log]
    assert sparsity == sorted(sparsity) and sparsity[:2] == [0, 0] and trainer.masks_frozen()
    fresh = make_trainer((model, build("vit")[1]), train=trainer.train_dataset, output_dir=str(tmp_path / "b"),
                         **(options | {"max_steps": 10}))  # fmt: skip
    fresh.train()
    assert [log["sparsity"] for log in fresh.state.log_history if "sparsity" in log] == sparsity
    moments = [state["step"].item() for state in trainer.optimizer.state.values()]
    assert max(moments) == 10


@pytest.mark.parametrize(
    "way",
    [
        {},
        {"pruning_criterion": "learned", "teacher": "dense", "distill_weight": 1.0},
        {"ema_decay": 0.5, "pruning_criterion": "taylor", "regrow_fraction": 0.4, "regrow_interval": 1},
    ],
)
def test_out_of_memory_begins_anew_with_the_weights_of_the_beginning(way, build, make_trainer, monkeypatch, tmp_path):
    """As a run that had begun with the smaller batch."""
    options = {"optim": "adamw_torch", "max_steps": 6, "logging_steps": 1, "pruning_start": 0.34} | way
    options |= {"objective": "natural", "adversary": "none", "dataloader_drop_last": True}
    whole = make_trainer(build("vit"), per_device_train_batch_size=28, output_dir=str(tmp_path / "a"), **options)
    trainer = make_trainer(build("vit"), per_device_train_batch_size=32, auto_find_batch_size=True, **options)
    compute, shapes = trainer.compute_loss, []

    def out_of_memory(model, inputs, **kwargs):
        if len(inputs["labels"]) > 28 and trainer.state.global_step == 4:
            raise RuntimeError("CUDA out of memory.")
        shapes.append(len(inputs["labels"]))
        return compute(model, inputs, **kwargs)

    begun = {}

    def keep(step, max_steps, optimizer, before=trainer.compressor.before_step):
        if step == 0:
            begun[trainer._train_batch_size] = copy.deepcopy(trainer.model.state_dict())
        return before(step, max_steps, optimizer)

    monkeypatch.setattr(trainer, "compute_loss", out_of_memory)
    monkeypatch.setattr(trainer.compressor, "before_step", keep)
    trainer.train()
    first, last = begun.values()
    assert all(torch.equal(first[name], last[name]) for name in first)
    assert shapes.count(32) == 4 and len(begun) == 2
    whole.train()
    sparsities = [
        [log["sparsity"] for log in one.state.log_history if "sparsity" in log][-6:] for one in (trainer, whole)
    ]
    assert sparsities[0] == sparsities[1] and sparsities[0][0] == 0
    assert max(state["step"].item() for state in trainer.optimizer.state.values()) <= 6
