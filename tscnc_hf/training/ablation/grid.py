"""Many runs that differ in one thing: arms x sparsities x seeds, each cell measured alike, kept as a line of JSON."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import nn
from transformers import TrainerState, set_seed
from transformers.utils import logging

from tscnc_hf.artifact.card.formatting import number
from tscnc_hf.artifact.files.identity import RunIdentity, commit
from tscnc_hf.artifact.files.state import load_state, save_state
from tscnc_hf.artifact.packed.file import VALUE_DTYPES
from tscnc_hf.artifact.repository.opening import RESULTS_FILE, TRAINED_FILE, read_json
from tscnc_hf.evaluation.run import as_published, evaluate
from tscnc_hf.method.units.gates import fold_gates_
from tscnc_hf.training.ablation.bundle import bundle
from tscnc_hf.training.ablation.rows import DENSE, origin, trained_by
from tscnc_hf.training.compressor import build_pruner, with_dense_ends
from tscnc_hf.training.config import OWN_DENSE, TSCNCConfig
from tscnc_hf.training.resume.checkpoints import checkpoints
from tscnc_hf.training.teacher import teacher_digest
from tscnc_hf.training.trainer import TSCNCTrainer


logger = logging.get_logger(__name__)
STATE_FILE = "_trainer_state.json"  # of a training that is over: its card draws the log. No push takes it along
DENSE_OPTIONS = {"target_sparsity": 0.0, "tsc_weight": 0.0, "cnc_weight": 0.0, "tsc_on": "weights"}
OF_THE_CELL = {"seed", "output_dir", "push_to_hub"}  # the grid says them, no arm


@dataclass(frozen=True)
class Cell:
    """
    One run of the grid.

    Attributes:
        arm: its name.
        sparsity: target, fraction of zeros in [0, 1).
        seed: of weights, data order and noise; the augmentation of an image is the same in all cells.
        options: of `TSCNCConfig`, over those that all cells share.
        pretraining: options of the dense training that comes before, over those that all cells share; cells whose
            dense trainings are the same share it. None: the cell trains from fresh weights.
    """

    arm: str
    sparsity: float
    seed: int
    options: Mapping = field(default_factory=dict, hash=False)
    pretraining: Mapping | None = field(default=None, hash=False)

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.sparsity:g}-s{self.seed}"

    @property
    def is_dense(self) -> bool:
        """Whether it is a dense training, which other cells may start from."""
        return self.sparsity == 0 and self.pretraining is None


def grid(
    arms: Mapping[str, Mapping], sparsities: Sequence[float], seeds: Sequence[int], pretraining: Mapping | None
) -> list[Cell]:
    """
    The dense trainings that are needed (arm "dense", or "dense-<arm>" where an arm has its own), then every arm at
    every sparsity, seed by seed.

    Args:
        arms: name -> options of `TSCNCConfig`; the option "pretraining" is a map of options for the arm's own dense
            training.
        pretraining: options of the dense training that all arms start from; None trains each cell from fresh weights.

    Raises:
        ValueError: no arm, no seed or no sparsity, or one twice; a name that no arm can have; an option that does not
            exist, or that the cell decides, as its sparsity and seed.
    """
    if not isinstance(arms, Mapping):
        raise ValueError(f"arms={arms!r}: give a map, name -> options")
    if not arms or not sparsities or not seeds:
        raise ValueError(
            f"{len(arms)} arms, {len(sparsities)} sparsities, {len(seeds)} seeds: give one of each at least"
        )
    for what, values in {"sparsities": sparsities, "seeds": seeds}.items():
        if len(set(values)) < len(values):
            raise ValueError(f"{what}={list(values)}: give each once")
    dense, cells = {}, []
    for arm, given in arms.items():
        _check_name(arm, pretraining is not None)
        given = _checked(arm, given, "pretraining")
        own = given.pop("pretraining", None)
        if "target_sparsity" in given:
            raise ValueError(
                f"arm {arm!r}: `sparsities` says its target_sparsity; only `pretraining` has one of its own"
            )
        for options in (own, pretraining):
            _checked(arm, options)
        before = None if pretraining is None else dict(pretraining) | dict(own or {})
        for seed in seeds:
            if before is not None:
                key = (json.dumps(before, sort_keys=True), seed)
                dense.setdefault(key, Cell(f"{DENSE}-{arm}" if own else DENSE, 0.0, seed, before))
            cells += [Cell(arm, sparsity, seed, given, before) for sparsity in sparsities]
    return [*dense.values(), *sorted(cells, key=lambda cell: cell.seed)]


def _check_name(arm: str, shared: bool) -> None:
    """ValueError where an arm's name is taken, or no part of a folder's; `shared`: there are dense trainings."""
    if not isinstance(arm, str) or not arm.strip() or any(mark in arm for mark in "/\\\0") or arm.startswith("."):
        raise ValueError(f"arm {arm!r}: its name is part of a folder's: text without / or \\ that begins with no dot")
    if shared and (arm == DENSE or arm.startswith(f"{DENSE}-")):
        raise ValueError(f"arm {arm!r}: {DENSE!r} is what the dense trainings are called; give it another name")


def _checked(arm: str, options: Mapping | None, *also: str) -> dict:
    """Options of an arm or a dense training; ValueError where they are no map, or have what does not belong there."""
    if not isinstance(options, Mapping | None):
        raise ValueError(f"arm {arm!r}: {options!r} is no map of options")
    known = {f.name for f in fields(TSCNCConfig)} | set(also)
    if unknown := sorted(set(map(str, options or {})) - known):
        raise ValueError(f"arm {arm!r}: TSCNCConfig has no option {', '.join(unknown)}; see --help")
    if taken := sorted(set(options or {}) & OF_THE_CELL):
        raise ValueError(f"arm {arm!r}: {', '.join(taken)} is the grid's to say, not an arm's")
    return dict(options or {})


def selected(cells: Sequence[Cell], beginnings: Sequence[str]) -> list[Cell]:
    """
    The cells whose names ("<arm>-<sparsity>-s<seed>") begin with one of `beginnings`, in their order; all where there
    is none.

    Raises:
        ValueError: no cell's name begins with one of them.
    """
    names = [cell.name for cell in cells]
    for beginning in beginnings:
        if not any(name.startswith(beginning) for name in names):
            raise ValueError(f"no cell's name begins with {beginning!r}; there are {', '.join(names)}")
    return [cell for cell in cells if not beginnings or cell.name.startswith(tuple(beginnings))]


@dataclass
class Grid:
    """
    Runs cells and measures them.

    Args:
        config: what all cells share.
        build: () -> (model, image processor), with fresh weights.
        data: `ImageData`.
        label: the model's name in the results.
        split: "test", or "validation" for choosing settings.
        attacks: see `make_attack`.
        n: as many images of the split, drawn with the seed, where it has more.
        save_models: leave a publishable folder with a card for every cell, not only its line.
        about: what else decides the figures (the model), plain JSON types; part of each cell's identity.
        full: with `save_models`, also measure what may take longer than the attacks (`evaluate`).
        attack_precision: in which attacks search.
        value_dtype: "fp16" or "bf16": what each training gives is rounded to it, and packed so.
        bundles: where each measured cell's `bundle` is left, with `save_models`.
        command: what was typed, for the cards.
        progress: show on stderr how far the attacks on a finished cell are.
    """

    config: TSCNCConfig
    build: Callable[[], tuple]
    data: object
    label: str
    split: str = "test"
    attacks: Sequence[str] = ("clean", "pgd-20")
    n: int | None = None
    save_models: bool = False
    about: Mapping = field(default_factory=dict)
    full: bool = True
    attack_precision: str = "float32"
    value_dtype: str | None = None
    bundles: str | None = None
    command: str | None = None
    progress: bool = False
    revision: str | None = field(init=False, default_factory=commit)  # what runs, not what is checked out meanwhile

    def settings(self, cell: Cell) -> TSCNCConfig:
        """The options of the cell's training, but for its folder."""
        options = (DENSE_OPTIONS if cell.is_dense else {"target_sparsity": cell.sparsity}) | dict(cell.options)
        return self.config.changed(seed=cell.seed, push_to_hub=False, **options)

    def identity(self, cell: Cell) -> RunIdentity:
        """Of the cell's training, with that of the dense training that it starts from as options "dense.*"."""
        options, usual = dict(self.about) | self._options(cell), self._usual
        options |= {"value_dtype": self.value_dtype} if self.value_dtype else {}
        if cell.pretraining is not None:
            options["dense"] = self._options(self.dense(cell))
            usual = usual | {f"dense.{name}": value for name, value in usual.items()}
        return RunIdentity(options, self.data.identity, usual=usual)

    def _options(self, cell: Cell) -> dict:
        """Those that shape a cell's training; a teacher is known by its weights."""
        config = self.settings(cell)
        if config.teacher in (None, OWN_DENSE):
            return config.method_dict()
        return config.method_dict() | {"teacher": teacher_digest(config.teacher)}

    @cached_property
    def _usual(self) -> dict:
        """What options are unless they are given."""
        return TSCNCConfig(self.config.output_dir, use_cpu=self.config.use_cpu, report_to="none").method_dict()

    def fingerprint(self, cell: Cell) -> str:
        """Of everything that decides the cell's figures but the code: rows of other settings are not mixed with."""
        identity = self.identity(cell)
        measured = {"split": self.split, "attacks": list(self.attacks), "n": self.n}
        if self.attack_precision != "float32":
            measured["attack_precision"] = self.attack_precision
        own = self.settings(cell)
        if (own.epsilon, own.norm) != (self.config.epsilon, self.config.norm):  # else the options say it
            measured |= {"epsilon": self.config.epsilon, "norm": self.config.norm}
        return replace(identity, options={**identity.options, "measured": measured}).digest()

    def folder(self, cell: Cell) -> Path:
        """Of the cell's weights and checkpoints. Named also by what decides them: other settings, another folder."""
        name = f"{DENSE}-s{cell.seed}" if cell.is_dense else cell.name  # arms share a dense training
        return Path(self.config.output_dir) / f"{name}-{self.identity(cell).digest()}"

    @staticmethod
    def dense(cell: Cell) -> Cell:
        """The dense training that a cell starts from."""
        return Cell(DENSE, 0.0, cell.seed, cell.pretraining)

    def untrained(self, cells: Sequence[Cell], wanted: Sequence[Cell]) -> list[Cell]:
        """The dense trainings among `cells` from which one of `wanted` starts and whose weights are not there yet."""
        starts = {self.folder(self.dense(cell)) for cell in wanted if cell.pretraining is not None}
        found: dict[Path, Cell] = {}  # arms that say the same in other words share one
        for cell in cells:
            if cell.is_dense and (folder := self.folder(cell)) in starts:
                found.setdefault(folder, cell)
        return [cell for folder, cell in found.items() if not (folder / TRAINED_FILE).exists()]

    def unreachable(self, cells: Sequence[Cell]) -> dict[Cell, ValueError]:
        """Those that cannot be pruned as their options say, and why: known before the first is trained."""
        if not cells:
            return {}
        found, (model, _) = {}, self.build()
        for cell in cells:
            config = self.settings(cell)
            if config.keep_masks:  # of zeros that its dense training has yet to leave
                continue
            try:
                build_pruner(model, with_dense_ends(model, config))
            except ValueError as error:
                found[cell] = error
        return found

    def run(self, cell: Cell) -> dict:
        """
        Train the cell, or go on where its training was cut off, and measure it. Waits while another process does so.

        Raises:
            ValueError: the dense training that it starts from has not been run.
        """
        folder = self.folder(cell)
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f".{folder.name}.lock"))
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            logger.warning(f"{cell.name}: another process is at it in {folder}; waiting until it is done")
            held = lock.acquire()
        with held:
            return self._run(cell, folder)

    def _run(self, cell: Cell, folder: Path) -> dict:
        start = time.perf_counter()
        config, trained = replace(self.settings(cell), output_dir=str(folder)), folder / TRAINED_FILE
        set_seed(config.seed)
        model, processor = self.build()
        if cell.pretraining is not None:
            before = self.folder(self.dense(cell)) / TRAINED_FILE
            if not before.exists():
                raise ValueError(f"{cell.name} starts from {before}, which is not there: run the dense cells first")
            model.load_state_dict(load_state(before)[0])
        trainer = TSCNCTrainer(
            model, config, train_dataset=self.data.train, eval_dataset=self.data.validation, processing_class=processor
        )
        trainer.data_identity = self.data.identity
        if not trained.exists():
            trainer.train(resume_from_checkpoint=True if checkpoints(folder) else None)
        fold_gates_(trainer.model)  # what others start from, and what is measured, is a plain model
        if trained.exists():
            weights, training = load_state(trained)
            trainer.model.load_state_dict(weights)
            if (folder / STATE_FILE).is_file():
                trainer.state = TrainerState.load_from_json(str(folder / STATE_FILE))
        else:
            if self.value_dtype:
                round_(trainer.model, self.value_dtype)
            trainer.state.save_to_json(str(folder / STATE_FILE))
            training = {"seconds": f"{time.perf_counter() - start:.1f}", "commit": self.revision or ""}
            save_state(dict(trainer.model.state_dict()), trained, training)
        figures = self.measure(trainer, cell)
        if self.bundles:
            bundle(folder, self.bundles, cell.name)
        row = {"model": self.label, "arm": cell.arm, "sparsity": cell.sparsity, "seed": cell.seed}
        row |= {"split": self.split} | figures | trained_by(training)
        row |= {"parameters": sum(parameter.numel() for parameter in model.parameters())}
        return row | origin(trainer.args.device, self.revision) | {"settings": self.fingerprint(cell)}

    def measure(self, trainer: TSCNCTrainer, cell: Cell) -> dict:
        """
        The cell's figures, plain JSON types: accuracies as fractions, zeros among the prunable weights, all spectra.
        An evaluation that was cut off goes on.
        """
        args = trainer.args
        with as_published(trainer.model):
            dataset = getattr(self.data, self.split)
            results = evaluate(
                trainer.model,
                dataset,
                epsilon=self.config.epsilon,  # cells may train with another one, but all are attacked alike
                norm=self.config.norm,
                attacks=self.attacks,
                n=None if self.n is None else min(self.n, len(dataset)),
                seed=args.seed,
                batch_size=args.eval_batch_size,
                processing_class=trainer.processing_class,
                exclude=args.pruning_exclude,
                model_name=self.label,
                dataset_name=self.data.name,
                full=self.save_models and self.full,
                attack_precision=self.attack_precision,
                folder=args.output_dir,
                mixed=True,
                progress=self.progress,
            )
        if self.save_models:
            if dense := self._dense_results(cell, results):
                results["dense"] = dense
            trainer.publisher.results = results
            about = {"class_names": self.data.class_names, "dataset_name": self.data.name, "notes": self.data.notes}
            trainer.publisher.keep(**about, value_dtype=self.value_dtype, command=self.command)
            trainer.save_model()
        robustness, spectrum = results["robustness"], results["spectrum"]
        return (
            ({"collapsed": True} if results["collapsed"] else {})
            | {
                "n": robustness["n"],
                "accuracy": {attack["name"]: attack["accuracy"] for attack in robustness["attacks"]},
                "zeros": results["sparsity"]["sparsity"],
                "median_kappa": spectrum["median_effective_condition_number"],
                "max_kappa": spectrum["max_effective_condition_number"],
                "mean_cnc": _mean([number(row["cnc"]) for row in spectrum["rows"]]),
                "lost_ranks": sum(row["full_rank"] - row["rank"] for row in spectrum["rows"]),
                "empty_matrices": sum(row["rank"] == 0 for row in spectrum["rows"]),
                "matrices": len(spectrum["rows"]),
            }
            | ({"local_lipschitz": results["lipschitz"]["local_median"]} if "lipschitz" in results else {})
        )

    def _dense_results(self, cell: Cell, results: Mapping) -> dict:
        """Of the dense network that the cell starts from, where it was measured alike; {} otherwise."""
        found = {} if cell.pretraining is None else read_json(self.folder(self.dense(cell)) / RESULTS_FILE)
        if not found:
            return {}
        own, other = (RunIdentity.from_dict(one["identity"]) for one in (results, found))
        return {} if own.differences(other, ["options", "data"]) else found


@torch.no_grad()
def round_(model: nn.Module, value_dtype: str) -> None:
    """
    Round all floating weights and statistics of a model to "fp16" or "bf16"; their dtype stays.

    Raises:
        ValueError: one is finite and would not be.
    """
    narrow = getattr(torch, VALUE_DTYPES[value_dtype])
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            rounded = tensor.to(narrow).to(tensor.dtype)
            if not torch.equal(rounded.isfinite(), tensor.isfinite()):
                raise ValueError(
                    f"{name} has values up to {float(tensor.abs().max()):.4g}, too large for {value_dtype}"
                )
            tensor.copy_(rounded)


def _mean(values: Sequence[float]) -> float | str | None:
    """As JSON has it: "inf" where one is infinite, None without values."""
    mean = statistics.fmean(values) if values else None
    return mean if mean is None or math.isfinite(mean) else str(mean)
