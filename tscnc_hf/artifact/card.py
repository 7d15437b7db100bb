"""The model card: README.md with its figures and model-index, from plain dicts, to rebuild it from a folder."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import yaml_dump

from tscnc_hf.artifact import figures, robustness_figures
from tscnc_hf.artifact.atomic import atomic_file
from tscnc_hf.artifact.figures import by_layer, format_kappa, format_percent, number
from tscnc_hf.artifact.words import (
    attack_label,
    format_bytes,
    format_pixels,
    is_hub_id,
    plain,
    settings_text,
    without_paths,
)


TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
TOTALS = ("rows", "prunable", "zeros", "sparsity", "parameters", "parameter_zeros", "parameter_sparsity")
KAPPAS = {
    "Median effective condition number": "median_effective_condition_number",
    "Largest effective condition number": "max_effective_condition_number",
    "Median condition number": "median_condition_number",
    "Largest condition number": "max_condition_number",
}
NOT_YET = "not evaluated yet"


def write_card(
    folder: str | os.PathLike[str],
    *,
    model_name: str,
    robustness: Mapping[str, Any] | None,
    sparsity: Mapping[str, Any],
    spectrum: Mapping[str, Any],
    config: Mapping[str, Any],
    dataset_name: str,
    dataset_split: str = "test",
    class_names: Sequence[str] | None = None,
    base_model: str | None = None,
    license: str | None = "apache-2.0",
    tags: Iterable[str] = (),
    command: str | None = None,
    log_history: Iterable[Mapping[str, Any]] | None = None,
    lipschitz: Mapping[str, Any] | None = None,
    gates: Mapping[str, Any] | None = None,
    curve: Mapping[str, Any] | None = None,
    examples: Mapping[str, Any] | None = None,
    dense: Mapping[str, Any] | None = None,
    sizes: Mapping[str, int] | None = None,
    versions: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Write README.md, figures/layers.png and, if there is something to draw, further figures into `folder`.

    Args:
        model_name: what the reader loads: a Hub id ("user/name"), or the name of the folder.
        robustness: robustness report as a dict (accuracies in [0, 1], epsilon in pixel units), None before evaluation:
            the card then says so and holds no accuracy.
        sparsity, spectrum: the two reports as dicts (sparsity = fraction of zeros; an infinite number is "inf").
        config: the flat training configuration; tokens, empty values and folders of this machine are left out.
        dataset_name: a Hub id ("user/name"), or a plain name or a local folder, which stays out of `datasets`.
        base_model: the model that training started from, if any; only a Hub id reaches the metadata.
        command: the command line that trained the model.
        log_history: `trainer.state.log_history`.
        lipschitz: `LipschitzReport.to_dict()`, if it was measured.
        gates: `GateReport.to_dict()` of the gates that were folded into the weights, if there were any.
        curve: `SecurityCurve.to_dict()`, drawn as figures/security_curve.png.
        examples: keyword arguments of `examples_figure`, drawn as figures/adversarial_examples.png.
        dense: the `{"robustness", "sparsity", "spectrum", "lipschitz", "curve"}` of a dense twin.
        sizes: `{"dense_bytes", "sparse_bytes"}` of the two weight files.
        versions: library -> version; those of `robustness` when left out.
        notes: further sentences for the limits.

    Returns:
        the path of README.md.

    Raises:
        ValueError: if a report lacks what the card prints, or `model_name` is empty.
    """
    if not model_name or not str(model_name).strip():
        raise ValueError(f"model_name={model_name!r}: give a Hub id such as 'user/name', or the name of the folder")
    model_name = without_paths(str(model_name))
    _check("sparsity", sparsity, TOTALS)
    _check("spectrum", spectrum, ("rows", *KAPPAS.values()))
    if robustness is not None:
        _check("robustness", robustness, ("threat_model", "attacks"))
    if lipschitz is not None:
        _check("lipschitz", lipschitz, ("product_log10", "local_median", "local_max", "n", "epsilon", "steps"))
    if gates is not None:
        _check("gates", gates, ("gates", "closed", "rows"))
    dense = {key: (dense or {}).get(key) for key in ("robustness", "sparsity", "spectrum", "lipschitz", "curve")}
    config = {key: plain(value) for key, value in config.items() if _is_worth_keeping(key, value)}
    dataset_hub, dataset = is_hub_id(dataset_name), without_paths(str(dataset_name))

    folder = Path(folder)
    twin = dense if dense["spectrum"] else None
    figures.save_figure(figures.layer_figure(sparsity, spectrum, twin), folder / "figures" / "layers.png")
    training = figures.training_figure(log_history) if log_history else None
    if training is not None:
        figures.save_figure(training, folder / "figures" / "training.png")
    if curve is not None:
        drawn = robustness_figures.curve_figure(curve, dense["curve"])
        figures.save_figure(drawn, folder / "figures" / "security_curve.png")
    if examples is not None:
        drawn = robustness_figures.examples_figure(**examples)
        figures.save_figure(drawn, folder / "figures" / "adversarial_examples.png")

    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        license=license,
        base_model=base_model if is_hub_id(base_model) else None,
        datasets=[dataset] if dataset_hub else None,
        metrics=["accuracy"] if robustness else None,
        tags=[*_tags(sparsity, config), *tags],
        model_name=model_name,
        eval_results=evaluation_results(robustness, sparsity, spectrum, dataset, dataset_split),
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        model_name=model_name,
        robustness=robustness,
        results=results_table(robustness, sparsity, spectrum, dense, lipschitz),
        twin=any(dense.values()),
        sparsity=sparsity,
        spectrum=spectrum,
        lipschitz=lipschitz,
        gates=gates,
        curve=curve,
        examples=examples is not None,
        layers=layer_table(sparsity, spectrum),
        config=config,
        config_yaml=yaml_dump(config, sort_keys=False).strip(),
        dataset=dataset,
        dataset_hub=dataset_hub,
        split=dataset_split,
        classes=[str(name) for name in class_names or ()],
        base_model=without_paths(str(base_model)) if base_model else "",
        base_model_hub=is_hub_id(base_model),
        model_hub=is_hub_id(model_name),
        command=without_paths(command) if command else "",
        training_figure=training is not None,
        sizes=sizes,
        versions=plain(versions or (robustness or {}).get("versions") or {}),
        notes=[without_paths(str(note)) for note in notes],
        attack_label=attack_label,
        settings=settings_text,
        pixels=format_pixels,
        percent=format_percent,
        kappa=format_kappa,
        size=format_bytes,
        not_yet=NOT_YET,
    )
    text = re.sub(r"\n{3,}", "\n\n", str(card)).rstrip() + "\n"  # an absent part leaves no hole
    with atomic_file(folder / "README.md") as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return folder / "README.md"


