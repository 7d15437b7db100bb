"""The figures of a finished model: measured once, shown as a table, written on the card."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from accelerate.utils import extract_model_from_parallel
from torch import nn

from tscnc_hf.evaluation.curve import default_epsilons, security_curve
from tscnc_hf.evaluation.lipschitz import evaluate_lipschitz
from tscnc_hf.evaluation.progress import announce
from tscnc_hf.evaluation.robustness import evaluate_robustness
from tscnc_hf.evaluation.state import KeptFigures
from tscnc_hf.method.sparsity import sparsity_report
from tscnc_hf.method.spectrum import spectral_report


FEW_IMAGES = 256  # for what costs many steps an image


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


def measure(
    model: nn.Module,
    dataset,
    *,
    epsilon: float,
    norm: str = "linf",
    attacks: Sequence[str] | str = ("clean", "pgd-20"),
    n: int | None = None,
    seed: int = 0,
    exclude: Sequence[str] = (),
    batch_size: int = 128,
    processing_class: object | None = None,
    progress: bool = True,
    state_folder: str | os.PathLike | None = None,
    **options,
) -> dict:
    """
    The figures of a model as plain JSON types: {"robustness", "sparsity", "spectrum"}; where something was attacked,
    {"curve"}, accuracy over the radius under PGD-20, on at most 256 of the images; and for L-infinity and epsilon > 0,
    {"lipschitz"} on as many. Curve and Lipschitz bounds are kept in `state_folder`, too.

    Arguments, also those in `options`, as in `evaluate_robustness`; `exclude` as in `weight_matrices`.
    """
    attacks = [attacks] if isinstance(attacks, str) else attacks
    kept = KeptFigures(state_folder, ["curve", "lipschitz"])  # made before anyone writes
    robustness = evaluate_robustness(
        model,
        dataset,
        attacks,
        epsilon=epsilon,
        norm=norm,
        n=n,
        seed=seed,
        batch_size=batch_size,
        processing_class=processing_class,
        progress=progress,
        state_folder=state_folder,
        **options,
    )
    announce("Computing zeros and condition numbers", progress)
    figures = {
        "robustness": robustness.to_dict(),
        "sparsity": sparsity_report(model, exclude).to_dict(),
        "spectrum": spectral_report(model).to_dict(),
    }
    few = {"seed": seed, "batch_size": batch_size, "processing_class": processing_class}
    few["n"] = min(n or FEW_IMAGES, FEW_IMAGES)

    def curve() -> dict:
        radii = default_epsilons(epsilon, norm)
        announce(f"Attacking at {len(radii)} radii", progress)
        return security_curve(model, dataset, radii, norm=norm, **few).to_dict()

    def lipschitz() -> dict:
        announce("Searching local Lipschitz constants", progress)
        return evaluate_lipschitz(model, dataset, epsilon=epsilon, **few).to_dict()

    if epsilon > 0 and set(attacks) - {"clean"}:
        figures["curve"] = kept("curve", curve)
    if epsilon > 0 and norm == "linf":
        figures["lipschitz"] = kept("lipschitz", lipschitz)
    return figures


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
    for key, label in (
        ("median_effective_condition_number", "median effective condition number"),
        ("max_effective_condition_number", "largest effective condition number"),
        ("rank_deficient", "rank-deficient matrices"),
    ):
        rows.append([label, *(_number(results[name]["spectrum"][key]) for name in names)])
    if all("lipschitz" in results[name] for name in names):
        rows.append(["local Lipschitz, median", *(_number(results[n]["lipschitz"]["local_median"]) for n in names)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(names) + 1)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    first = results[names[0]]["robustness"]
    epsilon = first["threat_model"]["epsilon"]
    norm = {"linf": "L-infinity", "l2": "L2"}[first["threat_model"]["norm"]]
    note = f"{first['n']} test images, {norm} epsilon {epsilon:.4g} ({epsilon * 255:.3g}/255), 95 % intervals"
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], note, *_masking_notes(results)])


def _masking_notes(results: Mapping[str, Mapping]) -> list[str]:
    """One line for each model whose accuracy under attack is not to be trusted."""
    notes = []
    for name, figures in results.items():
        checks = (figures["robustness"].get("masking") or {}).get("checks", ())
        if failed := [check["name"] for check in checks if not check["passed"]]:
            notes.append(f"SUSPICIOUS: {name} failed gradient-masking checks ({', '.join(failed)}); see the card")
    return notes


def _accuracy(attack: Mapping) -> str:
    return f"{attack['accuracy']:.1%} [{attack['low']:.1%}, {attack['high']:.1%}]"


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
