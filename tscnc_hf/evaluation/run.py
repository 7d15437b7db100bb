"""The one evaluation: of a finished run, of any model (`tscnc evaluate`), and of each cell of an ablation."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers.utils import logging

from tscnc_hf.artifact.card.formatting import collapse_text
from tscnc_hf.artifact.files.atomic import write_json
from tscnc_hf.artifact.files.identity import RunIdentity
from tscnc_hf.artifact.files.network import other_part
from tscnc_hf.artifact.repository.opening import RESULTS_FILE, STATE_FOLDER
from tscnc_hf.data.identity import dataset_split
from tscnc_hf.evaluation.measures.curve import default_epsilons, security_curve
from tscnc_hf.evaluation.measures.examples import kept_examples
from tscnc_hf.evaluation.measures.lipschitz import evaluate_lipschitz
from tscnc_hf.evaluation.measures.robustness import Robustness
from tscnc_hf.evaluation.memory import announce
from tscnc_hf.evaluation.page import write_page
from tscnc_hf.evaluation.precision import multiplying
from tscnc_hf.evaluation.state import IDENTITY_FILE, OtherEvaluation
from tscnc_hf.method.reports.sparsity import sparsity_report
from tscnc_hf.method.reports.spectrum import spectral_report


logger = logging.get_logger(__name__)

FEW_IMAGES = 256  # for what costs many steps an image
SHOWN = ("collapsed", "robustness", "sparsity", "spectrum", "curve", "lipschitz", "gates", "dense")


@contextmanager
def as_published(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, the model computes as the saved one will: without the autocast that training in bf16 or fp16 leaves."""
    patched = {name: vars(model)[name] for name in ("forward", "_original_forward") if name in vars(model)}
    extract_model_from_parallel(model, keep_fp32_wrapper=False)
    try:
        yield model
    finally:
        for name, value in patched.items():
            setattr(model, name, value)


def other_weights(path: Path, model: nn.Module) -> str | None:
    """What the model is called that a file of results is of, None where it is this one: in weights and network."""
    try:
        found = RunIdentity.from_dict(json.loads(path.read_text(encoding="utf-8")).get("identity"))
    except (ValueError, AttributeError):  # damaged, or of somebody else
        return "unknown-weights"
    other = other_part(found, model)
    return other and str(found.weights.get("model" if other == "weights" else "network"))[:8]


def _refuse_others(path: Path | None, model: nn.Module) -> None:
    if path is not None and path.is_file() and other_weights(path, model):
        raise OtherEvaluation(
            f"{path} has results that are not of these weights, or not of what this network computes with them, and "
            "would be overwritten; give another folder, or remove that file"
        )


def card_figures(results: Mapping | None) -> dict:
    """The parts of results that are arguments of `write_card`."""
    return {key: results[key] for key in SHOWN if key in (results or {})}


