"""What an evaluation found: accuracies with intervals, per class, the worst case, and what it was measured with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from tscnc_hf.artifact.card.formatting import class_name, collapse_text, table_cell
from tscnc_hf.evaluation.measures.classes import FEW, Confusion, balanced_accuracy, worst_class


MASKED = "The model may only hide its gradients: do not trust its accuracy under attack."


def wilson_interval(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927): fractions in [0, 1], which none and all of n reach."""
    p, zz = correct / n, z * z
    centre = (p + zz / (2 * n)) / (1 + zz / n)
    half = z / (1 + zz / n) * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return 0.0 if correct == 0 else low, 1.0 if correct == n else high  # but for rounding they are


@dataclass(frozen=True)
class AttackResult:
    """
    Accuracy under one attack: correct of n, and its 95 % Wilson interval [low, high] (fractions).

    Attributes:
        balanced_accuracy: the mean of the classes' accuracies; None where classes were not looked at.
        worst_class: {"label", "accuracy", "n"} of the class that fares worst; likewise.
    """

    name: str
    accuracy: float
    low: float
    high: float
    correct: int
    n: int
    parameters: dict = field(default_factory=dict)
    balanced_accuracy: float | None = None
    worst_class: dict | None = None

    @classmethod
    def of_classes(cls, name: str, found: Confusion, parameters: Mapping | None = None) -> AttackResult:
        """From true class -> named class -> images."""
        correct = sum(row.get(label, 0) for label, row in found.items())
        return replace(
            cls.count(name, correct, sum(sum(row.values()) for row in found.values()), parameters),
            balanced_accuracy=balanced_accuracy(found),
            worst_class=worst_class(found),
        )

    @classmethod
    def count(cls, name: str, correct: int, n: int, parameters: Mapping | None = None) -> AttackResult:
        return cls(name, correct / n, *wilson_interval(correct, n), correct, n, dict(parameters or {}))


@dataclass(frozen=True)
class RobustnessReport:
    """
    Accuracies of one model on one data set.

    Attributes:
        threat_model: {"norm", "epsilon" (pixel units), "seed"}.
        n: number of images.
        attacks: in the order asked for. An image counts under an attack only if it is also classified correctly clean.
        versions: of the libraries that computed it.
        worst_case: images that survive every attack of the list; None with fewer than two attacks.
        per_class: label -> {"n", attack: correct, ...}.
        survived: attack -> 1 or 0 for each image, in order; left out of `to_dict`.
        masking: `MaskingReport.to_dict()` of the gradient-masking checks; None where they were switched off.
        confusion: true class -> named class -> images, after all attacks (the first wrong class that one of them
            found), or clean where there are none.
        collapsed: what `collapse` says of the clean images; {"constant": True} where all logits are the same and the
            images are of one class.
        image_size: [c, h, w] of the images, which is where the attacker acts.
        resized: `Resize.to_dict()` of what the model's preprocessing does to their size inside of what is attacked;
            None where the model gets them as they are.
    """

    threat_model: dict
    n: int
    attacks: tuple[AttackResult, ...]
    versions: dict
    worst_case: AttackResult | None = None
    per_class: dict[int, dict] = field(default_factory=dict)
    masking: dict | None = None
    survived: dict[str, tuple[int, ...]] = field(default_factory=dict, repr=False)
    confusion: dict[int, dict[int, int]] = field(default_factory=dict, repr=False)
    collapsed: dict | None = None
    image_size: list[int] | None = None
    resized: dict | None = None

    def __getitem__(self, name: str) -> AttackResult:
        if self.worst_case is not None and name == self.worst_case.name:
            return self.worst_case
        return next(attack for attack in self.attacks if attack.name == name)

    def to_dict(self) -> dict:
        """Plain JSON types; the labels of `per_class` are strings, as JSON has them."""
        plain = asdict(self) | {"attacks": [asdict(attack) for attack in self.attacks]}
        del plain["survived"]
        named = {str(label): {str(g): n for g, n in row.items()} for label, row in self.confusion.items()}
        return plain | {"per_class": {str(label): row for label, row in self.per_class.items()}, "confusion": named}

    @classmethod
    def from_dict(cls, plain: Mapping) -> RobustnessReport:
        """The report that `to_dict` made `plain` of, for instance read back from results.json."""
        worst = plain.get("worst_case")
        return cls(
            threat_model=dict(plain["threat_model"]),
            n=plain["n"],
            attacks=tuple(AttackResult(**attack) for attack in plain["attacks"]),
            versions=dict(plain["versions"]),
            worst_case=AttackResult(**worst) if worst else None,
            per_class={int(label): dict(row) for label, row in plain.get("per_class", {}).items()},
            masking=plain.get("masking"),
            confusion={
                int(label): {int(guess): n for guess, n in row.items()}
                for label, row in plain.get("confusion", {}).items()
            },
            collapsed=plain.get("collapsed"),
            image_size=plain.get("image_size"),
            resized=plain.get("resized"),
        )

    def to_markdown(self) -> str:
        lines = ["| attack | accuracy | 95 % interval | correct |", "| --- | ---: | ---: | ---: |"]
        rows = [*self.attacks, *([self.worst_case] if self.worst_case else [])]
        lines += [
            f"| {a.name} | {a.accuracy:.1%} | {a.low:.1%} to {a.high:.1%} | {a.correct} of {a.n} |" for a in rows
        ]
        if self.collapsed:
            lines = [f"**Collapsed:** {collapse_text(self.collapsed)}.", "", *lines]
        if self.masking is not None and self.masking["suspicious"]:
            odd = [check["name"] for check in self.masking["checks"] if not check["passed"]]
            lines += ["", f"**Suspicious:** gradient-masking checks failed: {', '.join(odd)}. {MASKED}"]
        return "\n".join(lines)

    def masking_markdown(self) -> str:
        """The gradient-masking checks with their figures, or why there are none."""
        if self.masking is None:
            attacked = self.threat_model["epsilon"] > 0 and any(attack.name != "clean" for attack in self.attacks)
            return "Not checked." if attacked else "Not checked: nothing was attacked."
        checks, n = self.masking["checks"], self.masking["n"]
        if n == 0:
            return f"Not run: none of the {self.masking['looked_at']} images that were drawn is classified correctly."
        lines = [] if n >= FEW else [f"On only {n} image{'s' if n > 1 else ''}: too few to tell much.", ""]
        lines += ["| gradient-masking check | figures | |", "| --- | --- | --- |"]
        for check in checks:
            figures = ", ".join(f"{name} {value:.1%}" for name, value in check["figures"].items())
            lines.append(f"| {check['question']} | {figures} | {'passed' if check['passed'] else '**failed**'} |")
        return "\n".join(lines)

    def per_class_markdown(self, class_names: Sequence[str] | None = None) -> str:
        names = [attack.name for attack in self.attacks]
        lines = ["| class | images | " + " | ".join(names) + " |", "| --- |" + " ---: |" * (len(names) + 1)]
        for label, row in self.per_class.items():
            cells = [f"{row[name] / row['n']:.1%}" for name in names]
            lines.append(f"| {table_cell(class_name(label, class_names))} | {row['n']} | " + " | ".join(cells) + " |")
        return "\n".join(lines)
