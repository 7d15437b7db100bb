"""What `Trainer.evaluate` reports: accuracies from the pair (clean, adversarial) logits, and condition numbers."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from transformers import EvalPrediction

from tscnc_hf.method.reports.spectrum import spectral_report
from tscnc_hf.method.units.gates import folded_gates


SPECTRAL_METRICS = ("median_effective_condition_number", "max_effective_condition_number", "rank_deficient")


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


def spectral_metrics(model: nn.Module) -> dict[str, float]:
    """Condition numbers and lost ranks of the weights as they would be published now."""
    with folded_gates(model):
        summary = spectral_report(model, method="gram").summary()
    return {name: summary[name] for name in SPECTRAL_METRICS}
