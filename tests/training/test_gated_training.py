"""Gates and the interval of CNC in training, and what is published of a gated model."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageClassification

from tests.results_page import check_results
from tscnc_hf import load_sparse
from tscnc_hf.method.constraints import condition_number_penalty
from tscnc_hf.method.matrices import weight_matrices
from tscnc_hf.method.units.gates import LIMIT, folded_gates, gate_parameters, gate_report, gated_layers
from tscnc_hf.training import compressor as compressor_module


GATES = {"tsc_on": "gates", "tsc_weight": 3.0, "gate_learning_rate": 0.5, "gate_l0": 0.01, "cnc_weight": 1e-3}
GATES |= {"objective": "pgd-at", "adversary": "pgd", "learning_rate": 5e-3, "logging_steps": 1}


def logits(model, pixels):
    with torch.no_grad():
        return model.eval()(pixels).logits


@pytest.mark.parametrize("kind", ["vit", "resnet", "timm-vit"])
def test_what_is_published_is_plain_and_gives_the_gated_logits(kind, build, make_trainer, digits, tmp_path):
    model, processor = build(kind)
    options = GATES | {"gate_learning_rate": 0.3, "num_train_epochs": 6, "output_dir": str(tmp_path / "out")}
    trainer = make_trainer((model, processor), **options)
    for parameter in gate_parameters(model):
        nn.init.uniform_(parameter, -2.3, 4.6)
    trainer.train()
    report = gate_report(model)
    assert 0 < report.closed < report.gates  # the run closed some
    opened = [entry["gates_open"] for entry in trainer.state.log_history if "gates_open" in entry]
    assert len(opened) > 10 and opened[-1] < opened[0] <= 1
    assert all(entry["tsc_loss"] > 0 for entry in trainer.state.log_history if "loss" in entry)

    trainer.save_model()
    results = trainer.test(digits.test.subset(range(16)), ("clean",))
    trainer.create_model_card()
    check_results(results)
    assert results["gates"]["closed"] == report.closed
    assert json.loads((tmp_path / "out" / "results.json").read_text())["gates"]["gates"] == report.gates
    assert len(gated_layers(model)) == len(report.rows)  # the trainer's own model keeps them
    published = load_file(tmp_path / "out" / "model.safetensors")
    assert not [name for name in published if "gate" in name]
    x = torch.randn(4, 3, 8, 8)
    expected = logits(model, x)
    for loaded in (AutoModelForImageClassification.from_pretrained(tmp_path / "out"), load_sparse(tmp_path / "out")):
        torch.testing.assert_close(logits(loaded, x), expected, rtol=0, atol=1e-5)
    zeros = sum(int((record.weight == 0).sum()) for record in weight_matrices(loaded))
    assert (
        results["sparsity"]["zeros"] == zeros > trainer.compressor.pruner.pruned_count
    )  # closed channels are zeros too


def test_a_checkpoint_too_gives_the_gated_logits_to_whoever_loads_it(build, make_trainer, tmp_path):
    model, processor = build("vit")
    options = GATES | {"save_strategy": "epoch", "num_train_epochs": 2, "output_dir": str(tmp_path / "out")}
    make_trainer((model, processor), **options).train()
    checkpoint = max((tmp_path / "out").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    x = torch.randn(4, 3, 8, 8)
    loaded = AutoModelForImageClassification.from_pretrained(checkpoint)
    torch.testing.assert_close(logits(loaded, x), logits(model, x), rtol=0, atol=1e-5)
    state = load_file(Path(checkpoint) / "tscnc_state.safetensors")
    assert {f"gate.{name}" for name in gated_layers(model)} <= state.keys()


def test_gates_have_a_learning_rate_of_their_own_and_no_decay(build, make_trainer):
    model, processor = build("vit")
    options = {"weight_decay": 0.2, "learning_rate": 1e-3, "lr_scheduler_type": "linear", "warmup_steps": 0}
    trainer = make_trainer((model, processor), **(GATES | options | {"gate_learning_rate": 0.25}))
    optimizer = trainer.create_optimizer()
    gates = {id(parameter) for parameter in gate_parameters(model)}
    (own,) = [group for group in optimizer.param_groups if {id(p) for p in group["params"]} & gates]
    assert {id(p) for p in own["params"]} == gates
    assert (own["lr"], own["weight_decay"]) == (0.25, 0)
    assert [group["lr"] for group in optimizer.param_groups if group is not own] == [1e-3] * 2
    everything = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(everything) == sorted(id(p) for p in model.parameters())
    scheduler = trainer.create_scheduler(10, optimizer)
    for _ in range(5):
        optimizer.step(), scheduler.step()
    assert own["lr"] == pytest.approx(0.125)


def test_gates_are_clamped_after_every_step(build, make_trainer, watcher):
    seen = []

    def look(event, state, model):
        seen.append(max(parameter.detach().abs().max().item() for parameter in gate_parameters(model)))

    model, processor = build("timm-vit")
    make_trainer((model, processor), callbacks=[watcher(look)], **(GATES | {"gate_learning_rate": 50.0})).train()
    assert max(seen) == pytest.approx(LIMIT) and len(seen) >= 4


def test_one_sample_a_step_and_deterministic_gates_under_attack(build, make_trainer, watcher):
    """Forwards in training mode see one sample a step, in every micro-batch; the attack sees no sample at all."""
    model, processor = build("timm-vit")
    options = GATES | {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8, "eval_strategy": "no"}
    trainer = make_trainer((model, processor), num_train_epochs=1, **options)
    uses: list[tuple[int, bool, torch.Tensor]] = []
    next(iter(gated_layers(model).values())).gate.register_forward_hook(
        lambda gate, args, value: uses.append((trainer.state.global_step, gate.training, value.detach().clone()))
    )
    trainer.train()
    steps = {step for step, _, _ in uses}
    samples = {}
    for step in steps:
        training = [value for at, mode, value in uses if at == step and mode]
        attacks = [value for at, mode, value in uses if at == step and not mode]
        assert len(training) == 2 and len(attacks) >= 2  # two micro-batches
        assert torch.equal(training[0], training[1])
        assert all(torch.equal(value, attacks[0]) for value in attacks)
        samples[step] = training[0]
    assert len(steps) > 2 and not torch.equal(samples[0], samples[1])


@pytest.mark.parametrize("interval", [1, 3])
def test_cnc_interval_pays_less_often_for_the_same_push(interval, build, make_trainer, monkeypatch):
    """The weight of each evaluation is `interval` times as large."""
    calls, original = [], compressor_module.constraint_terms

    def record(weights, scales, **options):
        calls.append(options["cnc_weight"])
        return original(weights, scales, **options)

    monkeypatch.setattr(compressor_module, "constraint_terms", record)
    options = {"objective": "natural", "adversary": "none", "tsc_weight": 0, "cnc_weight": 0.5, "target_sparsity": 0}
    options |= {"learning_rate": 0.0, "max_steps": 9, "logging_steps": 9}
    trainer = make_trainer(build("vit"), cnc_interval=interval, **options)
    value = 0.5 * condition_number_penalty(weight_matrices(trainer.model)).item()
    trainer.train()
    assert calls == pytest.approx([0.5 * interval if step % interval == 0 else 0.0 for step in range(9)])
    (logged,) = [entry["cnc_loss"] for entry in trainer.state.log_history if "cnc_loss" in entry]
    assert logged == pytest.approx(value, rel=1e-5)  # the mean over steps, not over evaluations


def test_wrong_options_are_refused(make_config, build, make_trainer):
    for options, words in (
        ({"tsc_on": "heads"}, "tsc_on='heads' is unknown; use one of weights, gates"),
        ({"cnc_form": "svd"}, "cnc_form='svd' is unknown"),
        ({"cnc_interval": 0}, "cnc_interval=0 is outside"),
        ({"gate_drop_rate": 1.0}, "gate_drop_rate=1.0 is outside"),
        ({"gate_layers": "fc2"}, "give a list"),
    ):
        with pytest.raises(ValueError, match=words):
            make_config(**options)
    with pytest.raises(ValueError, match="gate layer 'fc9' is not in ViTForImageClassification"):
        make_trainer(build("vit"), tsc_on="gates", gate_layers=["fc9"])


def test_every_evaluation_reports_the_spectrum_of_the_folded_weights(build, make_trainer):
    """Against numpy, on a model whose gates are partly closed: what would be published, not the weights as trained."""
    model, processor = build("vit")
    trainer = make_trainer((model, processor), **GATES)
    for gate in gate_parameters(model):
        gate.data[max(1, len(gate) // 4) :] = -LIMIT
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    metrics = trainer.evaluate()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    kappas, deficient = [], 0
    with folded_gates(model):
        for record in weight_matrices(model):
            for matrix in record.matrices.detach().double().numpy():
                sigma = np.linalg.svd(matrix, compute_uv=False)
                kept = sigma[sigma > 1e-6 * sigma[0]]
                kappas.append(sigma[0] / kept[-1])
                deficient += len(kept) < len(sigma)
    assert metrics["eval_rank_deficient"] == deficient > 0
    assert metrics["eval_median_effective_condition_number"] == pytest.approx(np.median(kappas), rel=1e-5)
    assert metrics["eval_max_effective_condition_number"] == pytest.approx(max(kappas), rel=1e-3)
    assert "eval_rank_deficient" in trainer.state.log_history[-1]


def test_results_and_card_tell_of_gates_and_lipschitz(build, make_trainer, digits, tmp_path):
    model, processor = build("vit")
    options = GATES | {"output_dir": str(tmp_path / "out"), "max_steps": 2}
    trainer = make_trainer((model, processor), **options)
    trainer.train()
    gate_parameters(model)[0].data[:2] = -LIMIT
    results = trainer.test(digits.test, ("clean", "pgd-2"), n=16)
    trainer.create_model_card()
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert results["lipschitz"]["n"] == 16 and 0 < results["lipschitz"]["local_median"] < math.inf
    assert f"at least {results['lipschitz']['local_median']:.4g}" in card
    assert f"{results['gates']['closed']} of {results['gates']['gates']} ended closed" in card
    assert results["gates"]["closed"] >= 2
