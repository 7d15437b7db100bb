"""What an evaluation says to people: a table for the terminal, a page of Markdown with figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tscnc_hf.artifact.card import figures
from tscnc_hf.artifact.card.formatting import (
    attack_label,
    collapse_text,
    format_number,
    format_pixels,
    resize_text,
    settings_text,
)
from tscnc_hf.artifact.card.robustness_figures import curve_figure, examples_figure
from tscnc_hf.artifact.files.atomic import atomic_file
from tscnc_hf.evaluation.measures.robustness_report import RobustnessReport


PAGE, CURVE_FIGURE, EXAMPLES_FIGURE = PAGE_FILES = (
    "robustness.md", "figures/security_curve.png", "figures/adversarial_examples.png",
)  # fmt: skip


def write_page(
    results: Mapping, folder: Path, class_names: Sequence[str] | None = None, examples: Mapping | None = None
) -> None:
    """robustness.md and its figures; `examples` as `examples_figure` takes them."""
    with atomic_file(folder / PAGE) as temporary:
        temporary.write_text(_page(results, class_names), encoding="utf-8")
    if "curve" in results:
        figures.save_figure(curve_figure(results["curve"]), folder / CURVE_FIGURE)
    if examples is not None:
        figures.save_figure(examples_figure(**examples), folder / EXAMPLES_FIGURE, photographs=True)


def _page(results: Mapping, class_names: Sequence[str] | None) -> str:
    """The tables as Markdown, with the figures beside them."""
    report = RobustnessReport.from_dict(results["robustness"])
    threat = report.threat_model
    parts = [
        f"# Robustness of {results['model']}",
        f"{report.n} {results.get('split') or 'test'} images of {results['dataset']}; {threat['norm']} "
        f"perturbations within {format_pixels(threat['epsilon'])}, seed {threat['seed']}. White-box attacks, 95 % "
        f"Wilson intervals.{_sizes(report)}",
        report.to_markdown(),
        "## Are gradients hidden?\n\n" + report.masking_markdown(),
    ]
    if "curve" in results:
        figures = "![Accuracy over the radius](figures/security_curve.png)\n\n"
        parts.append(f"## Over the radius\n\n{figures}![Examples](figures/adversarial_examples.png)")
    rows = [*report.attacks, *([report.worst_case] if report.worst_case else [])]
    shown = [f"{row.name} {row.balanced_accuracy:.1%}" for row in rows if row.balanced_accuracy is not None]
    balanced = f"Balanced accuracy, the mean of the classes': {', '.join(shown)}.\n\n" if shown else ""
    parts += [f"## By class\n\n{balanced}{report.per_class_markdown(class_names)}"]
    attacks = [attack for attack in report.attacks if attack.parameters]
    settings = "\n".join(f"* {attack_label(a.name)}: {settings_text(a.parameters)}" for a in attacks)
    parts += [f"## Settings\n\n{settings}", ", ".join(f"{name} {value}" for name, value in report.versions.items())]
    return "\n\n".join(parts) + "\n"


def _sizes(report: RobustnessReport) -> str:
    """At which size the attacker acts, as a sentence."""
    if report.image_size is None:
        return ""
    height, width = report.image_size[1:]
    resized = f", which are resized to {resize_text(report.resized)} for the model" if report.resized else ""
    return f" The attacker changes images of {height}x{width} pixels{resized}."


def comparison_table(results: Mapping[str, Mapping]) -> str:
    """A plain-text table, one column per model: accuracies with 95 % intervals, sparsity, condition numbers."""
    names = list(results)
    rows = [["", *names]]
    attacks = [attack["name"] for attack in results[names[0]]["robustness"]["attacks"]]
    for index, attack in enumerate(attacks):
        label = "clean accuracy" if attack == "clean" else f"{attack} accuracy"
        rows.append([label, *(_accuracy(results[name]["robustness"]["attacks"][index]) for name in names)])
    if all(results[name]["robustness"].get("worst_case") for name in names):
        worst = (_accuracy(results[name]["robustness"]["worst_case"]) for name in names)
        rows.append(["worst case accuracy", *worst])
    rows.append(["sparsity", *(f"{results[name]['sparsity']['sparsity']:.2%}" for name in names)])
    for which, label in (("clean", "balanced accuracy"), ("attack", "balanced accuracy, attack")):
        shown = [_balanced(results[name]["robustness"], which) for name in names]
        if all(value is not None for value in shown):
            rows.append([label, *(f"{value:.1%}" for value in shown)])
    for key, label in (
        ("median_effective_condition_number", "median effective condition number"),
        ("max_effective_condition_number", "largest effective condition number"),
        ("rank_deficient", "rank-deficient matrices"),
    ):
        rows.append([label, *(format_number(results[name]["spectrum"][key]) for name in names)])
    if all("lipschitz" in results[name] for name in names):
        medians = (results[name]["lipschitz"]["local_median"] for name in names)
        rows.append(["local Lipschitz, median", *map(format_number, medians)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(names) + 1)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    first = results[names[0]]["robustness"]
    norm = {"linf": "L-infinity", "l2": "L2"}[first["threat_model"]["norm"]]
    radius, split = format_pixels(first["threat_model"]["epsilon"]), results[names[0]].get("split") or "test"
    note = f"{first['n']} {split} images, {norm} epsilon {radius}, 95 % intervals"
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], note, *_masking_notes(results)])


def _masking_notes(results: Mapping[str, Mapping]) -> list[str]:
    """One line for each model whose accuracy under attack is not to be trusted."""
    notes = []
    for name, measured in results.items():
        if found := measured.get("collapsed"):
            notes.append(f"COLLAPSED: {name}: {collapse_text(found, found.get('emptied', ()))}")
        checks = (measured["robustness"].get("masking") or {}).get("checks", ())
        if failed := [check["name"] for check in checks if not check["passed"]]:
            notes.append(f"SUSPICIOUS: {name} failed gradient-masking checks ({', '.join(failed)}); see the card")
    return notes


def _accuracy(attack: Mapping) -> str:
    return f"{attack['accuracy']:.1%} [{attack['low']:.1%}, {attack['high']:.1%}]"


def _balanced(robustness: Mapping, which: str) -> float | None:
    """Clean, or after all attacks; None where it was not measured."""
    hostile = [attack for attack in robustness["attacks"] if attack["name"] != "clean"]
    clean = [attack for attack in robustness["attacks"] if attack["name"] == "clean"]
    worst = robustness.get("worst_case")
    found = clean if which == "clean" else [worst] if worst else hostile
    return found[0].get("balanced_accuracy") if found else None
