"""The model card: README.md with its figures and model-index, from plain dicts, to rebuild it from a folder."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import yaml_dump

from tscnc_hf.artifact.card import figures, formatting, robustness_figures
from tscnc_hf.artifact.card.formatting import collapse_text, is_hub_id, one_line, plain, without_paths
from tscnc_hf.artifact.card.tables import (
    KAPPAS,
    NOT_YET,
    class_table,
    confusion_table,
    evaluation_results,
    layer_table,
    results_table,
    size_table,
)
from tscnc_hf.artifact.files.atomic import atomic_file


TEMPLATE = Path(__file__).parent / "model_card.md"
CARD_MARK = "Written by tscnc_hf"  # in a comment of the template: who wrote a card, when it is to be overwritten
NEEDED = {  # what the card prints of each report
    "sparsity": ("rows", "prunable", "zeros", "sparsity", "parameters", "parameter_zeros", "parameter_sparsity"),
    "spectrum": ("rows", *KAPPAS.values()),
    "robustness": ("threat_model", "attacks"),
    "lipschitz": ("product_log10", "local_median", "local_max", "n", "epsilon", "steps"),
    "gates": ("gates", "closed", "rows"),
}


def write_card(
    folder: str | os.PathLike[str],
    *,
    model_name: str,
    robustness: Mapping[str, Any] | None,
    collapsed: Mapping[str, Any] | None = None,
    sparsity: Mapping[str, Any],
    spectrum: Mapping[str, Any],
    config: Mapping[str, Any],
    dataset_name: str | None,
    trained_on: str | None = None,
    measured_on: str | None = None,
    dataset_split: str = "test",
    class_names: Sequence[str] | None = None,
    base_model: str | None = None,
    license: str | None = None,
    tags: Iterable[str] = (),
    command: str | None = None,
    log_history: Iterable[Mapping[str, Any]] | None = None,
    lipschitz: Mapping[str, Any] | None = None,
    gates: Mapping[str, Any] | None = None,
    curve: Mapping[str, Any] | None = None,
    examples: Mapping[str, Any] | None = None,
    kept_figures: Iterable[str] = (),
    dense: Mapping[str, Any] | None = None,
    sizes: Mapping[str, int] | None = None,
    versions: Mapping[str, str] | None = None,
    notes: Sequence[str] | None = None,
    own_widths: bool = False,
    module: str = "",
    value_dtype: str | None = None,
) -> Path:
    """Write README.md, figures/layers.png and, if there is something to draw, further figures into `folder`.

    Args:
        model_name: what the reader loads: a Hub id ("user/name"), or the name of the folder.
        robustness: robustness report as a dict (accuracies in [0, 1], epsilon in pixel units), None before evaluation:
            the card then says so and holds no accuracy.
        collapsed: what the results say under this name: the first line of the card is about it.
        sparsity, spectrum: the two reports as dicts (sparsity = fraction of zeros; an infinite number is "inf").
        config: the flat training configuration; tokens, empty values and folders of this machine are left out.
        dataset_name: what the figures are of: a Hub id ("user/name"), or a plain name or a local folder, which stays
            out of `datasets`; None where it is not known.
        trained_on: the data of training, likewise, where that is other data.
        measured_on: what the results call `dataset_name`, where that is another name for the same; in the metadata.
        class_names: not shown where they are those of transformers ("LABEL_0").
        base_model: the model that training started from, if any; only a Hub id reaches the metadata.
        license: an identifier of the Hub, such as "apache-2.0"; none where nobody has named one.
        command: the command line that trained the model.
        log_history: `trainer.state.log_history`.
        lipschitz, gates, curve: `to_dict()` of a `LipschitzReport`, of the `GateReport` of gates that were folded into
            the weights, and of a `SecurityCurve`, where there are such.
        examples: keyword arguments of `examples_figure`, drawn as figures/adversarial_examples.png.
        kept_figures: "training", "adversarial_examples": figures that lie there and are shown as they are.
        dense: the `{"robustness", "sparsity", "spectrum", "lipschitz", "curve"}` of a dense twin.
        sizes: `{"dense_bytes", "sparse_bytes", "limit_bytes"}`: of the two weight files, and `storage_limit`.
        versions: library -> version; those of `robustness` when left out.
        notes: sentences that a reader of the figures needs, such as what was done to the images; under the table,
            and in the metadata. Empty: that there are none is said there, too.
        own_widths: the widths of its layers are recorded in config.json, and only this library can build it.
        module: what a plain module, which no library builds from a folder, is made by; empty for any other model.
        value_dtype: "fp16" or "bf16", to which the weights were rounded after training, before they were measured.

    Returns:
        the path of README.md.

    Raises:
        ValueError: if a report lacks what the card prints, or `model_name` is empty.
    """
    if not model_name or not str(model_name).strip():
        raise ValueError(f"model_name={model_name!r}: give a Hub id such as 'user/name', or the name of the folder")
    model_name = without_paths(str(model_name))
    reports = {"robustness": robustness, "sparsity": sparsity, "spectrum": spectrum, "lipschitz": lipschitz}
    reports |= {"gates": gates}
    for name, report in reports.items():
        if missing := [key for key in NEEDED[name] if report is not None and key not in report]:
            raise ValueError(
                f"{name} lacks {', '.join(missing)} (it has {', '.join(map(str, report)) or 'nothing'}); "
                "give `.to_dict()` of the report, or what was saved of it as JSON"
            )
    dense = {key: (dense or {}).get(key) for key in (*reports, "curve")}
    # neither None nor NaN, and no token
    kept = {key: value for key, value in config.items() if value is not None and value == value}
    config = {key: plain(value) for key, value in kept.items() if not key.endswith("token")}
    dataset, trained_on, measured_on = (
        without_paths(str(name)) if name else "" for name in (dataset_name, trained_on, measured_on)
    )
    if notes is not None:
        notes = [" ".join(without_paths(str(note)).split()) for note in notes if str(note).strip()]

    classes = [one_line(name) for name in class_names or ()]
    shown_names = [] if all(name.startswith("LABEL_") for name in classes) else classes

    folder = Path(folder)
    drawn = {
        "layers": figures.layer_figure(sparsity, spectrum, dense),
        "training": figures.training_figure(log_history or ()),
        "security_curve": robustness_figures.curve_figure(curve, dense["curve"]) if curve else None,
        "adversarial_examples": robustness_figures.examples_figure(**examples) if examples else None,
    }
    drawn = {name: figure for name, figure in drawn.items() if figure is not None}
    for name, figure in drawn.items():
        figures.save_figure(figure, folder / "figures" / f"{name}.png", photographs=name == "adversarial_examples")

    card_data = ModelCardData(
        library_name=None if module else "transformers",
        pipeline_tag="image-classification",
        license=license,
        base_model=base_model if is_hub_id(base_model) else None,
        datasets=[trained_on or dataset] if is_hub_id(trained_on or dataset) else None,
        metrics=["accuracy"] if robustness else None,
        tags=[*_tags(robustness, sparsity, config), *tags],
        model_name=model_name,
        # the Hub wants a data set of every result
        eval_results=evaluation_results(
            robustness, sparsity, spectrum, dataset or "unknown", dataset_split, notes or ()
        ),
        **({} if notes is None else {"notes": notes}),  # an empty list: somebody said that there are none
        **({"measured_on": measured_on} if measured_on and measured_on != dataset else {}),
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        model_name=model_name,
        results=results_table(reports, dense, shown_names),
        collapsed=collapse_text(collapsed, collapsed.get("emptied", ()), classes) if collapsed else "",
        by_class=class_table(robustness, shown_names) if robustness else ([], 0),
        confusion=confusion_table(robustness, shown_names) if robustness else [],
        twin=any(dense.values()),
        **reports,
        curve=curve,
        figures={*drawn, *kept_figures},
        layers=layer_table(sparsity, spectrum),
        config=config,
        config_yaml=yaml_dump(formatting.used_settings(config), sort_keys=False).strip(),
        dataset=dataset,
        trained_on=trained_on,
        split=dataset_split,
        classes=shown_names,
        base_model=without_paths(str(base_model)) if base_model else "",
        command=formatting.wrapped_command(without_paths(formatting.without_tokens(command))) if command else "",
        sizes=size_table(sizes) if sizes else [],
        packed=bool(sizes) and 0 < sizes.get("sparse_bytes", 0) < sizes.get("dense_bytes", math.inf),
        packed_only=bool(sizes) and "sparse_bytes" in sizes and "dense_bytes" not in sizes,
        own_widths=own_widths,
        module=module,
        value_dtype=value_dtype,
        versions=plain(versions or (robustness or {}).get("versions") or {}),
        notes=notes or (),
        not_yet=NOT_YET,
        formatting=formatting,
    )
    text = re.sub(r"\n{3,}", "\n\n", str(card)).rstrip() + "\n"  # an absent part leaves no hole
    with atomic_file(folder / "README.md") as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return folder / "README.md"


OWN_TAGS = frozenset(("tscnc", "image-classification", "robustness", "pruning", "sparse", "adversarial-training"))


def _tags(robustness: Mapping[str, Any] | None, sparsity: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """What the reports and the settings bear out, and nothing more: the model may be anybody's."""
    tags = ["tscnc"] if config.get("tsc_weight") or config.get("cnc_weight") or config.get("target_sparsity") else []
    tags += ["image-classification"] + (["robustness"] if robustness or config else [])
    tags += ["pruning", "sparse"] if sparsity["sparsity"] > 0 else []
    attacked = config.get("objective", "natural") != "natural" and config.get("epsilon") != 0
    return tags + (["adversarial-training"] if attacked else [])