def evaluation_results(
    robustness: Mapping[str, Any] | None, sparsity: Mapping, spectrum: Mapping, dataset: str, split: str
) -> list[EvalResult]:
    """The entries of model-index: one an attack, the two sparsities, the median effective condition number."""
    same = dict(task_type="image-classification", task_name="Image classification")
    same |= dict(dataset_type=dataset, dataset_name=dataset, dataset_split=split)
    threat = (robustness or {}).get("threat_model", {})
    results = []
    for attack in (robustness or {}).get("attacks", ()):
        name, args = "Clean accuracy", {"attack": attack["name"]}
        if attack["name"] != "clean":
            ball = f"{threat.get('norm', 'linf')}, epsilon {threat.get('epsilon')}"
            name = f"Robust accuracy under {attack_label(attack['name'])} ({ball})"
            args |= {**threat, **attack.get("parameters", {})}
        args |= {"n": attack["n"], "correct": attack["correct"], "interval_95": [attack["low"], attack["high"]]}
        value = attack["accuracy"]
        results.append(
            EvalResult(metric_type="accuracy", metric_name=name, metric_value=value, metric_args=args, **same)
        )
    rest = (
        ("sparsity", "Sparsity of the prunable weights", sparsity["sparsity"]),
        ("sparsity", "Sparsity of all parameters", sparsity["parameter_sparsity"]),
        (
            "condition_number",
            "Median effective condition number",
            number(spectrum["median_effective_condition_number"]),
        ),
    )
    for kind, name, value in rest:
        if math.isfinite(value):  # the Hub reads the metadata as JSON, which has no infinity
            results.append(EvalResult(metric_type=kind, metric_name=name, metric_value=value, **same))
    return results


