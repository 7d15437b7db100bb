"""Accuracies for `Trainer.evaluate`, from the pair (clean, adversarial) logits."""

from __future__ import annotations

from collections.abc import Callable

from transformers import EvalPrediction


def robust_accuracy_metrics(extra: Callable[[EvalPrediction], dict] | None = None) -> Callable[[EvalPrediction], dict]:
    """
    A `compute_metrics` that gives {"accuracy", "robust_accuracy"} (fractions), plus what `extra` gives.

    Predictions are the pair (clean, adversarial) logits (n, k), or the clean logits alone when evaluation does not
    attack. Robust accuracy counts an image only if it is classified correctly both clean and attacked.
    """

    def compute(prediction: EvalPrediction) -> dict:
        attacked = isinstance(prediction.predictions, tuple)
        clean, *adversarial = prediction.predictions if attacked else (prediction.predictions,)
        right = clean.argmax(-1) == prediction.label_ids
        metrics = {"accuracy": float(right.mean())}
        if adversarial:
            metrics["robust_accuracy"] = float((right & (adversarial[0].argmax(-1) == prediction.label_ids)).mean())
        return metrics | (extra(prediction) if extra is not None else {})

    return compute
