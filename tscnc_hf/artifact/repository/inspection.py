"""What a model repository is: architecture, sparsity, spectrum, sizes, and what it says of its own accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from tscnc_hf.artifact.card.formatting import (
    by_layer,
    collapse_text,
    format_bytes,
    format_kappa,
    format_number,
    format_percent,
    format_pixels,
    number,
    resize_text,
    without_paths,
)
from tscnc_hf.artifact.files.tensor_file import dtype_name
from tscnc_hf.artifact.models.preprocessing import RESIZE
from tscnc_hf.artifact.models.recorded_widths import recorded_widths
from tscnc_hf.artifact.packed.limit import count_minus_zeros, storage_limit
from tscnc_hf.artifact.repository.matching import OTHER, other_model
from tscnc_hf.artifact.repository.opening import (
    CARD_FILE,
    CONFIG_FILE,
    LATENCY_FILE,
    RESULTS_FILE,
    Repository,
    method_settings,
    of_another_author,
    read_card,
    read_json,
    read_model,
)
from tscnc_hf.method.matrices import WeightMatrix, weight_matrices
from tscnc_hf.method.pruning.allocation import Allocation
from tscnc_hf.method.reports.sparsity import sparsity_report
from tscnc_hf.method.reports.spectrum import spectral_report


# what showing a value of another form than it is to have may raise
OTHER_FORM = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


def inspect_model(
    repository: Repository,
    layers: bool = False,
    spectrum: bool = True,
    target: float | None = None,
    scope: str = "global",
) -> dict[str, Any]:
    """
    Plain JSON types; what is not known is left out, an infinite number is "inf", what JSON does not have is a text.

    Args:
        repository: from `open_repository`.
        layers: also the rows of `sparsity_report` and `spectral_report`, one a weight and one a matrix.
        spectrum: singular values take a second for every ten million weights or so; False leaves them out.
        target: also what pruning to this sparsity by magnitude would leave of each layer now.
        scope: how zeros would be shared among the layers, as `pruning_scope`.

    Returns:
        {"model", "commit", "architecture", "classes", "dtype", "parameters",
        "sparsity": {"prunable", "zeros", "sparsity", "parameters", "parameter_zeros", "parameter_sparsity",
        "computed"},
        "spectrum": {"matrices", "lost_ranks", and the summary of `SpectralReport`},
        "sizes": {"dense_bytes", "sparse_bytes", "limit_bytes"}: of the two files, and what a lossless file needs at
        least (`storage_limit`), "minus_zeros": how many weights are -0.0, which a packed file keeps as 0.0,
        "images": {"attacked_at": (h, w) of the images that were trained on or attacked, "resized": `Resize.to_dict()`
        of what the model's preprocessing does to them, or None},
        "metrics": [{"name", "value", ...}], "metrics_from": the file that they are from,
        "left_out": why results.json or latency.json are not shown: they are of another model, or of another form,
        "target": {"sparsity", "scope", "rows": [{"name", "shape", "numel", "kept", "rows", "live_rows"}]},
        "collapsed": what the results say, "method": options of the run, "gates", "narrowed": layers that are narrower
        than config.json says by itself, "latency": what `tscnc bench --save` kept}

    Raises:
        FileNotFoundError: no weights, or no config.json.
        ValueError: damaged files, or weights that do not fit config.json; a target that can not be reached.
    """
    model, tensors = read_model(repository)
    config = model.config
    method = method_settings(repository.folder, config)
    sparsity = sparsity_report(model, method.get("pruning_exclude") or ()).to_dict()
    timm_name = getattr(config, "architecture", None)
    found: dict[str, Any] = {
        "model": without_paths(repository.name),
        "commit": repository.commit,
        "architecture": type(model).__name__ + (f" ({timm_name})" if timm_name else ""),
        "classes": config.num_labels if "Classification" in type(model).__name__ else None,
        "dtype": dtype_name(model.dtype),
        "parameters": sparsity["parameters"],
        "sparsity": sparsity,
    }
    if spectrum:
        report = spectral_report(model)
        whole = {key: value for key, value in report.to_dict().items() if value is not None}
        lost = sum(row.full_rank - row.rank for row in report.rows)
        found["spectrum"] = whole | {"matrices": len(report.rows), "lost_ranks": lost}
    if target is not None:
        records = list(weight_matrices(model, method.get("pruning_exclude") or ()))
        found["target"] = {"sparsity": target, "scope": scope, "rows": what_would_be_left(records, target, scope)}
    if not layers:
        for name in ("sparsity", "spectrum"):
            found.get(name, {}).pop("rows", None)
    found["sizes"] = repository.sizes | {"limit_bytes": storage_limit(tensors)}
    found["minus_zeros"] = count_minus_zeros(tensors.values()) or None
    said, left_out = _said(repository.folder, model)
    found |= said | {"method": method, "narrowed": sorted(recorded_widths(config)), "left_out": left_out}
    return {key: _plain(value) for key, value in found.items() if value not in (None, {}, [])}


def _said(folder: Path, model: PreTrainedModel) -> tuple[dict[str, Any], list[str]]:
    """What the files beside the weights say of the model, each that is of it and can be shown; why others are not."""
    path, recorded, left_out = folder / CONFIG_FILE, (getattr(model.config, "tscnc", None) or {}).get(RESIZE) or {}, []
    if not _can_be_shown(_image_rows, {"images": _images({}, recorded)}):
        raise ValueError(f'{path}: "{RESIZE}" is {recorded!r}, not as it was saved. Download it or save it again')
    results = read_json(folder / RESULTS_FILE)
    if (other := other_model(results, model)) in OTHER:
        left_out.append(f"{RESULTS_FILE} is of {OTHER[other]}")
        results = {}
    elif not _can_be_shown(lambda: _rows_of_results(_said_in_results(results, recorded))):
        left_out.append(f"{RESULTS_FILE} is not as `tscnc evaluate` writes it")
        results = {}
    said = _said_in_results(results, recorded)
    if not said["metrics"] and not (left_out and not of_another_author(folder / CARD_FILE)):  # made of those results
        said |= _said_in_card(folder / CARD_FILE)
    latency = read_json(folder / LATENCY_FILE)
    if not _can_be_shown(_latency_rows, latency):
        left_out.append(f"{LATENCY_FILE} is not as `tscnc bench` writes it")
        latency = {}
    return said | {"latency": latency}, left_out


def _can_be_shown(show: Callable[..., Any], *values: Any) -> bool:
    """Whether values have the form that `show` expects: files may be damaged, or somebody else's of the same name."""
    try:
        show(*values)
    except OTHER_FORM:
        return False
    return True


def _plain(value: Any) -> Any:
    """As JSON has it: numbers that are none as "inf" and "nan", dates and whatever else YAML knows as texts."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def what_would_be_left(records: Sequence[WeightMatrix], target: float, scope: str = "global") -> list[dict[str, Any]]:
    """
    Of each prunable weight, what pruning by magnitude would keep: weights, and rows of its matrices (outputs) that
    are not all zero.

    Raises:
        ValueError: a target outside [0, 1), or one that can not be reached.
    """
    if not 0 <= target < 1:
        raise ValueError(f"target={target} is outside [0, 1): a fraction of zeros")
    scores = {record.name: record.weight.detach().float().abs() for record in records}
    masks, rows = Allocation(scope).masks(records, scores, target), []
    for record in records:
        mask = masks[record.name] & (scores[record.name] > 0)
        live = record.view(mask).any(dim=-1)
        row = {"name": record.name, "shape": list(mask.shape), "numel": mask.numel(), "kept": int(mask.sum())}
        rows.append(row | {"rows": live.numel(), "live_rows": int(live.sum())})
    return rows


def _said_in_results(results: Mapping[str, Any], recorded: Mapping[str, Any]) -> dict[str, Any]:
    """`recorded` is what config.json says of how images are resized, where results say nothing."""
    robustness = results.get("robustness") or {}
    said = {"images": _images(robustness, recorded), "metrics": [], "metrics_from": None}
    said |= {"collapsed": results.get("collapsed"), "gates": results.get("gates")}
    if robustness.get("attacks"):
        threat, worst = robustness.get("threat_model", {}), robustness.get("worst_case")
        for row in [*robustness["attacks"], *([worst] if worst else [])]:
            figures = {"value": row["accuracy"]} | {key: row.get(key) for key in ("low", "high", "n")}
            ball = {} if row["name"] == "clean" else {key: threat.get(key) for key in ("norm", "epsilon")}
            said["metrics"].append({"name": f"accuracy, {row['name']}", **figures, **ball})
        said["metrics_from"] = RESULTS_FILE
    return said


def _said_in_card(path: Path) -> dict[str, Any]:
    """The model-index of a card, whose metrics are of whatever type its author gave them."""
    entries = read_card(path).eval_results or []
    metrics = [
        {"name": e.metric_name or e.metric_type, "value": e.metric_value, "dataset": e.dataset_name} for e in entries
    ]
    return {"metrics": metrics, "metrics_from": CARD_FILE if metrics else None}


def _images(robustness: Mapping[str, Any], recorded: Mapping[str, Any]) -> dict[str, Any]:
    size = (robustness.get("image_size") or [0])[1:] or recorded.get("image_size")
    return {"attacked_at": size, "resized": robustness.get("resized") or recorded.get("resize")} if size else {}


def summary_rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """`inspect_model`'s result for people: (what, value)."""
    sparsity, sizes = found["sparsity"], found["sizes"]
    collapsed, images, claims, gates = _rows_of_results(found)
    rows = [
        *collapsed,
        ("model", found["model"] + (f" at {found['commit'][:8]}" if "commit" in found else "")),
        ("architecture", found["architecture"] + (f", {found['classes']} classes" if "classes" in found else "")),
        ("parameters", f"{found['parameters']:,} in {found['dtype']}"),
        ("zeros", f"{sparsity['sparsity']:.2%} of {sparsity['prunable']:,} prunable weights"),
        ("", f"{sparsity['parameter_sparsity']:.2%} of {sparsity['parameters']:,} parameters"),
        *images,
    ]
    computed = sparsity.get("computed") or {}
    for why in dict.fromkeys(computed.values()):
        rows.append(("not counted", f"{sum(other == why for other in computed.values())} layers: {why}"))
    if spectrum := found.get("spectrum"):
        kappas = [format_kappa(spectrum.get(f"{which}_effective_condition_number")) for which in ("median", "max")]
        rows.append(("effective condition number", f"median {kappas[0]}, largest {kappas[1]}"))
        deficient = f"{spectrum['rank_deficient']} of {spectrum['matrices']} matrices"
        rows.append(("lost ranks", f"{spectrum['lost_ranks']:,} in {deficient}"))
    dense, packed, limit = (
        format_bytes(sizes[key]) if key in sizes else "none" for key in ("dense_bytes", "sparse_bytes", "limit_bytes")
    )
    rows.append(("weights on disk", f"dense {dense}, packed {packed}; with raw values a file needs {limit}"))
    if minus := found.get("minus_zeros"):
        rows.append(("minus zeros", f"{minus:,}, which a packed file keeps as zeros like the others"))
    rows += claims
    rows += [("left out" if not index else "", why) for index, why in enumerate(found.get("left_out", ()))]
    if method := found.get("method"):
        shown = ("objective", "adversary", "epsilon", "tsc_weight", "cnc_weight", "target_sparsity")
        rows.append(("trained with", ", ".join(f"{key} {method[key]}" for key in shown if key in method)))
    rows += gates
    if layers := found.get("narrowed"):
        rows.append(("slimmed", f"{len(layers)} layers, as recorded: load it with load_slim or load_sparse"))
    rows += _latency_rows(found.get("latency") or {})
    return rows


def _rows_of_results(found: Mapping[str, Any]) -> tuple[list[tuple[str, str]], ...]:
    """Collapse, images, accuracies and gates, each as rows."""
    collapsed, gates = found.get("collapsed"), found.get("gates")
    text = "" if collapsed is None else collapse_text(collapsed, collapsed.get("emptied", ()))
    said = f"claims ({found.get('metrics_from')})"
    return (
        [("COLLAPSED", text)] if text else [],
        _image_rows(found),
        [(said if not index else "", _metric(metric)) for index, metric in enumerate(found.get("metrics", ()))],
        [("gates", f"{gates['closed']} of {gates['gates']} closed and folded into the weights")] if gates else [],
    )


def _image_rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    if not (images := found.get("images")):
        return []
    resized = f", and resized to {resize_text(images['resized'])} for the model" if images["resized"] else ""
    return [("images", f"attacked at {'x'.join(map(str, images['attacked_at']))}{resized}")]


def _latency_rows(latency: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What skipping zeros gained, one row a batch size, where it was measured beside others."""
    rows = []
    for batch in dict.fromkeys(row["batch"] for row in latency.get("rows", ())):
        medians = {row["runtime"]: row["median_ms"] for row in latency["rows"] if row["batch"] == batch}
        ours = medians.pop("sparse_compile", None)
        if ours and medians:
            best = min(medians, key=medians.__getitem__)
            text = (
                f"{ours:.2f} ms, {medians[best] / ours:.2f} times as fast as {best}, the best of {len(medians)} others"
            )
            rows.append((f"sparse_compile, batch {batch}", f"{text} ({latency['threads']} threads)"))
    return rows


def layer_rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The layers of `inspect_model(..., layers=True)` as rows of a table, the first its header."""
    matrices = by_layer(found.get("spectrum"))
    table = [("weight", "shape", "zeros", "effective kappa", "rank")]
    for row in found["sparsity"]["rows"]:
        kappa = rank = ""
        if views := matrices.get(row["name"]):
            kappa = format_kappa(max(number(view["effective_condition_number"]) for view in views))
            rank = f"{sum(view['rank'] for view in views)} of {sum(view['full_rank'] for view in views)}"
        table.append((row["name"], " x ".join(map(str, row["shape"])), f"{row['sparsity']:.2%}", kappa, rank))
    return table


def target_rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """What a target would leave of the layers, `inspect_model(..., target=...)`, as rows of a table."""
    target = found["target"]
    table = [("weight", "shape", f"left at {target['sparsity']:g}", "share", "live rows")]
    for row in target["rows"]:
        shape = " x ".join(map(str, row["shape"]))
        left, live = f"{row['kept']:,} of {row['numel']:,}", f"{row['live_rows']:,} of {row['rows']:,}"
        table.append((row["name"], shape, left, format_percent(row["kept"] / row["numel"]), live))
    return table


def _metric(metric: Mapping[str, Any]) -> str:
    text = f"{metric['name']} {_value(metric['value'])}"
    if metric.get("low") is not None:
        text += f" ({metric['low']:.1%} to {metric['high']:.1%}, n = {metric['n']})"
    if metric.get("epsilon") is not None:
        text += f", {metric['norm']} {format_pixels(metric['epsilon'])}"
    return text


def _value(value: Any) -> str:
    """A fraction as a percentage, another number as it is, and anything else, such as "93.2%", as its author wrote."""
    if isinstance(value, float) and 0 <= value <= 1:
        return f"{value:.1%}"
    try:
        return format_number(value)
    except OTHER_FORM:
        return str(value)