def results_table(
    robustness: Mapping[str, Any] | None,
    sparsity: Mapping,
    spectrum: Mapping,
    dense: Mapping[str, Any],
    lipschitz: Mapping | None = None,
) -> list[tuple[str, list[str]]]:
    """Rows of the results table: what is measured, then this model and, if it is there, the dense twin before it."""
    columns = [(robustness, sparsity, spectrum, lipschitz)]
    if any(dense.values()):
        columns.insert(0, (dense["robustness"], dense["sparsity"], dense["spectrum"], dense.get("lipschitz")))
    by_name = [{attack["name"]: attack for attack in (column[0] or {}).get("attacks", ())} for column in columns]
    names = list(dict.fromkeys(name for attacks in reversed(by_name) for name in attacks)) or ["clean"]
    rows = []
    for name in names:
        label = "Clean accuracy" if name == "clean" else f"Accuracy under {attack_label(name)}"
        rows.append((label, [_accuracy(attacks.get(name)) for attacks in by_name]))
    worst = [(column[0] or {}).get("worst_case") for column in columns]
    if any(worst):
        rows.append(("Worst case of these attacks", [_accuracy(attack) for attack in worst]))

    def line(label: str, index: int, text: Any) -> None:
        rows.append((label, [NOT_YET if column[index] is None else text(column[index]) for column in columns]))

    line("Sparsity of the prunable weights", 1, lambda report: format_percent(report["sparsity"]))
    line("Sparsity of all parameters", 1, lambda report: format_percent(report["parameter_sparsity"]))
    for label, key in KAPPAS.items():
        line(label, 2, lambda report, key=key: format_kappa(report.get(key)))
    line("Rank-deficient matrices", 2, lambda report: f"{report.get('rank_deficient', 0)} of {len(report['rows'])}")
    if lipschitz is not None:
        line("Local Lipschitz constant, median", 3, lambda report: f"at least {report['local_median']:.4g}")
        line("Product of layer norms, log10", 3, lambda report: f"{number(report['product_log10']):.2f}")
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
        table.append(cells + [""] * (9 - len(cells)))
    return table


def _accuracy(attack: Mapping[str, Any] | None) -> str:
    if attack is None:
        return NOT_YET
    low, high = format_percent(attack["low"]), format_percent(attack["high"])
    return f"{format_percent(attack['accuracy'])} ({low.removesuffix(' %')} to {high})"


def _tags(sparsity: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    tags = ["tscnc", "image-classification", "robustness"]
    tags += ["pruning", "sparse"] if sparsity["sparsity"] > 0 else []
    return tags + ([] if config.get("objective") == "natural" else ["adversarial-training"])


def _is_worth_keeping(key: str, value: Any) -> bool:
    return value is not None and not key.endswith("token") and not (isinstance(value, float) and math.isnan(value))


def _check(name: str, report: Mapping[str, Any], keys: Sequence[str]) -> None:
    missing = [key for key in keys if key not in report]
    if missing:
        raise ValueError(
            f"{name} lacks {', '.join(missing)} (it has {', '.join(map(str, report)) or 'nothing'}); "
            "give `.to_dict()` of the report, or what was saved of it as JSON"
        )
