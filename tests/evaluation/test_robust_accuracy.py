"""The metric as a class, as a file, as a folder, in parts; figures against counting."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.processes import run_python


evaluate = pytest.importorskip("evaluate", reason="evaluate is not installed (tscnc-hf[eval])")

from tscnc_hf.evaluation import robust_accuracy  # noqa: E402


GIVEN = {
    "predictions": [0, 1, 1, 3, 4, 0],
    "adversarial_predictions": [0, 0, 2, 3, 1, 5],
    "references": [0, 1, 2, 3, 4, 5],
}
EXPECTED = {"accuracy": 4 / 6, "robust_accuracy": 2 / 6}  # the last is right under attack only: it does not count


def test_as_a_class_and_in_parts():
    assert robust_accuracy.RobustAccuracy().compute(**GIVEN) == pytest.approx(EXPECTED)
    metric = robust_accuracy.RobustAccuracy()
    for part in (slice(0, 4), slice(4, 6)):
        metric.add_batch(**{key: values[part] for key, values in GIVEN.items()})
    assert metric.compute() == pytest.approx(EXPECTED)


def test_as_a_space_without_this_package(tmp_path):
    """The file alone, where nobody has the package, loaded as `evaluate.load` loads a Space."""
    folder = tmp_path / "robust_accuracy"
    folder.mkdir()
    shutil.copy(Path(robust_accuracy.__file__), folder)
    code = (
        "import sys\nsys.modules['tscnc_hf'] = None\nimport evaluate\n"
        f"print(evaluate.load({str(folder)!r}).compute(**{GIVEN!r})['robust_accuracy'])"
    )
    done = run_python(["-c", code], cwd=tmp_path)
    assert float(done.stdout.split()[-1]) == pytest.approx(2 / 6)


def test_it_agrees_with_the_evaluation(robust_network, digits, as_they_are):
    from tscnc_hf import evaluate_robustness
    from tscnc_hf.evaluation.measures.examples import adversarial_examples

    data, options = digits.test.subset(range(60)), {"epsilon": 0.15, "processing_class": as_they_are}
    report = evaluate_robustness(robust_network, data, ("clean", "pgd-20"), progress=False, masking=False, **options)
    found = adversarial_examples(robust_network, data, count=report["clean"].correct, **options)
    batch = data.__getitems__(range(60))
    clean, labels = robust_network(batch["pixel_values"].float()).argmax(-1), batch["labels"]
    wrong = clean != labels  # and nobody attacks them
    result = robust_accuracy.RobustAccuracy().compute(
        predictions=torch.cat([found.labels, clean[wrong]]),
        adversarial_predictions=torch.cat([found.predictions, clean[wrong]]),
        references=torch.cat([found.labels, labels[wrong]]),
    )
    assert result["accuracy"] == report["clean"].accuracy
    assert result["robust_accuracy"] == pytest.approx(report["pgd-20"].accuracy)
