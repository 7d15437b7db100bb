"""The card of a folder, from nothing but what lies in it: for a model that was trained elsewhere, evaluated later, or
renamed; and a push that takes it along."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi

from tscnc_hf.artifact.card.card import OWN_TAGS, write_card
from tscnc_hf.artifact.card.formatting import without_paths
from tscnc_hf.artifact.files.atomic import atomic_file, write_json
from tscnc_hf.artifact.models.recorded_widths import KEY, recorded_widths
from tscnc_hf.artifact.packed.limit import storage_limit
from tscnc_hf.artifact.repository.matching import check_results, keep_aside, other_model
from tscnc_hf.artifact.repository.opening import (
    CARD_FILE,
    RESULTS_FILE,
    Repository,
    is_image_classifier,
    method_settings,
    of_another_author,
    open_repository,
    output_folder,
    read_card,
    read_json,
    read_model,
    refuse_other_model,
    talking_to_the_hub,
)
from tscnc_hf.artifact.repository.push import push_folder
from tscnc_hf.data.class_names import class_names_of_model
from tscnc_hf.method.reports.sparsity import sparsity_report
from tscnc_hf.method.reports.spectrum import spectral_report


# what tscnc_config.json records of a run beside the options of its method: arguments of `write_card`
RUN_FACTS = ("dataset_name", "notes", "base_model", "license", "tags", "command", "versions", "value_dtype")
KEPT_FIGURES = ("training", "adversarial_examples")  # drawn from what no file holds


def rebuild_card(
    repository: Repository,
    output: str | os.PathLike | None = None,
    *,
    results_file: str | os.PathLike | None = None,
    overwrite: bool = False,
    **given: Any,
) -> Path:
    """
    Write README.md and its figures; sparsity and spectrum are measured on the weights, the rest is read.

    Args:
        repository: from `open_repository`; of any image classifier, also one that was never pruned.
        output: folder of the card; by default that of the model.
        results_file: figures of another evaluation than the results.json in the folder; copied to beside the card. A
            results.json of other weights that lies in the folder is kept there as _results-of-WEIGHTS.json.
        overwrite: also a card that this library did not write.
        given: arguments of `write_card` that win over what is recorded, such as `model_name` or `dataset_name`.

    Raises:
        FileExistsError: there is a README.md that this library did not write; or the output is another folder, and
            holds other weights, or results of others.
        ValueError: the model is no image classifier; the results are of other weights, of another config or of
            another image processor (`check_results`); damaged files; weights that do not fit config.json.
    """
    folder, target = repository.folder, output_folder(repository, output, "the card goes")
    elsewhere = target.resolve() != folder.resolve()
    if not overwrite and of_another_author(target / CARD_FILE):
        raise FileExistsError(
            f"{target / CARD_FILE} was not written by this library: give another --output, or --overwrite"
        )
    source = folder / RESULTS_FILE if results_file is None else Path(results_file)
    if source.is_dir():
        raise FileNotFoundError(f"{source} is a folder; give the {RESULTS_FILE} that `tscnc evaluate` wrote into it")
    if results_file is not None and not source.is_file():
        raise FileNotFoundError(f"{source}: no such file")
    model, tensors = read_model(repository)
    if not is_image_classifier(model):
        raise ValueError(
            f"{repository.name} is a {type(model).__name__}, and the cards of this library are of image classifiers. "
            f"Write its {CARD_FILE} by hand: a push takes it as it is"
        )
    results = read_json(source)
    if results_file is not None and not results:
        raise ValueError(f"{source} holds no results: give the results.json that `tscnc evaluate` writes")
    method = method_settings(folder, model.config)
    others = results_file is not None and read_json(folder / RESULTS_FILE) != results
    kept = [name for name in KEPT_FIGURES if not (others and name == "adversarial_examples")]
    measured = {
        "sparsity": sparsity_report(model, method.get("pruning_exclude") or ()).to_dict(),
        "spectrum": spectral_report(model).to_dict(),
    }
    if results:
        check_results(results, model, folder, source)
    if elsewhere:
        refuse_other_model(folder, target, tensors)
        there = read_json(target / RESULTS_FILE)
        if there and there != results and other_model(there, model):
            raise FileExistsError(
                f"{target / RESULTS_FILE} is of another model, or does not say of which; give another folder, or take "
                "it away"
            )
    known = {key: method[key] for key in RUN_FACTS if method.get(key)}
    recorded = without_paths(known["dataset_name"]) if known.get("dataset_name") else None
    trained, said = _facts_of_card(folder / CARD_FILE, recorded, results.get("dataset"))
    known |= said | given  # which somebody may have given since
    if results and trained not in (known["dataset_name"], known["measured_on"]):
        known["trained_on"] = trained
    names = class_names_of_model(model)
    path = write_card(
        target,
        **{
            "model_name": repository.name if repository.commit else folder.resolve().name,
            "robustness": results.get("robustness"),
            "dataset_split": results.get("split") or "test",
            **measured,
            "config": {key: value for key, value in method.items() if key not in (*RUN_FACTS, KEY)},
            "class_names": names,
            "sizes": repository.sizes | {"limit_bytes": storage_limit(tensors)},
            "kept_figures": [name for name in kept if _keep_figure(folder, target, name)],
            "own_widths": bool(recorded_widths(model.config)),
            **{key: results.get(key) for key in ("collapsed", "lipschitz", "gates", "curve", "dense")},
            **known,
        },
    )
    if results_file is not None:
        keep_aside(target / RESULTS_FILE, model)
        write_json(results, target / RESULTS_FILE)
    if others:  # else the next card would show them beside these results
        (target / "figures" / "adversarial_examples.png").unlink(missing_ok=True)
    return path


@talking_to_the_hub()
def publish(folder: str | os.PathLike, repo_id: str, **options: Any) -> CommitInfo:
    """
    Check a folder, write its card for the name it will have (unless somebody else wrote the card), and push it. Where
    the push fails, the card is as it was.

    Args:
        options: of `push_folder`.

    Raises:
        What `push_folder` and `rebuild_card` raise.
    """
    repository = open_repository(folder)
    if repository.commit is not None:
        raise ValueError(f"{folder} is on the Hub already; push takes a folder here")
    if "/" not in repo_id:
        repo_id = f"{HfApi(token=options.get('token')).whoami()['name']}/{repo_id}"
    card = repository.folder / CARD_FILE
    if of_another_author(card):
        read_model(repository)
        return push_folder(folder, repo_id, **options)
    before = card.read_bytes() if card.is_file() else None
    rebuild_card(repository, model_name=repo_id)
    try:
        return push_folder(folder, repo_id, **options)
    except BaseException:  # Ctrl-C, too: a card names no repository that does not hold it
        if before is None:
            card.unlink(missing_ok=True)
        else:
            with atomic_file(card) as temporary:
                temporary.write_bytes(before)
        raise


def _facts_of_card(path: Path, trained: str | None, measured: str | None) -> tuple[str | None, dict[str, Any]]:
    """
    What the training data are called, and what the front matter of an earlier card says and no other file does. The
    name and the notes that it has for data are of the figures that it had: figures of other data get neither.

    Args:
        trained: what the run recorded of its data, if anything.
        measured: what the results, if there are any, call theirs.
    """
    card = read_card(path)
    facts = {key: getattr(card, key, None) for key in ("base_model", "license")}
    facts = {key: value for key, value in facts.items() if isinstance(value, str)}
    if tags := [tag for tag in card.tags or () if isinstance(tag, str) and tag not in OWN_TAGS]:
        facts["tags"] = tags
    datasets = card.datasets if isinstance(card.datasets, list) else [card.datasets]
    shown = [result.dataset_name for result in card.eval_results or () if result.dataset_name != "unknown"]
    named, declared = (next(filter(None, names), None) for names in ([*shown, *datasets], datasets))
    trained = trained or (declared if declared != named else None)
    measured = without_paths(measured) if measured else None
    facts["measured_on"] = measured
    if measured in (None, getattr(card, "measured_on", None) or named):  # the figures that the card had
        facts["dataset_name"], notes = named or trained, getattr(card, "notes", None)
        if notes is not None:
            return trained, facts | {"notes": [notes] if isinstance(notes, str) else [str(note) for note in notes]}
    else:
        facts["dataset_name"] = measured
    of_training = measured is None or trained in (None, measured, facts["dataset_name"])
    return trained, facts | ({} if of_training else {"notes": None})  # what was recorded is of other images


def _keep_figure(folder: Path, target: Path, name: str) -> bool:
    source, copy = (path / "figures" / f"{name}.png" for path in (folder, target))
    if source.is_file() and source.resolve() != copy.resolve():
        with atomic_file(copy) as temporary:
            shutil.copyfile(source, temporary)
    return source.is_file()
