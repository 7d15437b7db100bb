"""The tables of a card, and the entries of its model-index, from the reports as plain dicts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult

from tscnc_hf.artifact.card.formatting import (
    attack_label,
    by_layer,
    format_bytes,
    format_kappa,
    format_percent,
    number,
)


KAPPAS = {
    "Median effective condition number": "median_effective_condition_number",
    "Largest effective condition number": "max_effective_condition_number",
    "Median condition number": "median_condition_number",
    "Largest condition number": "max_condition_number",
}
NOT_YET = "not evaluated yet"


def evaluation_results(
    robustness: Mapping[str, Any] | None, sparsity: Mapping, spectrum: Mapping, dataset: str, split: str
) -> list[EvalResult]:
    """The entries of model-index: one an attack and their worst case, two sparsities, two condition numbers."""
    same = dict(task_type="image-classification", task_name="Image classification")
    same |= dict(dataset_type=dataset, dataset_name=dataset, dataset_split=split)
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


def results_table(own: Mapping[str, Any], dense: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
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
    lines = [
        ("Sparsity of the prunable weights", "sparsity", lambda report: format_percent(report["sparsity"])),
        ("Sparsity of all parameters", "sparsity", lambda report: format_percent(report["parameter_sparsity"])),
        *((label, "spectrum", lambda report, key=key: format_kappa(report.get(key))) for label, key in KAPPAS.items()),
        ("Rank-deficient matrices", "spectrum", lambda r: f"{r.get('rank_deficient', 0)} of {len(r['rows'])}"),
        ("Local Lipschitz constant, median", "lipschitz", lambda report: f"at least {report['local_median']:.4g}"),
        ("Product of layer norms, log10", "lipschitz", lambda report: f"{number(report['product_log10']):.2f}"),
    ]
    for label, name, text in lines:
        if name != "lipschitz" or own[name] is not None:
            rows.append((label, [NOT_YET if column[name] is None else text(column[name]) for column in columns]))
    return rows


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


def size_table(sizes: Mapping[str, int]) -> list[tuple[str, str, str]]:
    """Rows (what, bytes, share of the dense file) of the weight files that there are, and of the limit for a file."""
    names = {
        "dense_bytes": "dense, `model.safetensors`",
        "sparse_bytes": "packed, `model.sparse.safetensors`",
        "limit_bytes": "what a lossless file needs at least, values stored raw",
    }
    dense = sizes.get("dense_bytes")
    there = {what: sizes[key] for key, what in names.items() if key in sizes}
    return [(what, format_bytes(n), f"{100 * n / dense:.1f} %" if dense else "") for what, n in there.items()]
