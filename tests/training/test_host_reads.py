"""What makes the host wait for a device: reading a value, or a size that depends on values. None of it in a step."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from tscnc_hf.training.trainer import TSCNCTrainer


READS = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim", "_unique2", "allclose",
    "repeat_interleave.Tensor",
}  # fmt: skip
CASES = {
    "trades": {"objective": "trades", "adversary": "kl-pgd", "attack_steps": 2},
    "one step, averaged": {"objective": "pgd-at", "adversary": "fgsm-rs", "ema_decay": 0.9},
    "taught": {"objective": "pgd-at", "adversary": "mixed", "teacher": "dense", "distill_weight": 1.0},
    "mart": {"objective": "mart", "adversary": "pgd", "norm": "l2", "epsilon": 0.5},
    "gates": {"objective": "pgd-at", "adversary": "n-fgsm", "tsc_on": "gates"},
    "learned": {"objective": "pgd-at", "adversary": "cw-pgd", "pruning_criterion": "learned"},
    "latent, perturbed": {"objective": "trades", "adversary": "pgd", "pruning_latent": True, "awp_gamma": 0.01},
}


class Reads(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name in READS or f"{name}.{func._schema.overload_name}" in READS:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class Watch(TrainerCallback):
    """Reads in each step, from its beginning to its end, masks and averages included."""

    def __init__(self):
        self.steps = {}

    def on_step_begin(self, args, state, control, **kwargs):
        self.mode = Reads()
        self.mode.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        self.mode.__exit__(None, None, None)
        self.steps[state.global_step] = self.mode.found


class OnADevice(TSCNCTrainer):
    """Terms are checked in each step on a CPU, where it costs nothing; elsewhere when they are logged or saved."""

    def check_terms(self):
        pass


def steps_of(trainer_class, model, data, config) -> dict[int, list[str]]:
    network, processor = model
    trainer = trainer_class(network, config, train_dataset=data, processing_class=processor)
    watch = Watch()
    trainer.add_callback(watch)
    trainer.train()
    return watch.steps


# SGD: on a CPU torch's Adam reads its own step count, which it keeps on the host wherever the weights are
OPTIONS = {"max_steps": 12, "optim": "sgd", "logging_steps": 100, "pruning_interval": 6}


@pytest.mark.parametrize("case", CASES)
def test_no_step_reads_from_the_device_but_those_that_choose_masks(case, make_config, tiny_resnet, digits):
    config = make_config(**OPTIONS, pruning_start=0.0, pruning_end=0.5, **CASES[case])
    steps = steps_of(OnADevice, tiny_resnet, digits.train, config)
    assert set(steps) == set(range(1, 13))
    assert {step: found for step, found in steps.items() if found and step not in (1, 6)} == {}


@pytest.mark.parametrize("device, looks", [("cpu", 1), ("cuda", 0)])
def test_terms_are_looked_at_in_each_step_on_a_cpu_only(device, looks, make_config, tiny_resnet, digits, monkeypatch):
    model, processor = tiny_resnet
    trainer = TSCNCTrainer(model, make_config(), train_dataset=digits.train, processing_class=processor)
    seen = []
    monkeypatch.setattr(trainer, "check_terms", lambda: seen.append(1))
    monkeypatch.setattr(type(trainer.args), "device", property(lambda args: torch.device(device)))
    trainer._record({"robust_loss": torch.ones(())})
    assert len(seen) == looks


def test_a_step_that_looks_at_its_terms_is_seen(make_config, tiny_resnet, digits):
    steps = steps_of(TSCNCTrainer, tiny_resnet, digits.train, make_config(**OPTIONS))
    assert all("_local_scalar_dense" in found for found in steps.values())
