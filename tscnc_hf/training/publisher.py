"""What a training run leaves for others: a folder that stock libraries load, its card, and pushes to the Hub."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from tscnc_hf.artifact.card.card import write_card
from tscnc_hf.artifact.card.formatting import plain
from tscnc_hf.artifact.files.atomic import write_json
from tscnc_hf.artifact.files.identity import code_identity, weights_digest
from tscnc_hf.artifact.models.preprocessing import RESIZE
from tscnc_hf.artifact.models.recorded_widths import recorded_widths, width_record
from tscnc_hf.artifact.models.saving import save_sparse
from tscnc_hf.artifact.packed.limit import storage_limit
from tscnc_hf.artifact.repository.opening import METHOD_FILE, RESULTS_FILE, folder_sizes, read_tensors
from tscnc_hf.artifact.repository.push import push_folder
from tscnc_hf.artifact.repository.recard import RUN_FACTS
from tscnc_hf.data.class_names import class_names_of_model
from tscnc_hf.evaluation.page import PAGE_FILES
from tscnc_hf.evaluation.run import card_figures, other_weights
from tscnc_hf.method.adversarial.pixels import Geometry, Preprocessing
from tscnc_hf.method.reports.sparsity import sparsity_report
from tscnc_hf.method.reports.spectrum import spectral_report
from tscnc_hf.training.config import TSCNCConfig


class Publisher:
    """
    Writes and pushes the output folder of a run.

    Attributes:
        results: the final figures of the weights that are to be published (`TSCNCTrainer.test`), None where there are
            none yet.
        card_options: arguments of `write_card` that were given so far.
        data_name: of the training images, None where nothing says it.
        trained_with: the options as of the end of training, None before and during one.
        image_size: (h, w) of the images that are trained on and attacked; None where it is not known yet.

    Args:
        args (`TSCNCConfig`): the options.
        mean, std, order, geometry: how the model's inputs are made of pixels, as in `Preprocessing`.
    """

    def __init__(
        self, args: TSCNCConfig, mean: Sequence[float], std: Sequence[float], order: Sequence[int] | None = None,
        geometry: Geometry | None = None,
    ):  # fmt: skip
        self.args, self.preprocessing = args, Preprocessing(mean, std, order, geometry)
        self.folder = Path(args.output_dir)
        self.results: dict | None = None
        self.card_options: dict[str, Any] = {}
        self.data_name: str | None = None
        self.trained_with: dict | None = None
        self.image_size: tuple[int, int] | None = None

    def options(self) -> dict[str, Any]:
        """The options that are published: those that the weights were trained with, whatever was set since."""
        return self.args.method_dict() if self.trained_with is None else copy.deepcopy(self.trained_with)

    def keep_options(self) -> None:
        """Training is over: what is published says its options from now on."""
        self.trained_with = copy.deepcopy(self.options())

    def describe_(self, model: nn.Module) -> None:
        """Write the options and the preprocessing into the model's config, where it has one."""
        if isinstance(model, PreTrainedModel):
            how, size = self.preprocessing, self.image_size
            said = {"image_mean": list(how.mean), "image_std": list(how.std)}
            said |= {} if how.order is None else {"channel_order": list(how.order)}
            if size is None:
                before = getattr(model.config, "tscnc", None) or {}
                said |= {RESIZE: before[RESIZE]} if RESIZE in before else {}
            elif (resize := how.resize(*size)) is not None:
                said[RESIZE] = {"image_size": list(size), "resize": resize.to_dict()}
            model.config.tscnc = self.options() | said | width_record(model.config)

    def write_extras(self, folder: Path, model: nn.Module) -> None:
        """What a folder has beside the dense model: the packed weights and readable options; no pickle."""
        if isinstance(model, PreTrainedModel):
            rounded = self.card_options.get("value_dtype")  # which the weights are by now
            save_sparse(model, folder, compression="zstd" if rounded else None, value_dtype=rounded)
        write_json(self.options() | self.facts(model), folder / METHOD_FILE)
        (folder / "training_args.bin").unlink(missing_ok=True)

    def forget_results(self) -> None:
        """The weights are about to change: figures of those before are not those of the model any more."""
        self.results = None
        self.card_options.pop("examples", None)

    def _forget_others(self, model: nn.Module) -> None:
        """Figures of other weights than the model has now, which somebody may have changed since they were made."""
        if self.results is not None and self.results["identity"]["weights"].get("model") != weights_digest(model):
            self.forget_results()

    def write_results(self, folder: Path, model: nn.Module) -> None:
        """
        `results.json`, where there are results. Those of other weights than these are kept under another name; their
        page and figures go.
        """
        self._forget_others(model)
        path = folder / RESULTS_FILE
        if path.is_file() and (other := other_weights(path, model)):
            path.replace(folder / f"_results-of-{other}.json")  # which no push takes along
            for name in PAGE_FILES:
                (folder / name).unlink(missing_ok=True)
        if self.results is not None:
            write_json(self.results, path)

    def write_card(self, folder: Path, model: nn.Module, name: str | None, log_history: Sequence[Mapping]) -> Path:
        """README.md and its figures, with what is known at the time; `name` is the repository's, if it has one."""
        self._forget_others(model)
        options = {"model_name": name or folder.resolve().name} | self.card_options
        options |= {"robustness": None, **card_figures(self.results), "config": self.options()}
        options |= self.facts(model) | {"log_history": list(log_history)}
        names = class_names_of_model(model)
        sizes = folder_sizes(folder) if folder.is_dir() else {}
        if sizes:
            sizes["limit_bytes"] = storage_limit(read_tensors(folder))
        # a card names one data set: that of training, which is also that of its figures
        same = self.results is None or self.results["dataset"] == self.data_name
        defaults = {"dataset_name": self.data_name if same else None, "class_names": names, "sizes": sizes or None}
        defaults["measured_on"] = self.results["dataset"] if self.results else None
        defaults["dataset_split"] = (self.results or {}).get("split") or "test"
        defaults["own_widths"] = bool(recorded_widths(getattr(model, "config", None)))
        if "sparsity" not in options:
            defaults["sparsity"] = sparsity_report(model, self.options()["pruning_exclude"]).to_dict()
            defaults["spectrum"] = spectral_report(model).to_dict()
        defaults["module"] = "" if isinstance(model, PreTrainedModel) else described(model)
        return write_card(folder, **(defaults | options))

    def keep(self, **options: Any) -> None:
        """Arguments of `write_card` for all cards to come; empty ones change nothing."""
        self.card_options |= {key: value for key, value in options.items() if value}

    def facts(self, model: nn.Module) -> dict[str, Any]:
        """What is known of a run beside its options (`RUN_FACTS`): plain JSON types, no paths of this machine."""
        versions = {name: text for name, text in code_identity().items() if name != "commit"}
        known = {"base_model": base_name(getattr(model, "name_or_path", None)), "versions": versions}
        known["license"] = (getattr(getattr(model, "config", None), "pretrained_cfg", None) or {}).get("license")
        known |= {key: self.card_options[key] for key in RUN_FACTS if self.card_options.get(key)}
        return {key: plain(value) for key, value in known.items() if value}

    def push(self, repo_id: str, blocking: bool, message: str | None, **given: Any) -> CommitInfo | Future[CommitInfo]:
        """The folder as it is, in one commit; `given` are "token", "revision" and "private", or None of them."""
        options = self._hub_options(message, **given)
        if blocking:
            return push_folder(self.folder, repo_id, **options)
        return HfApi().run_as_future(push_folder, self.folder, repo_id, **options)

    def push_in_background(self, repo_id: str, step: int, checkpoint_folder: str) -> PushInProgress:
        """
        The folder and, if `hub_strategy` says so, the checkpoint with it, in one commit; never `training_args.bin`, a
        pickle. Until that is done nobody may write to the folder; the checkpoint may be removed by its rotation.
        """
        args = self.args
        paths = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: Path(checkpoint_folder).name}
        options = self._hub_options(f"Training in progress, step {step}")
        links = self.folder / "_pushed-checkpoint"
        shutil.rmtree(links, ignore_errors=True)  # of a run that was killed
        if args.hub_strategy in paths:
            options |= {"checkpoint": links, "checkpoint_path": paths[args.hub_strategy]}
            try:
                shutil.copytree(checkpoint_folder, links, copy_function=os.link)
            except OSError:  # a file system without links
                shutil.copytree(checkpoint_folder, links, dirs_exist_ok=True)

        def push() -> CommitInfo:
            try:
                return push_folder(self.folder, repo_id, **options)
            finally:
                shutil.rmtree(links, ignore_errors=True)

        return PushInProgress([HfApi().run_as_future(push)])

    def _hub_options(self, message: str | None, **given: Any) -> dict[str, Any]:
        args = self.args
        usual = {"token": args.hub_token, "revision": args.hub_revision, "private": args.hub_private_repo}
        return {"message": message} | usual | {key: value for key, value in given.items() if value is not None}


def base_name(name: str | None) -> str | None:
    """What to call a model that training started from: a folder here by its last part alone, which is no Hub id."""
    return Path(os.path.abspath(name)).name if name and os.path.exists(name) else name


def described(module: nn.Module) -> str:
    """What makes a plain module, as code as far as it says so itself, or the name of its class."""
    made_by = getattr(module, "pretrained_cfg", None) or {}
    name = made_by.get("architecture") if isinstance(made_by, dict) else None
    return f'timm.create_model("{name}", num_classes={module.num_classes})' if name else type(module).__name__


def failed_pushes(pushes: PushInProgress | None) -> list[BaseException]:
    """The errors of pushes in the background that are over; each is returned once."""
    done = [job for job in (pushes.jobs if pushes is not None else ()) if job.done()]
    errors = [job.exception() for job in done if not job.cancelled()]
    if pushes is not None:
        pushes.jobs = [job for job in pushes.jobs if job not in done]
    return [error for error in errors if error is not None]
