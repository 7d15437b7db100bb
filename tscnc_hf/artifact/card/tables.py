"""The tables of a card, and the entries of its model-index, from the reports as plain dicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult

from tscnc_hf.artifact.card.formatting import (
    attack_label,
    by_layer,
    format_bytes,
    format_kappa,
    format_number,
    format_percent,
    number,
    table_cell,
)


KAPPAS = {
    "Median effective condition number": "median_effective_condition_number",
    "Largest effective condition number": "max_effective_condition_number",
    "Median condition number": "median_condition_number",
    "Largest condition number": "max_condition_number",
}
NOT_YET = "not evaluated yet"
SHOWN_CLASSES = 20  # of more a card shows a part


def evaluation_results(
    robustness: Mapping[str, Any] | None,
    sparsity: Mapping,
    spectrum: Mapping,
    dataset: str,
    split: str,
    notes: Sequence[str] = (),
) -> list[EvalResult]:
    """The entries of model-index: one an attack and their worst case, two sparsities, two condition numbers."""
    same = dict(task_type="image-classification", task_name="Image classification")
    same |= dict(dataset_type=dataset, dataset_name=dataset, dataset_split=split)
    same |= dict(dataset_args={"notes": list(notes)}) if notes else {}
    robustness = robustness or {}
    threat, worst = robustness.get("threat_model", {}), robustness.get("worst_case")
    ball = f"{threat.get('norm', 'linf')}, epsilon {threat.get('epsilon')}"
    results = []
    for attack in [*robustness.get("attacks", ()), *([worst] if worst else [])]:
        name, args = "Clean accuracy", {"attack": attack["name"]}
        if attack["name"] != "clean":
            which = ", worst case of the attacks" if attack is worst else f" under {attack_label(attack['name'])}"
            name = f"Robust accuracy{which} ({ball})"
            args |= {**threat, **attack.get("parameters", {})}
        args |= {"n": attack["n"], "correct": attack["correct"], "interval_95": [attack["low"], attack["high"]]}
        if attack.get("balanced_accuracy") is not None:
            args["balanced_accuracy"] = attack["balanced_accuracy"]
        results.append(
            EvalResult(
                metric_type="accuracy", metric_name=name, metric_value=attack["accuracy"], metric_args=args, **same
            )
        )
    median, largest = list(KAPPAS)[:2]
    for kind, name, value in (
        ("sparsity", "Sparsity of the prunable weights", sparsity["sparsity"]),
        ("sparsity", "Sparsity of all parameters", sparsity["parameter_sparsity"]),
        ("condition_number", median, number(spectrum[KAPPAS[median]])),
        ("condition_number", largest, number(spectrum[KAPPAS[largest]])),
    ):
        if math.isfinite(value):  # the Hub reads the metadata as JSON, which has no infinity
            results.append(EvalResult(metric_type=kind, metric_name=name, metric_value=value, **same))
    return results


def results_table(
    own: Mapping[str, Any], dense: Mapping[str, Any], class_names: Sequence[str] = ()
) -> list[tuple[str, list[str]]]:
    """
    Rows of the results table: what is measured, then this model and, if it is there, the dense twin before it. Both
    are {"robustness", "sparsity", "spectrum", "lipschitz"}, None where there is no such report.
    """
    columns = [dense, own] if any(dense.values()) else [own]
    robustness = [column["robustness"] or {} for column in columns]
    by_name = [{attack["name"]: attack for attack in report.get("attacks", ())} for report in robustness]
    names = list(dict.fromkeys(name for attacks in reversed(by_name) for name in attacks)) or ["clean"]
    rows = []
    for name in names:
        label = "Clean accuracy" if name == "clean" else f"Accuracy under {attack_label(name)}"
        rows.append((label, [_accuracy(attacks.get(name)) for attacks in by_name]))
    worst = [report.get("worst_case") for report in robustness]
    if any(worst):
        rows.append(("Worst case of these attacks", [_accuracy(attack) for attack in worst]))
    for label, which in (("Balanced accuracy, clean", "clean"), ("Balanced accuracy under attack", None)):
        shown = [_of_classes(report, which) for report in robustness]
        if any(shown):
            rows.append((label, [format_percent(found["balanced_accuracy"]) if found else NOT_YET for found in shown]))
    shown = [_of_classes(report, None) for report in robustness]
    if any(shown):
        rows.append(
            ("Worst class under attack", [_worst(found, class_names) if found else NOT_YET for found in shown])
        )
    lines = [
        ("Sparsity of the prunable weights", "sparsity", lambda report: format_percent(report["sparsity"])),
        ("Sparsity of all parameters", "sparsity", lambda report: format_percent(report["parameter_sparsity"])),
        *((label, "spectrum", lambda report, key=key: format_kappa(report.get(key))) for label, key in KAPPAS.items()),
        ("Rank-deficient matrices", "spectrum", lambda r: f"{r.get('rank_deficient', 0)} of {len(r['rows'])}"),
        ("Local Lipschitz constant, median", "lipschitz", lambda r: f"at least {format_number(r['local_median'])}"),
        (
            "Product of spectral norms, log10",
            "lipschitz",
            lambda report: format_number(report["product_log10"], ".2f"),
        ),
    ]
    for label, name, text in lines:
        if name != "lipschitz" or own[name] is not None:
            rows.append((label, [NOT_YET if column[name] is None else text(column[name]) for column in columns]))
    return rows


def _of_classes(robustness: Mapping[str, Any], name: str | None) -> Mapping[str, Any] | None:
    """The result of an attack by name, None: of the strongest (all together), where classes were looked at."""
    attacks = {attack["name"]: attack for attack in robustness.get("attacks", ())}
    if name is None:
        hostile = [attack for name, attack in attacks.items() if name != "clean"]
        found = robustness.get("worst_case") or (hostile[0] if hostile else None)
    else:
        found = attacks.get(name)
    return found if found and found.get("worst_class") else None


def _worst(found: Mapping[str, Any], class_names: Sequence[str]) -> str:
    worst = found["worst_class"]
    return f"{format_percent(worst['accuracy'])} ({_class(worst['label'], class_names)}, {worst['n']} images)"


def _class(label: int | str, class_names: Sequence[str]) -> str:
    label = int(label)
    return table_cell(class_names[label]) if label < len(class_names) else f"class {label}"


def class_table(robustness: Mapping[str, Any], class_names: Sequence[str] = ()) -> tuple[list[list[str]], int]:
    """
    Rows of the table by class, the first its header: images, accuracy under each attack, and what the class is
    taken for most often after all attacks. Of many classes those that fare worst; and how many are left out.
    """
    classes, named = robustness.get("per_class") or {}, robustness.get("confusion") or {}
    names = [attack["name"] for attack in robustness["attacks"]]
    last = next((name for name in reversed(names) if name != "clean"), names[-1])
    labels = list(classes)
    if len(labels) > SHOWN_CLASSES:
        labels = sorted(labels, key=lambda label: classes[label][last] / classes[label]["n"])[:SHOWN_CLASSES]
    table = [["class", "images", *(attack_label(name) for name in names), "most often taken for"]]
    for label in labels:
        row, guesses = classes[label], named.get(label, {})
        wrong = sorted(((n, guess) for guess, n in guesses.items() if guess != label), reverse=True)
        taken = f"{_class(wrong[0][1], class_names)} ({wrong[0][0]})" if wrong else ""
        shares = [format_percent(row[name] / row["n"]) for name in names]
        table.append([_class(label, class_names), str(row["n"]), *shares, taken])
    return table if len(table) > 1 else [], len(classes) - len(labels)


def confusion_table(robustness: Mapping[str, Any], class_names: Sequence[str] = ()) -> list[list[str]]:
    """Rows true class, columns named class, after all attacks; [] of more classes than can be read."""
    counts = robustness.get("confusion") or {}
    labels = sorted({*counts, *(guess for row in counts.values() for guess in row)}, key=int)
    if not 1 < len(labels) <= SHOWN_CLASSES:
        return []
    table = [["true class", *(_class(label, class_names) for label in labels)]]
    for label in counts:
        cells = (counts[label].get(guess, 0) for guess in labels)
        table.append([_class(label, class_names), *(str(count or "") for count in cells)])
    return table


def layer_table(sparsity: Mapping[str, Any], spectrum: Mapping[str, Any]) -> list[list[str]]:
    """Rows of the per-layer table; of a layer with several matrices, the worst value of each column."""
    zeros, matrices = {row["name"]: row for row in sparsity["rows"]}, by_layer(spectrum)
    table = []
    for name in dict.fromkeys((*zeros, *matrices)):
        row, views = zeros.get(name), matrices.get(name, [])
        shape = row["shape"] if row else views[0]["shape"]
        cells = [f"`{name}`" + (f" ({len(views)} matrices)" if len(views) > 1 else ""), " × ".join(map(str, shape))]
        cells += (
            [f"{row['zeros']:,} of {row['numel']:,}", format_percent(row["sparsity"])] if row else ["", "not pruned"]
        )
        if views:
            worst = min(views, key=lambda view: view["rank"] / view["full_rank"])
            for key in ("condition_number", "effective_condition_number", "sigma_max"):
                cells.append(format_kappa(max(number(view[key]) for view in views)))
            cells += [f"{worst['rank']} of {worst['full_rank']}", str(sum(view["dead_rows"] for view in views))]
        # no line breaks inside a cell: the Hub lets a wide table scroll
        table.append([cell.replace(" ", "\N{NO-BREAK SPACE}") for cell in cells] + [""] * (9 - len(cells)))
    return table


def _accuracy(attack: Mapping[str, Any] | None) -> str:
    if attack is None:
        return NOT_YET
    low, high = format_percent(attack["low"]), format_percent(attack["high"])
    return f"{format_percent(attack['accuracy'])} ({low.removesuffix(' %')} to {high})"


def size_table(sizes: Mapping[str, int]) -> list[tuple[str, ...]]:
    """
    Rows (what, bytes) of the weight files that there are, and of the limit for one that does not compress values;
    where there is a dense file each has its share of it, too.
    """
    names = {
        "dense_bytes": "dense, `model.safetensors`",
        "sparse_bytes": "packed, `model.sparse.safetensors`",
        "limit_bytes": "zeros' places at their entropy, values stored raw",
    }
    dense = sizes.get("dense_bytes")
    there = {what: sizes[key] for key, what in names.items() if key in sizes}
    return [(what, format_bytes(n), *([f"{100 * n / dense:.1f} %"] if dense else [])) for what, n in there.items()]
