"""
Clean and robust accuracy as a metric of Hugging Face's evaluate. This one file is also what a Space holds: it imports
nothing of the package, so `evaluate.load` runs it from a folder, a file or a Space.
"""

import datasets
import evaluate
import numpy as np


DESCRIPTION = """
Accuracy on clean images, and robust accuracy: the share of images that are classified correctly both before and after
an attack. The attack is yours to choose and to report: the same metric under a weak attack looks better.
"""

INPUTS = """
Args:
    predictions: predicted classes of the clean images, int.
    adversarial_predictions: predicted classes of the attacked images, int, in the same order.
    references: true classes, int.
Returns:
    accuracy, robust_accuracy: fractions in [0, 1].
Examples:
    >>> metric = evaluate.load("robust_accuracy")
    >>> metric.compute(predictions=[0, 1, 1], adversarial_predictions=[0, 0, 2], references=[0, 1, 2])
    {'accuracy': 0.6666666666666666, 'robust_accuracy': 0.3333333333333333}
"""

CITATION = """
@inproceedings{madry2018towards,
  title     = {Towards Deep Learning Models Resistant to Adversarial Attacks},
  author    = {Madry, Aleksander and Makelov, Aleksandar and Schmidt, Ludwig and Tsipras, Dimitris and Vladu, Adrian},
  booktitle = {International Conference on Learning Representations},
  year      = {2018}
}
"""


class RobustAccuracy(evaluate.Metric):
    """`compute(predictions=, adversarial_predictions=, references=)` -> {"accuracy", "robust_accuracy"}."""

    def _info(self):
        label = datasets.Value("int64")
        columns = {"predictions": label, "adversarial_predictions": label, "references": label}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(columns),
            reference_urls=["https://arxiv.org/abs/1706.06083"],
        )

    def _compute(self, predictions, adversarial_predictions, references):
        clean = np.asarray(predictions) == np.asarray(references)
        attacked = np.asarray(adversarial_predictions) == np.asarray(references)
        return {"accuracy": float(clean.mean()), "robust_accuracy": float((clean & attacked).mean())}
