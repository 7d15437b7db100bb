"""What a model repository is: architecture, sparsity, spectrum, sizes, and what it says of its own accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
from tscnc_hf.artifact.repository.opening import (
    CARD_FILE,
    RESULTS_FILE,
    Repository,
    method_settings,
    read_card,
    read_json,
    read_model,
)
from tscnc_hf.method.matrices import WeightMatrix, weight_matrices
from tscnc_hf.method.pruning.allocation import Allocation
from tscnc_hf.method.reports.sparsity import sparsity_report
from tscnc_hf.method.reports.spectrum import spectral_report


LATENCY_FILE = "latency.json"  # of `tscnc bench --save`


def inspect_model(
    repository: Repository,
    layers: bool = False,
    spectrum: bool = True,
    target: float | None = None,
    scope: str = "global",
) -> dict[str, Any]:
    """
    Plain JSON types; what is not known is left out, an infinite number is "inf".

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
        "target": {"sparsity", "scope", "rows": [{"name", "shape", "numel", "kept", "rows", "live_rows"}]},
        "collapsed": what the results say, "method": options of the run, "gates", "narrowed": layers that are narrower
        than config.json says by itself, "latency": what `tscnc bench --save` kept}

    Raises:
        FileNotFoundError: no weights, or no config.json.
        ValueError: damaged files, or weights that do not fit config.json; a target that can not be reached.
    """
    model, tensors = read_model(repository)
    config, results = model.config, read_json(repository.folder / RESULTS_FILE)
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
    robustness, recorded = results.get("robustness") or {}, (getattr(config, "tscnc", None) or {}).get(RESIZE) or {}
    if size := (robustness.get("image_size") or [0])[1:] or recorded.get("image_size"):
        resize = robustness.get("resized") or recorded.get("resize")
        found["images"] = {"attacked_at": size, "resized": resize}
    found["metrics"], found["metrics_from"] = _known_metrics(repository.folder, results)
    found |= {
        "collapsed": results.get("collapsed"),
        "method": method,
        "gates": results.get("gates"),
        "narrowed": sorted(recorded_widths(config)),
        "latency": read_json(repository.folder / LATENCY_FILE),
    }
    return {key: value for key, value in found.items() if value not in (None, {}, [])}


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


def _known_metrics(folder: Path, results: Mapping[str, Any]) -> tuple[list[dict], str | None]:
    """What a repository says of its accuracy, and in which file: results.json, or the model-index of its card."""
    robustness = results.get("robustness") or {}
    if robustness.get("attacks"):
        threat, worst = robustness.get("threat_model", {}), robustness.get("worst_case")
        metrics = []
        for row in [*robustness["attacks"], *([worst] if worst else [])]:
            figures = {"value": row["accuracy"]} | {key: row.get(key) for key in ("low", "high", "n")}
            ball = {} if row["name"] == "clean" else {key: threat.get(key) for key in ("norm", "epsilon")}
            metrics.append({"name": f"accuracy, {row['name']}", **figures, **ball})
        return metrics, RESULTS_FILE
    entries = read_card(folder / CARD_FILE).eval_results or []
    metrics = [
        {"name": e.metric_name or e.metric_type, "value": e.metric_value, "dataset": e.dataset_name} for e in entries
    ]
    return metrics, CARD_FILE if metrics else None


def summary_rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """`inspect_model`'s result for people: (what, value)."""
    sparsity, sizes = found["sparsity"], found["sizes"]
    collapsed = found.get("collapsed")
    rows = [] if collapsed is None else [("COLLAPSED", collapse_text(collapsed, collapsed.get("emptied", ())))]
    rows += [
        ("model", found["model"] + (f" at {found['commit'][:8]}" if "commit" in found else "")),
        ("architecture", found["architecture"] + (f", {found['classes']} classes" if "classes" in found else "")),
        ("parameters", f"{found['parameters']:,} in {found['dtype']}"),
        ("zeros", f"{sparsity['sparsity']:.2%} of {sparsity['prunable']:,} prunable weights"),
        ("", f"{sparsity['parameter_sparsity']:.2%} of {sparsity['parameters']:,} parameters"),
    ]
    if images := found.get("images"):
        resized = f", and resized to {resize_text(images['resized'])} for the model" if images["resized"] else ""
        rows.append(("images", f"attacked at {'x'.join(map(str, images['attacked_at']))}{resized}"))
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
    for index, metric in enumerate(found.get("metrics", ())):
        rows.append((f"claims ({found['metrics_from']})" if not index else "", _metric(metric)))
    if method := found.get("method"):
        shown = ("objective", "adversary", "epsilon", "tsc_weight", "cnc_weight", "target_sparsity")
        rows.append(("trained with", ", ".join(f"{key} {method[key]}" for key in shown if key in method)))
    if gates := found.get("gates"):
        rows.append(("gates", f"{gates['closed']} of {gates['gates']} closed and folded into the weights"))
    if layers := found.get("narrowed"):
        rows.append(("slimmed", f"{len(layers)} layers, as recorded: load it with load_slim or load_sparse"))
    rows += _latency_rows(found.get("latency") or {})
    return rows


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
    value, text = metric["value"], metric["name"]
    fraction = isinstance(value, float) and 0 <= value <= 1
    text += f" {value:.1%}" if fraction else f" {format_number(value)}"
    if metric.get("low") is not None:
        text += f" ({metric['low']:.1%} to {metric['high']:.1%}, n = {metric['n']})"
    if metric.get("epsilon") is not None:
        text += f", {metric['norm']} {format_pixels(metric['epsilon'])}"
    return text
