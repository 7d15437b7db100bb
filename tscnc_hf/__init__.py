"""Adversarially robust pruning of vision models inside transformers.Trainer. The public names, imported when used."""

from importlib import import_module

from tscnc_hf.imports import import_after


__version__ = "0.1.0"

_PUBLIC = {
    "TSCNCConfig": "tscnc_hf.training.config",
    "TSCNCTrainer": "tscnc_hf.training.trainer",
    "evaluate_robustness": "tscnc_hf.evaluation.measures.robustness",
    "spectral_report": "tscnc_hf.method.reports.spectrum",
    "sparsity_report": "tscnc_hf.method.reports.sparsity",
    "load_sparse": "tscnc_hf.artifact.models.loading",
    "save_sparse": "tscnc_hf.artifact.models.saving",
    "SparseConfig": "tscnc_hf.artifact.models.quantizer",
    "slim": "tscnc_hf.artifact.models.slim",
    "load_slim": "tscnc_hf.artifact.models.loading",
    "flops_report": "tscnc_hf.method.reports.flops",
    "sparse_compile": "tscnc_hf.inference.compiling",
}
import_after("timm", "tscnc_hf.artifact.models.cifar_networks")  # which registers them

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    # PEP 562: importing Trainer takes seconds, `--help` and the method room do not need it
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
