"""What `Trainer.evaluate` reports: accuracies, those of the user's own function, and condition numbers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction, TrainingArguments

from tscnc_hf.evaluation.measures.classes import balanced_accuracy, collapse, confusion, worst_class
from tscnc_hf.method.reports.spectrum import spectral_report
from tscnc_hf.method.units.gates import folded_gates


SPECTRAL_METRICS = ("median_effective_condition_number", "max_effective_condition_number", "rank_deficient")
CLEAN_METRICS = ("accuracy", "balanced_accuracy", "worst_class_accuracy", "collapsed")
ROBUST_METRICS = ("robust_accuracy", "balanced_robust_accuracy", "worst_class_robust_accuracy")
TIMES = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


class Metrics:
    """
    A `compute_metrics`: accuracies (fractions) of clean and of adversarial images, whether the network has collapsed
    (1.0 or 0.0, `collapse`), and what the user's function gives for the ones, then for the others, "robust_" before
    its names.

    Predictions are those of `observed`. With `batch_eval_metrics` the user's function gets the batches of clean
    predictions as they come, and those of adversarial ones, which are kept on the CPU, when these are over: it may add
    up what it is given in between, as such functions do.

    Args:
        extra (*optional*): the user's function.
        batches (`bool`): `batch_eval_metrics`.

    Raises:
        ValueError: `batch_eval_metrics` with a function that takes no `compute_result`.
    """

    def __init__(self, extra: Callable[..., dict] | None = None, batches: bool = False):
        if batches and extra is not None and "compute_result" not in inspect.signature(extra).parameters:
            raise ValueError(
                "batch_eval_metrics=True calls compute_metrics(prediction, compute_result=...) batch by batch, and "
                "the one given takes no compute_result: add it, or leave batch_eval_metrics out"
            )
        self.extra, self.batches = extra, batches
        self.collapsed: dict | None = None  # of the last evaluation
        self.reset()

    def reset(self) -> None:
        """Forget the batches of an evaluation that did not come to its end."""
        self._labels, self._guesses, self._kept = [], [], []

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict:
        guesses, turns = _turns(prediction)
        self._guesses.append(guesses)
        self._labels.append(_numbers(prediction.label_ids))
        found = {}
        if self.extra is not None and not self.batches:
            for prefix, turn in zip(("", "robust_"), turns, strict=False):
                found |= {f"{prefix}{name}": value for name, value in self.extra(turn).items()}
        elif self.extra is not None:
            self._kept += [_on_cpu(turn) for turn in turns[1:]]
            found = self.extra(turns[0], compute_result=compute_result) or {}
            for place, turn in enumerate(self._kept if compute_result else (), 1):
                own = self.extra(turn, compute_result=place == len(self._kept)) or {}
                if place == len(self._kept):
                    found = found | {f"robust_{name}": value for name, value in own.items()}
        if not compute_result:
            return {}
        labels = np.concatenate(self._labels)
        guesses = [np.concatenate(parts) for parts in zip(*self._guesses, strict=True)]
        self.reset()
        return self._accuracies(labels, *guesses) | found

    def _accuracies(self, labels: np.ndarray, clean: np.ndarray, attacked: np.ndarray | None = None) -> dict:
        counts = confusion(labels, clean)
        self.collapsed = collapse(counts)
        values = (clean == labels).mean(), balanced_accuracy(counts), worst_class(counts)["accuracy"]
        found = dict(zip(CLEAN_METRICS, (*values, self.collapsed is not None), strict=True))
        if attacked is not None:
            attacked = np.where(clean == labels, attacked, clean)  # robust is who is right before and after it
            counts = confusion(labels, attacked)
            values = (attacked == labels).mean(), balanced_accuracy(counts), worst_class(counts)["accuracy"]
            found |= dict(zip(ROBUST_METRICS, values, strict=True))
        return {name: float(value) for name, value in found.items()}

    def check_best(self, args: TrainingArguments, eval_dataset: Any, attacked: bool, classes: int | None) -> None:
        """
        The metric by which the best model is chosen is one that evaluations give. What the user's function gives is
        tried on invented predictions; where that does not work, any name goes.

        Raises:
            ValueError: it is none; those that there are are listed.
        """
        wanted = args.metric_for_best_model
        if wanted is None:
            return
        names = {"loss", *TIMES, *SPECTRAL_METRICS}
        if not args.prediction_loss_only:
            names |= {*CLEAN_METRICS, *(ROBUST_METRICS if attacked else ())}
        sets = [f"{name}_" for name in eval_dataset] if isinstance(eval_dataset, dict) else [""]
        if wanted.removeprefix("eval_") in {f"{part}{name}" for part in sets for name in names}:
            return
        if self.extra is not None and not args.prediction_loss_only:
            labels = np.arange(2 * (classes or 2)) % (classes or 2)
            tried = EvalPrediction(np.eye(classes or 2, dtype=np.float32)[labels], labels, None, np.zeros(len(labels)))
            try:
                own = self.extra(tried, **({"compute_result": True} if self.batches else {}))
            except Exception:  # it may want more than these are
                return
            names |= {f"{prefix}{name}" for name in own for prefix in (("", "robust_") if attacked else ("",))}
        known = sorted(f"{part}{name}" for part in sets for name in names)
        if wanted.removeprefix("eval_") in known:
            return
        why = "; nothing is attacked in evaluation (eval_attack_steps or epsilon is 0)" if "robust" in wanted else ""
        raise ValueError(
            f"metric_for_best_model={wanted!r} is no metric of an evaluation{'' if attacked else why}; there are "
            f"{', '.join(name for name in known if not name.endswith(TIMES))}"
        )


def observed(logits: Sequence[Tensor], y: Tensor | None, preprocess: Callable | None = None) -> tuple[tuple, tuple]:
    """
    What a Trainer is to gather of a batch: what our metrics need, classes (b,) and losses (b,) of adversarial images,
    and what the user's function is to get.

    Args:
        logits: (b, k), of the clean and, where they were attacked, of the adversarial images.
        y: labels (b,), None where there are none.
        preprocess (*optional*): the user's `preprocess_logits_for_metrics`, of clean and adversarial logits in turn.
    """
    ours = [part.argmax(-1) for part in logits]
    ours += [nn.functional.cross_entropy(part, y, reduction="none") for part in logits[1:]]
    return tuple(ours), tuple(part if preprocess is None else preprocess(part, y) for part in logits)


def given(predictions: Any) -> list:
    """What of gathered `observed` the user is to get: of clean and, where there are any, of adversarial images."""
    if isinstance(predictions, list):  # eval_do_concat_batches=False
        return [list(parts) for parts in zip(*(batch[1] for batch in predictions), strict=True)]
    return [] if predictions is None else list(predictions[1])


def _turns(prediction: EvalPrediction) -> tuple[list[np.ndarray], list[EvalPrediction]]:
    """The classes that are named, and the prediction that the user's function gets, clean and attacked in turn."""
    predictions = prediction.predictions
    if isinstance(predictions, list):
        ours = [np.concatenate(parts) for parts in zip(*(batch[0] for batch in predictions), strict=True)]
    else:
        ours = [_numbers(part) for part in predictions[0]]
    losses = [prediction.losses, *([] if prediction.losses is None else ours[2:]), None]
    turns = [
        EvalPrediction(one, prediction.label_ids, prediction.inputs, loss)
        for one, loss in zip(given(predictions), losses, strict=False)
    ]
    return ours[:2], turns


def _numbers(values: Any) -> np.ndarray:
    if isinstance(values, list):
        return np.concatenate([_numbers(part) for part in values])
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _on_cpu(prediction: EvalPrediction) -> EvalPrediction:
    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: moved(part) for name, part in value.items()}
        if isinstance(value, tuple | list):
            return type(value)(moved(part) for part in value)
        return value.detach().cpu() if isinstance(value, torch.Tensor) else value

    parts = prediction.predictions, prediction.label_ids, prediction.inputs, prediction.losses
    return EvalPrediction(*map(moved, parts))


def spectral_metrics(model: nn.Module) -> dict[str, float]:
    """Condition numbers and lost ranks of the weights as they would be published now."""
    with folded_gates(model):
        summary = spectral_report(model, method="gram").summary()
    return {name: summary[name] for name in SPECTRAL_METRICS}
