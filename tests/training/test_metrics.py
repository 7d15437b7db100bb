"""Metrics of evaluations: any function written for Trainer, uneven classes, collapse, names known at the start."""

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score
from torch import nn
from torch.utils.data import Dataset
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from tscnc_hf.training.metrics import CLEAN_METRICS, ROBUST_METRICS


TRAINER_LOGGER = logging.get_logger("tscnc_hf.training.trainer")
OPTIONS = {"per_device_eval_batch_size": 12, "target_sparsity": 0.0, "epsilon": 0.3}


def standard(prediction) -> dict:
    """As in every example of transformers."""
    return {"top1": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


# ---- the user's function ----


def test_a_standard_function_gets_clean_and_adversarial_predictions_in_turn(build, make_trainer):
    trainer = make_trainer(build("vit"), compute_metrics=standard, **OPTIONS)
    labels = np.array([int(item["labels"]) for item in trainer.eval_dataset])
    metrics, output = trainer.evaluate(), trainer.predict(trainer.eval_dataset)
    for prefix, predictions in (("", output.predictions), ("robust_", output.adversarial_predictions)):
        right = predictions.argmax(-1) == labels
        assert metrics[f"eval_{prefix}top1"] == output.metrics[f"test_{prefix}top1"] == pytest.approx(right.mean())
        assert metrics[f"eval_{prefix}accuracy"] == pytest.approx(right.mean())
        balanced = "balanced_accuracy" if not prefix else "balanced_robust_accuracy"
        assert metrics[f"eval_{balanced}"] == pytest.approx(balanced_accuracy_score(labels, predictions.argmax(-1)))


def test_without_an_attack_it_is_called_once(build, make_trainer):
    calls = []
    trainer = make_trainer(
        build("vit"), compute_metrics=lambda given: calls.append(given) or {}, eval_attack_steps=0, **OPTIONS
    )
    metrics = trainer.evaluate()
    assert len(calls) == 1 and not any("robust" in name for name in metrics)


@pytest.mark.parametrize("preprocess", ["argmax", "first of a tuple", "pair"])
def test_logits_are_preprocessed_in_turn(preprocess, build, make_trainer):
    functions = {
        "argmax": lambda logits, labels: logits.argmax(-1),
        "first of a tuple": lambda logits, labels: (logits[0] if isinstance(logits, tuple) else logits).argmax(-1),
        "pair": lambda logits, labels: (logits.argmax(-1), logits.max(-1).values),
    }

    def own(given) -> dict:
        guesses = given.predictions[0] if isinstance(given.predictions, tuple) else given.predictions
        assert guesses.shape == given.label_ids.shape
        return {"top1": float((guesses == given.label_ids).mean())}

    trainer = make_trainer(build("vit"), **OPTIONS)
    trainer.compute_metrics, trainer.preprocess_logits_for_metrics = own, functions[preprocess]
    metrics = trainer.evaluate()
    assert metrics["eval_top1"] == pytest.approx(metrics["eval_accuracy"])
    assert metrics["eval_robust_top1"] == pytest.approx(metrics["eval_robust_accuracy"])


class AddsUp:
    """A function for `batch_eval_metrics`, with a state that is emptied when the result is asked for."""

    def __init__(self):
        self.right = []

    def __call__(self, given, compute_result=False) -> dict:
        self.right.append((given.predictions.argmax(-1) == given.label_ids).float())
        if not compute_result:
            return {}
        right, self.right = torch.cat(self.right), []
        return {"top1": right.mean().item(), "images": len(right)}


def test_a_function_that_adds_up_batches_does_not_mix_clean_and_adversarial(build, make_trainer):
    adds_up = AddsUp()
    trainer = make_trainer(
        build("vit"), compute_metrics=lambda given, compute_result: adds_up(given, compute_result=compute_result),
        batch_eval_metrics=True, **OPTIONS,
    )  # fmt: skip
    for _ in range(2):
        metrics = trainer.evaluate()
        assert metrics["eval_images"] == metrics["eval_robust_images"] == 32
        assert metrics["eval_top1"] == pytest.approx(metrics["eval_accuracy"])
        assert metrics["eval_robust_top1"] == pytest.approx(metrics["eval_robust_accuracy"])


def test_batches_need_no_function_of_the_user_and_blame_none(build, make_trainer):
    whole = make_trainer(build("vit"), **OPTIONS).evaluate()
    parts = make_trainer(build("vit"), batch_eval_metrics=True, **OPTIONS).evaluate()
    assert all(parts[f"eval_{name}"] == whole[f"eval_{name}"] for name in (*CLEAN_METRICS, *ROBUST_METRICS))
    with pytest.raises(ValueError, match="the one given takes no compute_result"):
        make_trainer(build("vit"), compute_metrics=standard, batch_eval_metrics=True)


def test_lists_of_batches_losses_and_inputs_are_given_as_asked_for(build, make_trainer):
    def own(given) -> dict:
        assert [len(part) for part in given.predictions] == [12, 12, 8]
        return {"images": sum(map(len, given.label_ids))}

    metrics = make_trainer(build("vit"), compute_metrics=own, eval_do_concat_batches=False, **OPTIONS).evaluate()
    assert metrics["eval_images"] == metrics["eval_robust_images"] == 32 and "eval_robust_accuracy" in metrics

    def losses(given) -> dict:
        return {"mean_loss": float(np.mean(given.losses)), "pixels": float(given.inputs.mean())}

    options = OPTIONS | {"include_for_metrics": ["loss", "inputs"], "per_device_eval_batch_size": 16}
    metrics = make_trainer(build("vit"), compute_metrics=losses, **options).evaluate()
    assert metrics["eval_mean_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)
    assert metrics["eval_robust_mean_loss"] > metrics["eval_mean_loss"]
    assert metrics["eval_pixels"] == metrics["eval_robust_pixels"] > 0


def test_a_metric_of_the_library_evaluate(build, make_trainer):
    evaluate = pytest.importorskip("evaluate", reason="evaluate is not installed (tscnc-hf[eval])")
    from tscnc_hf.evaluation import robust_accuracy

    metric = evaluate.load(robust_accuracy.__file__)

    def own(given) -> dict:
        guesses = given.predictions.argmax(-1)
        found = metric.compute(predictions=guesses, adversarial_predictions=guesses, references=given.label_ids)
        return {"of_library": found["accuracy"]}

    metrics = make_trainer(build("vit"), compute_metrics=own, **OPTIONS).evaluate()
    assert metrics["eval_of_library"] == pytest.approx(metrics["eval_accuracy"])
    assert metrics["eval_robust_of_library"] == pytest.approx(metrics["eval_robust_accuracy"])


class Unlabelled(Dataset):
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, place):
        return {"pixel_values": self.data[place]["pixel_values"]}


def test_predictions_need_no_labels(build, make_trainer):
    trainer = make_trainer(build("vit"), **OPTIONS)
    labelled, output = trainer.predict(trainer.eval_dataset), trainer.predict(Unlabelled(trainer.eval_dataset))
    assert output.label_ids is None and output.adversarial_predictions is None
    assert np.array_equal(output.predictions, labelled.predictions) and "test_accuracy" not in output.metrics
    with pytest.raises(ValueError, match="neither 'labels' nor 'label'"):
        trainer.evaluate(Unlabelled(trainer.eval_dataset))


# ---- collapse ----


def test_a_collapsed_network_is_said_and_is_never_the_best(build, make_trainer, watcher):
    """Dead at first and at last, alive between: the accuracy of the dead one is made to look better."""
    model, processor = build("resnet")

    def look(event, state, model):
        if state.global_step in (1, 3):
            with torch.no_grad():
                nn.init.zeros_(model.timm_model.conv1.weight)
        elif state.global_step == 2:
            nn.init.normal_(model.timm_model.conv1.weight)
            nn.init.normal_(model.timm_model.fc.weight, std=3)

    scores = {1: 0.9, 2: 0.1, 3: 0.8}
    trainer = make_trainer(
        (model, processor), compute_metrics=lambda given: {"accuracy": scores[trainer.state.global_step]},
        callbacks=[watcher(look)], max_steps=3, eval_strategy="steps", save_strategy="steps", eval_steps=1,
        save_steps=1, load_best_model_at_end=True, metric_for_best_model="accuracy", **OPTIONS,
    )  # fmt: skip
    with CaptureLogger(TRAINER_LOGGER) as said:
        trainer.train()
    collapsed = [entry["eval_collapsed"] for entry in trainer.state.log_history if "eval_collapsed" in entry]
    assert collapsed == [1.0, 0.0, 1.0] and trainer.state.best_global_step == 2
    assert said.out.count("the network has collapsed: it names class") == 2
    assert "Weights that are zero throughout: timm_model.conv1.weight" in said.out


# ---- names ----


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("robust_acuracy", {}, "there are accuracy, balanced_accuracy, balanced_robust_accuracy"),
        ("eval_rubust_accuracy", {}, "is no metric of an evaluation"),
        ("robust_accuracy", {"eval_attack_steps": 0}, "nothing is attacked in evaluation"),
        ("balanced_robust_accuracy", {"epsilon": 0.0}, "nothing is attacked in evaluation"),
        ("robust_accuracy", {"prediction_loss_only": True}, "is no metric of an evaluation"),
        ("score", {"compute_metrics": lambda given: {"scores": 1}}, "robust_scores"),
        ("accuracy", {"evaluate": "two"}, "a_accuracy"),
        ("loss", {"evaluate": "two"}, "b_loss"),
    ],
)
def test_a_metric_that_no_evaluation_gives_is_refused_at_the_start(
    name, options, message, build, make_trainer, digits
):
    if "evaluate" in options:
        options = options | {"evaluate": {part: digits.validation.subset(range(8)) for part in "ab"}}
    with pytest.raises(ValueError, match=rf"metric_for_best_model='{name}'.*{message}"):
        make_trainer(build("vit"), metric_for_best_model=name, **options)