@multiplying("float32")
def evaluate(
    model: nn.Module,
    dataset,
    *,
    epsilon: float | str,
    norm: str = "linf",
    attacks: Sequence[str] | str = ("clean", "pgd-20"),
    n: int | None = None,
    seed: int = 0,
    batch_size: int = 128,
    processing_class: object | None = None,
    exclude: Sequence[str] = (),
    dense_model: nn.Module | None = None,
    dense_processing_class: object | None = None,
    model_name: str | None = None,
    dataset_name: str | None = None,
    gates: Mapping | None = None,
    full: bool = True,
    folder: str | os.PathLike | None = None,
    mixed: bool = False,
    page: bool = False,
    class_names: Sequence[str] | None = None,
    on_examples: Callable[[dict | None], None] | None = None,
    progress: bool = True,
    distributed: bool = False,
    writing: Callable[[], AbstractContextManager] = nullcontext,
    attack_precision: str = "float32",
) -> dict:
    """
    The figures of a model: what `results.json` holds (docs/results_json.md), plain JSON types. Zeros, spectra and
    accuracies; where something was attacked, also masking checks, accuracy over the radius under PGD-20, and for
    L-infinity Lipschitz bounds, the last two on at most 256 of the images, drawn with the seed.

    An evaluation that was cut off goes on where it was. `results.json` is there as soon as the accuracies are, and
    again when all is.

    Args:
        epsilon, norm, attacks, n, seed, batch_size, processing_class, dense_model, dense_processing_class, progress,
            distributed, attack_precision: as in `evaluate_robustness`. The processes share all of the work.
        exclude (`Sequence[str]`): as in `weight_matrices`, for the zeros.
        model_name, dataset_name (*optional*): what the results say that they are of.
        gates (*optional*): `GateReport.to_dict()` of the gates that are folded into the weights.
        full (`bool`): False leaves out checks, curve, Lipschitz bounds and examples. How long it will take is said
            before it starts, if `progress`.
        folder (*optional*): of results.json, and of state/, where what is finished is kept; None keeps nothing.
        mixed (`bool`): the folder may see evaluations of other weights, data and attacks; each is kept on its own.
            By default, another one is refused where one was begun, and so are other weights where there are results.
        page (`bool`): also write robustness.md and its figures there.
        class_names (*optional*): for the page.
        on_examples (*optional*): is given what `examples_figure` takes, or None where no image is classified
            correctly; in the first process only, after the results are written, if a curve was measured.
        writing: makes the context in which results and state are written, and nothing is read.

    Raises:
        OtherEvaluation: a `ValueError`; the folder holds an evaluation of other weights or data, or of other options.
        Otherwise, as `evaluate_robustness`.
    """
    if dense_model is not None and not full:
        raise ValueError(
            "dense_model is for the checks for hidden gradients alone, and full=False leaves them out: drop one"
        )
    folder = None if folder is None else Path(folder)
    kept = None if folder is None or mixed else folder / RESULTS_FILE
    begun = kept is not None and (folder / STATE_FOLDER / IDENTITY_FILE).is_file()
    if not begun:  # else the state says first what differs
        _refuse_others(kept, model)
    same = {"seed": seed, "processing_class": processing_class}
    work = Robustness(
        model, dataset, attacks, epsilon=epsilon, norm=norm, n=n, batch_size=batch_size, progress=progress,
        state_folder=None if folder is None else folder / STATE_FOLDER, mixed=mixed,
        distributed=distributed, writing=writing, attack_precision=attack_precision, dense_model=dense_model,
        dense_processing_class=dense_processing_class, **same,
    )  # fmt: skip
    if begun:
        _refuse_others(kept, model)
    state, epsilon = work.state, work.epsilon
    if progress and not state.begun:
        announce(work.estimate_text(full, FEW_IMAGES))
    weights = {
        "sparsity": lambda: sparsity_report(model, exclude).to_dict(),
        "spectrum": lambda: spectral_report(model).to_dict(),
    }
    of_weights = state.share(weights, of=list(exclude), doing="Computing zeros and condition numbers")
    report = work.accuracies()
    robustness, zeros = report.to_dict(), of_weights["sparsity"]["rows"]
    collapsed = robustness["collapsed"]
    if collapsed is not None:
        collapsed = collapsed | {"emptied": [row["name"] for row in zeros if row["zeros"] == row["numel"]]}
        if state.rank == 0:
            logger.warning(
                f"{model_name or 'Evaluation'}: {collapse_text(collapsed, collapsed['emptied'], class_names)}"
            )
    results = {"collapsed": collapsed, "model": model_name, "dataset": dataset_name, "split": dataset_split(dataset)}
    results |= {"robustness": robustness} | of_weights
    results |= {"gates": dict(gates)} if gates else {}
    results["identity"] = work.identity.to_dict()

    def write() -> None:
        if folder is not None and state.rank == 0:
            with writing():
                write_json(results, folder / RESULTS_FILE)

    write()
    if not full:
        return results
    results["robustness"]["masking"] = work.checks()
    few = same | {"n": min(work.n, FEW_IMAGES), "batch_size": batch_size, "state": state}
    if work.attacked:
        radii = default_epsilons(epsilon, norm)
        results["curve"] = security_curve(model, dataset, radii, norm=norm, **few).to_dict()
    if epsilon > 0 and norm == "linf":
        results["lipschitz"] = evaluate_lipschitz(model, dataset, epsilon=epsilon, **few).to_dict()
    results["identity"] = results.pop("identity")  # below what people look for
    write()
    if state.rank > 0 or not (page or on_examples):
        return results
    examples = None
    if "curve" in results:
        announce("Making adversarial examples", progress)
        found = kept_examples(state, model, dataset, epsilon=epsilon, norm=norm, n=few["n"], **same)
        examples = found and found.for_figure(class_names)
        if on_examples is not None:
            on_examples(examples)
    if page:
        announce("Drawing", progress)
        write_page(results, folder, class_names, examples)
    return results
