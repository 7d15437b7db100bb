"""The figures of a finished model: measured once, shown as a table, written on the card."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from accelerate.utils import extract_model_from_parallel
from torch import nn

from tscnc_hf.evaluation.measures.curve import default_epsilons, security_curve
from tscnc_hf.evaluation.measures.lipschitz import evaluate_lipschitz
from tscnc_hf.evaluation.measures.robustness import evaluate_robustness
from tscnc_hf.evaluation.memory import announce
from tscnc_hf.evaluation.state import KeptFigures
from tscnc_hf.method.reports.sparsity import sparsity_report
from tscnc_hf.method.reports.spectrum import spectral_report


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
