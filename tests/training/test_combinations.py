"""Ways of computing, all of the method at once, on one process: masks hold, and training is what it was without."""

import pytest
import torch

from tscnc_hf.method.adversarial.pixels import pixel_logits
from tscnc_hf.method.matrices import weight_matrices


# 30 images in micro-batches of 8, two to a step: the last step of an epoch has 14, its last micro-batch 6
EVERYTHING = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "optim": "sgd",
    "learning_rate": 0.05,
    "num_train_epochs": 3,
    "tsc_on": "gates",
    "tsc_weight": 1e-2,
    "cnc_weight": 1e-2,
    "pruning_criterion": "learned",
    "pruning_start": 0.3,
    "pruning_end": 0.7,
    "teacher": "dense",
    "distill_weight": 0.5,
    "label_smoothing_factor": 0.1,
    "ema_decay": 0.9,
    "eval_strategy": "epoch",
    "report_to": "none",
}


def train(build, make_trainer, watcher, **options):
    steps = []

    def after_step(event, state, model):
        pruner = trainer.compressor.pruner
        assert all((pruner.weights[name][~mask] == 0).all() for name, mask in pruner.masks.items())
        steps.append(pruner.pruned_count)

    trainer = make_trainer(
        build("vit"), train=30, callbacks=[watcher(after_step, ["on_optimizer_step"])], **(EVERYTHING | options)
    )
    trainer.train()
    assert len(steps) == 6 and steps[-1] == trainer.compressor.pruner.target_count(0.9)
    weights = [record.weight for record in weight_matrices(trainer.model)]
    assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in weights)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}, losses, trainer


@pytest.fixture
def plain(build, make_trainer, watcher):
    return train(build, make_trainer, watcher)


def difference(one: dict, other: dict) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_activation_checkpointing(plain, build, make_trainer, watcher):
    weights, losses, trainer = train(build, make_trainer, watcher, activation_checkpointing=True)
    assert trainer.model.is_gradient_checkpointing
    assert difference(weights, plain[0]) < 1e-6 and losses == pytest.approx(plain[1], rel=1e-5)


def test_bf16(plain, build, make_trainer, watcher):
    weights, losses, _ = train(build, make_trainer, watcher, bf16=True)
    assert losses == pytest.approx(plain[1], rel=1e-2) and losses != plain[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_of_another_dtype_get_pixels_of_it(dtype, build, make_trainer):
    plain = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10)).to(dtype)  # others cast themselves
    assert pixel_logits(plain, [0.5], [0.5])(torch.rand(2, 3, 8, 8)).shape == (2, 10)
    model, processor = build("resnet-stride-8")
    trainer = make_trainer((model.to(dtype), processor), max_steps=2, tsc_weight=0.0, target_sparsity=0.0)
    trainer.train()
    assert "eval_robust_accuracy" in trainer.evaluate()
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_rounding_the_weights_to_evaluate_is_refused(kind, make_config):
    with pytest.raises(ValueError, match=f"{kind}_full_eval rounds the weights themselves .* use {kind}=True"):
        make_config(**{f"{kind}_full_eval": True})


def test_figures_of_a_model_trained_in_bf16_are_those_of_the_saved_one(build, make_trainer, digits, tmp_path):
    """Which computes in float32; training goes on in bf16."""
    trainer = make_trainer(build("vit"), max_steps=2, bf16=True, tsc_weight=0.0, eval_attack_steps=0)
    trainer.train()
    dtypes = []
    trainer.model.classifier.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    trainer.test(digits.test, ("clean", "pgd-2"), n=8)
    assert set(dtypes) == {torch.float32}
    dtypes.clear()
    trainer.evaluate()
    assert set(dtypes) == {torch.bfloat16}


@pytest.mark.launched
def test_compiled(plain, build, make_trainer, watcher):
    weights, losses, trainer = train(
        build, make_trainer, watcher, torch_compile=True, torch_compile_backend="aot_eager"
    )
    assert type(trainer.model_wrapped).__name__ == "OptimizedModule"
    assert difference(weights, plain[0]) < 1e-5 and losses == pytest.approx(plain[1], rel=1e-5)


@pytest.mark.launched
def test_compiled_with_constraints_on_weights(build, make_trainer, watcher):
    options = {"tsc_on": "weights", "tsc_weight": 1e-5, "pruning_criterion": "magnitude", "num_train_epochs": 3}
    options |= {"regrow_fraction": 0.3, "regrow_interval": 1}
    eager = train(build, make_trainer, watcher, **options)
    compiled = train(build, make_trainer, watcher, torch_compile=True, torch_compile_backend="aot_eager", **options)
    assert difference(compiled[0], eager[0]) < 1e-5 and compiled[1] == pytest.approx(eager[1], rel=1e-5)
    assert all("tsc_loss" in entry for entry in compiled[2].state.log_history if "loss" in entry)


@pytest.mark.parametrize("options", [{"use_reentrant": True}, {"use_reentrant": False}])
def test_activation_checkpointing_with_perturbed_weights(options, build, make_trainer, watcher):
    """What is recomputed in the backward is the perturbed network, as the forward was."""
    everything = {"awp_gamma": 0.05, "gradient_accumulation_steps": 1, "tsc_on": "weights", "tsc_weight": 1e-4}
    everything |= {"pruning_criterion": "taylor", "num_train_epochs": 1, "max_steps": 6}
    plain, losses, _ = train(build, make_trainer, watcher, **everything)
    everything |= {"activation_checkpointing": True, "activation_checkpointing_kwargs": options}
    weights, again, trainer = train(build, make_trainer, watcher, **everything)
    assert trainer.model.is_gradient_checkpointing
    assert difference(weights, plain) < 1e-6 and again == pytest.approx(losses, rel=1e-5)


def test_checkpointing_of_a_timm_model_with_perturbed_weights(build, make_trainer):
    results = []
    for on in (False, True):
        model, processor = build("timm-vit")
        model.timm_model.set_grad_checkpointing(on)
        options = {"awp_gamma": 0.05, "optim": "sgd", "learning_rate": 0.1, "max_steps": 2, "target_sparsity": 0}
        make_trainer((model, processor), **options).train()
        results.append(model.state_dict())
    assert difference(*results) < 1e-6