@pytest.mark.parametrize(
    "name, options",
    [
        ("balanced_robust_accuracy", {}),
        ("eval_worst_class_robust_accuracy", {}),
        ("loss", {"prediction_loss_only": True}),
        ("eval_a_robust_accuracy", {"evaluate": "two"}),
        ("b_loss", {"evaluate": "two"}),
        ("robust_top1", {"compute_metrics": standard}),
        ("top1", {"compute_metrics": standard, "eval_attack_steps": 0}),
        ("anything", {"compute_metrics": lambda given: 1 / 0}),
    ],
)
def test_one_that_there_is_or_may_be_is_taken(name, options, build, make_trainer, digits):
    if "evaluate" in options:
        options = options | {"evaluate": {part: digits.validation.subset(range(8)) for part in "ab"}}
    assert make_trainer(build("vit"), metric_for_best_model=name, **options).args.metric_for_best_model == name


def test_the_best_by_balanced_robust_accuracy(build, make_trainer):
    trainer = make_trainer(
        build("vit"), max_steps=2, eval_strategy="steps", save_strategy="steps", eval_steps=1, save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="balanced_robust_accuracy", **OPTIONS,
    )  # fmt: skip
    trainer.train()
    logged = {e["step"]: e for e in trainer.state.log_history if "eval_balanced_robust_accuracy" in e}
    values = [e["eval_balanced_robust_accuracy"] for e in logged.values() if not e["eval_collapsed"]]
    assert len(logged) == 2 and trainer.state.best_metric == (max(values) if values else None)


@pytest.mark.parametrize("name", ["max_effective_condition_number", "eval_rank_deficient"])
def test_of_condition_numbers_the_smaller_is_better(name, make_config):
    assert make_config(metric_for_best_model=name).greater_is_better is False
    assert make_config(metric_for_best_model=name, greater_is_better=True).greater_is_better is True
