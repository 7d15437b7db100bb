"""Clean and robust accuracy of an image classifier under named attacks: one function, one result object."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.utils import logging

from tscnc_hf import __version__
from tscnc_hf.artifact.files.identity import RunIdentity, code_identity
from tscnc_hf.artifact.files.network import model_identity
from tscnc_hf.artifact.models.loading import load_model
from tscnc_hf.artifact.models.preprocessing import preprocessing
from tscnc_hf.data.batches import check_items, collate
from tscnc_hf.data.class_names import class_names_of, class_names_of_model, compare_class_names, parts_of
from tscnc_hf.data.identity import random_states_kept
from tscnc_hf.evaluation.attacks import KNOWN_ATTACKS, Attack, check_fit, make_attack
from tscnc_hf.evaluation.duration import estimate, estimate_text, timed
from tscnc_hf.evaluation.fitting import (
    check_outputs,
    check_stored_labels,
    dense_preprocessing,
    device_of,
    one_image,
)
from tscnc_hf.evaluation.measures.classes import collapse, confusion
from tscnc_hf.evaluation.measures.masking import masking_report
from tscnc_hf.evaluation.measures.robustness_report import AttackResult, RobustnessReport
from tscnc_hf.evaluation.memory import InParts, announce, halving
from tscnc_hf.evaluation.precision import check_precision, lowered, multiplying
from tscnc_hf.evaluation.state import FORMAT, EvaluationState, OtherEvaluation, begun, data_identity
from tscnc_hf.evaluation.subset import drawn
from tscnc_hf.method.adversarial.ball import check_norm
from tscnc_hf.method.adversarial.pixels import Preprocessing, attack_mode, pixel_logits, pixel_quantity
from tscnc_hf.method.numbers import whole_number


logger = logging.get_logger(__name__)

CHECKED = 64  # images, for hidden gradients
ENOUGH = 4  # images that tell probabilities from logits that happen to look like them


@multiplying("float32")
def evaluate_robustness(
    model: nn.Module | str | os.PathLike,
    dataset: Iterable,
    attacks: Sequence[str] | str = ("clean", "fgsm", "pgd-20", "apgd"),
    *,
    epsilon: float | str = "8/255",
    norm: str = "linf",
    n: int | None = None,
    seed: int = 0,
    batch_size: int = 128,
    processing_class: object | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    state_folder: str | os.PathLike | None = None,
    masking: bool = True,
    dense_model: nn.Module | None = None,
    dense_processing_class: object | None = None,
    distributed: bool = False,
    attack_precision: str = "float32",
) -> RobustnessReport:
    """
    Clean accuracy, accuracy under attack, and checks for gradients that mislead attacks.

    Args:
        model (`nn.Module`, or its folder or Hub id): a classifier of normalised images; left as it was (modes,
            statistics, gradients). By name it comes with its image processor.
        dataset: gives {"pixel_values": (c, h, w) in [0, 1], "labels": int} items, at the size at which the attacker
            acts: what the image processor resizes is resized inside of what is attacked.
        attacks (`Sequence[str]` or `str`): one or several, see `make_attack`. The default is what a plain install can
            run; for figures to publish add "autoattack".
        epsilon (`float` or `str`): radius in pixel units.
        norm (`str`): "linf" or "l2".
        n (`int`, *optional*): as many images, drawn with the seed; all by default.
        seed (`int`): of what is drawn, and of the attacks' random starts; torch's global generator is neither used nor
            changed.
        batch_size (`int`): images attacked together; halved by itself where memory runs out. Changes no count of the
            attacks that are ours (those of pyautoattack draw for a whole batch).
        processing_class (*optional*): image processor that says how inputs are made of pixels, unless the config does;
            or a `Preprocessing`.
        device (*optional*): defaults to where the model is.
        progress (`bool`): show a progress bar with the time left, and say what comes after it.
        state_folder (*optional*): what each attack (each part of "autoattack") found on a batch is kept there, and so
            are the masking checks; an evaluation that was cut off goes on.
        masking (`bool`): run the gradient-masking checks (`tscnc_hf.evaluation.measures.masking`) on up to 64 images.
        dense_model (*optional*): the model before pruning, likewise, whose adversarial images must not be stronger:
            one of the checks, and of no use without them.
        dense_processing_class (*optional*): its image processor; defaults to `processing_class`.
        distributed (`bool`): share the batches among the processes of `accelerate launch`; all of them must call this
            and all get the whole report.
        attack_precision (`str`): in which attacks search, "float32", "bf16", or "tf32" on a GPU. An image counts as
            broken only if the model is fooled in float32, in which all else is computed: the masking checks, too.

    Raises:
        ValueError: unknown attack or norm, a precision that the device has not, an attack that needs more classes,
            epsilon outside its range, no images, n too large, a number that is none, labels that the model has no
            output for (of all images before the first attack, where a data set stores them apart from its images),
            class names as `compare_class_names` (others are a warning), a model that returns probabilities, a dense
            model that is of no use, does not take the images or has other outputs, a state folder of another
            evaluation.
        ImportError: an attack needs a package that is not installed.
    """
    if dense_model is not None and not masking:
        raise ValueError("dense_model is for the masking checks alone, and masking=False leaves them out: drop one")
    model, processing_class = _by_name(model, processing_class)
    names, warnings = class_names_of_model(model), []
    for part in parts_of(dataset):
        theirs = class_names_of(part)
        warnings.append(compare_class_names(names, theirs) if names and theirs else None)
    warning = next(filter(None, warnings), None)
    dense_model, dense_processing_class = _by_name(dense_model, dense_processing_class)
    work = Robustness(
        model,
        dataset,
        attacks,
        epsilon=epsilon,
        norm=norm,
        n=n,
        seed=seed,
        batch_size=batch_size,
        processing_class=processing_class,
        device=device,
        progress=progress,
        state_folder=state_folder,
        distributed=distributed,
        attack_precision=attack_precision,
        dense_model=dense_model,
        dense_processing_class=dense_processing_class,
    )
    if warning and work.state.rank == 0:
        logger.warning(warning)
    report = work.accuracies()
    if masking:
        report = replace(report, masking=work.checks())
    return report


def _by_name(model: nn.Module | str | os.PathLike | None, processing_class: object | None) -> tuple:
    """A model and its image processor; one that was given wins over that of a name."""
    if not isinstance(model, (str, os.PathLike)):
        return model, processing_class
    model, own = load_model(model)
    return model, own if processing_class is None else processing_class


class Robustness:
    """
    `evaluate_robustness` step by step.

    Args:
        mixed (`bool`): `state_folder` is for evaluations of any weights, data and attacks; each has a folder in it.

    Everything else, and what is raised, as there.

    Attributes:
        state: where what is found is kept, and how it is shared.
        epsilon, n, seed, batch_size: as numbers.
        outputs: of the model; not known of an evaluation that goes on, but with a dense model.
    """

    def __init__(
        self, model: nn.Module, dataset, attacks: Sequence[str] | str, *, epsilon: float | str, norm: str,
        n: int | None, seed: int, batch_size: int, processing_class: object | None,
        device: torch.device | str | None = None, progress: bool = True,
        state_folder: str | os.PathLike | None = None, mixed: bool = False, distributed: bool = False,
        writing: Callable[[], AbstractContextManager] = nullcontext, attack_precision: str = "float32",
        dense_model: nn.Module | None = None, dense_processing_class: object | None = None,
    ):  # fmt: skip
        check_norm(norm)
        self.epsilon = pixel_quantity("epsilon", epsilon, norm)
        self.seed, self.batch_size = whole_number("seed", seed), whole_number("batch_size", batch_size, 1)
        n = None if n is None else whole_number("n", n)
        attacks = [attacks] if isinstance(attacks, str) else list(attacks or ())
        if not attacks:
            raise ValueError(f"no attack was named; known are {KNOWN_ATTACKS}")
        made = [make_attack(name, self.epsilon, norm, attack_precision) for name in attacks]
        self.attacks = list({attack.name: attack for attack in made}.values())
        check_items(dataset)
        size = len(dataset)
        if size == 0:
            raise ValueError("the data set has no images")
        if n is not None and not 0 < n <= size:
            raise ValueError(f"n={n} of a data set of {size} images: give n between 1 and {size} (or leave it out)")
        self.n, self.model, self.dataset = size if n is None else n, model, dataset
        self.places = sorted(drawn(size, self.n, self.seed))
        self.norm, self.progress, self.dense_model = norm, progress, dense_model
        self._refuse_unused(dense_processing_class)
        device = device_of(model) if device is None else torch.device(device)
        rank, world = _processes(device) if distributed else (0, 1)
        self.device = PartialState().device if world > 1 else device
        check_precision(attack_precision, self.device)
        self.attack_precision = attack_precision
        model.to(self.device)
        self.processing_class, self.preprocessing = processing_class, preprocessing(model, processing_class)
        self.forward = pixel_logits(model, *self.preprocessing)
        if state_folder is not None and mixed:
            state_folder = Path(state_folder) / self.identity.digest()
        folder = None if state_folder is None else Path(state_folder)
        if dense_model is not None or not begun(folder):  # before anything is written
            self._send_one(processing_class if dense_processing_class is None else dense_processing_class)
        identity = None if state_folder is None else self.identity
        self.state = EvaluationState(state_folder, identity, rank, world, progress, writing)

    @property
    def attacked(self) -> bool:
        """Whether there is more than clean images."""
        return self.epsilon > 0 and any(attack.name != "clean" for attack in self.attacks)

    @property
    def threat_model(self) -> dict:
        return {"norm": self.norm, "epsilon": self.epsilon, "seed": self.seed}

    @cached_property
    def identity(self) -> RunIdentity:
        """Of whatever decides the accuracies."""
        options = self.threat_model | {"format": FORMAT, "batch_size": self.batch_size}
        options |= self._how(self.preprocessing)
        code, parameters = code_identity(), {}
        for attack in self.attacks:
            parameters[attack.name] = dict(attack.parameters)
            if number := parameters[attack.name].pop("version", None):
                code[attack.parameters["implementation"].replace("_", "-")] = number
        data = data_identity(self.dataset, self.places)
        return RunIdentity(options | {"attacks": parameters}, data, code, model_identity(self.model))

    def _refuse_unused(self, dense_processing_class: object | None) -> None:
        if self.dense_model is not None and not self.attacked:
            raise ValueError(
                "dense_model is for the checks for hidden gradients, and there are none where nothing is attacked "
                f"(attacks: {', '.join(attack.name for attack in self.attacks)}; epsilon={self.epsilon:g}): name an "
                "attack and a radius above 0, or leave dense_model out"
            )
        if self.dense_model is None and dense_processing_class is not None:
            raise ValueError("dense_processing_class is of a dense_model, and none is given: give both, or none")

    def _send_one(self, dense_processing_class: object | None) -> None:
        """Whether images, labels, attacks and the dense model fit the model, as far as one image tells."""
        with random_states_kept():
            batch = collate([self.dataset[self.places[0]]])
        x, label = batch["pixel_values"].to(self.device), int(batch["labels"][0])
        self.outputs = _outputs(one_image(self.model, self.forward, x))
        check_stored_labels(self.dataset, self.places, self.outputs)
        check_outputs(label, label, self.outputs)
        for attack in self.attacks:
            check_fit(attack, self.outputs, tuple(x.shape[-2:]))
        if self.dense_model is not None:
            self._dense = dense_preprocessing(self.dense_model, dense_processing_class, x, self.outputs)

    def accuracies(self) -> RobustnessReport:
        """The report but for its masking checks."""
        made, n, state = self.attacks, self.n, self.state
        batches = [self.places[first : first + self.batch_size] for first in range(0, n, self.batch_size)]
        found = {index: state.read(_name(index)) for index in range(state.rank, len(batches), state.world)}
        names = {attack.name for attack in made}
        todo = [index for index, result in found.items() if result is None or not names <= result.keys()]
        if done := sum(len(batches[i]) for i in found if i not in todo) * state.world:
            announce(
                f"{min(done, n)} of {n} images were attacked before: what {state.folder} has is used", self.progress
            )
        # a loader draws a seed from torch's global generator unless it has one of its own
        loader = DataLoader(
            self.dataset, batch_sampler=[batches[i] for i in todo], collate_fn=collate, generator=torch.Generator()
        )
        bar = tqdm(total=n, initial=min(done, n), unit="img",
                   desc="Robust evaluation", disable=not self.progress or state.rank > 0)  # fmt: skip
        in_parts, live = InParts(), sys.stderr.isatty()  # a log file would get a line for each part of a batch
        seen: list[Tensor] = []
        with attack_mode(self.model), bar:
            for index, batch in zip(todo, loader, strict=True):
                x, y = batch["pixel_values"].to(self.device), batch["labels"].to(self.device)
                steps = _attack_batch(
                    self.forward, made, x, y, batches[index], self.seed, in_parts, found[index] or {}, seen
                )
                for guesses, part in steps:
                    if guesses != found[index]:
                        state.write(_name(index), guesses)
                    found[index] = guesses
                    bar.set_description(f"Robust evaluation: {part}" if part else "Robust evaluation", refresh=live)
                done = [result for result in found.values() if result is not None and names <= result.keys()]
                bar.set_postfix({attack.name: f"{_share(done, attack.name):.1%}" for attack in made}, refresh=False)
                bar.update(min(len(y) * state.world, n - bar.n))
        if state.world > 1:
            found = dict(gather_object(list(found.items())))
        versions = {"tscnc_hf": __version__, "torch": torch.__version__, "transformers": version("transformers")}
        report = _report([found[index] for index in range(len(batches))], made, self.threat_model, versions)
        resize = self.preprocessing.resize(*self.image_size[1:])
        report = replace(report, image_size=self.image_size, resized=None if resize is None else resize.to_dict())
        if report.collapsed is not None or len(report.per_class) > 1 or not self._constant():
            return report
        return replace(report, collapsed={"constant": True})

    def estimate_text(self, full: bool, few: int) -> str:
        """How long it will take at most, in words: of all processes together, as far as they are alike."""
        batch = collate([self.dataset[place] for place in self.places[: self.batch_size]])
        x, y = batch["pixel_values"].to(self.device), batch["labels"].to(self.device)
        check_outputs(int(y.min()), int(y.max()), self.outputs)
        with attack_mode(self.model):
            low = lowered(self.forward, self.attack_precision)
            with multiplying(self.attack_precision):
                gradient, forward = halving(lambda size: timed(low, x[:size], y[:size]), len(x))
        gradient, forward = gradient / self.state.world, forward / self.state.world
        sizes = {"few": min(self.n, few), "checked": min(self.n, CHECKED)}
        found = estimate(self.attacks, self.n, gradient, forward, **sizes, lipschitz=self.norm == "linf")
        return estimate_text(found, full and self.attacked)

    @cached_property
    def image_size(self) -> list[int]:
        """[c, h, w] of the images."""
        with random_states_kept():
            return list(collate([self.dataset[self.places[0]]])["pixel_values"].shape[1:])

    def _how(self, how: Preprocessing) -> dict:
        """What is done to these images, plain JSON types; nothing of a resize that is none."""
        said, resize = how._asdict(), how.resize(*self.image_size[1:])
        said["geometry"] = None if resize is None else resize.to_dict()
        return {name: value for name, value in said.items() if value is not None}

    def _constant(self) -> bool:
        """Whether the logits are the same for some images: of one class, which naming it for all of them is right."""
        x = self._some()["pixel_values"]
        with attack_mode(self.model), torch.no_grad():
            logits = InParts()(lambda part: self.forward(x[part].to(self.device)), len(x))
        return len(x) > 1 and _all_the_same(logits)

    def _some(self) -> dict[str, Tensor]:
        """Up to 64 of the images, as drawn."""
        return collate([self.dataset[place] for place in drawn(len(self.dataset), min(self.n, CHECKED), self.seed)])

    def checks(self) -> dict | None:
        """The masking checks on up to 64 of the images, fewer if memory runs out; None where nothing is attacked."""
        if not self.attacked:
            return None
        options, of = {"epsilon": self.epsilon, "norm": self.norm, "seed": self.seed}, None
        if self.dense_model is not None:
            options["dense_fn"] = pixel_logits(self.dense_model.to(self.device), *self._dense)
            if self.state.folder is not None:
                of = model_identity(self.dense_model) | {"preprocessing": self._how(self._dense)}
        batch = self._some()
        x, y = batch["pixel_values"].to(self.device), batch["labels"].to(self.device)

        def check(count: int) -> dict:
            share = partial(self.state.share, of=of, prefix=f"masking-{count}-", doing="Checking for hidden gradients")
            given = options | {"share": share, "parts": self.state.world}
            return masking_report(self.forward, x[:count], y[:count], **given).to_dict()

        with ExitStack() as stack:
            for model in (self.model, self.dense_model):
                if model is not None:
                    stack.enter_context(attack_mode(model))
            return halving(check, len(x))


def _name(batch: int) -> str:
    return f"batch-{batch:06d}"


def _processes(device: torch.device) -> tuple[int, int]:
    """Rank and number of the processes that `accelerate launch` or torchrun has started."""
    state = PartialState(cpu=device.type == "cpu" and not torch.cuda.is_available())
    if state.num_processes != int(os.environ.get("WORLD_SIZE", 1)):
        raise RuntimeError(
            f"{os.environ['WORLD_SIZE']} processes were started, but accelerate runs {state.num_processes}: it was "
            "set up before, without them. Make an Accelerator (or TSCNCConfig) first, on a CPU with "
            "ACCELERATE_USE_CPU=1"
        )
    return state.process_index, state.num_processes


def _attack_batch(
    forward, attacks: Sequence[Attack], x, y, places: list[int], seed, in_parts, found: Mapping, seen: list[Tensor]
) -> Iterator[tuple[dict[str, list[int]], str | None]]:
    """
    Per image: its label, and the class that is named for it clean, and after each attack and each of its parts; an
    image that is wrong is not attacked any more. What there is, `found` to begin with, is yielded before each part,
    with the part's name, and at last with None. `seen` are the logits of earlier batches, until these are enough to
    refuse probabilities.
    """
    with torch.no_grad():
        logits = in_parts(lambda part: forward(x[part]), len(x))
    check_logits(logits, y)
    if sum(map(len, seen)) < ENOUGH:
        seen.append(logits)
        if sum(map(len, seen)) >= ENOUGH:
            refuse_probabilities(torch.cat(seen))
    for attack in attacks:
        check_fit(attack, logits.shape[1], tuple(x.shape[-2:]))
    # kept ones are what attacks were run on; another kernel may decide a tie otherwise
    found = {"labels": y.tolist(), "clean": logits.argmax(-1).tolist(), **found}
    if found["labels"] != y.tolist():
        raise OtherEvaluation(
            f"the state folder has other labels for images {places[0]} to {places[-1]}: the data set has changed "
            "since. Give another folder"
        )
    index = torch.tensor(places)
    for attack in attacks:
        named = torch.tensor(found["clean"], device=y.device)
        for name, run in attack.parts.items():
            if name in found:
                named = torch.tensor(found[name], device=y.device)
                continue
            yield dict(found), name
            right = named == y
            if right.any():
                images, labels, kept = x[right], y[right], index[right.cpu()]

                def attacked(part, run=run, images=images, labels=labels, kept=kept):
                    x_adv = run(forward, images[part], labels[part], kept[part], seed)
                    with torch.no_grad():
                        return forward(x_adv).argmax(-1)

                named[right] = in_parts(attacked, len(labels))
            found[name] = named.tolist()
        found[attack.name] = named.tolist()
    yield dict(found), None


def check_logits(logits: Tensor, y: Tensor) -> None:
    """ValueError when `logits` (b, k) cannot be logits for these labels: wrong shape, not finite."""
    check_outputs(int(y.min()), int(y.max()), _outputs(logits))
    if not torch.isfinite(logits).all():
        raise ValueError("the model returns logits that are not finite for clean images")


def _outputs(logits: Tensor) -> int:
    if logits.ndim != 2:
        raise ValueError(
            f"the model returns a tensor of shape {tuple(logits.shape)}; logits (batch, classes) are needed"
        )
    return logits.shape[1]


def refuse_probabilities(logits: Tensor) -> None:
    """
    ValueError where `logits` (b, k) are probabilities already, which neither attacks nor a cross-entropy suit. Logits
    of one image may be >= 0 and sum to about 1 by chance, and those of a network that answers all images alike may,
    too: so few images have to do it as exactly as a softmax does, and more of them not all with the same logits.
    """
    few, sums = len(logits) < ENOUGH, logits.sum(-1)
    found = torch.allclose(sums, torch.ones_like(sums), rtol=0, atol=1e-5 if few else 1e-3)
    found = found and bool((logits > 0).all() if few else (logits >= 0).all() and not _all_the_same(logits))
    if logits.shape[1] > 1 and found:
        raise ValueError(
            "the model returns probabilities (each row is >= 0 and sums to 1); attacks need logits: leave out its "
            "softmax, or wrap it to return log(p)"
        )


def _all_the_same(logits: Tensor) -> bool:
    return torch.allclose(logits, logits[:1].expand_as(logits), rtol=1e-5, atol=1e-6)


def _share(results: list[dict], name: str) -> float:
    right = [guess == label for result in results for guess, label in zip(result[name], result["labels"], strict=True)]
    return sum(right) / len(right)


def _report(results, attacks, threat_model, versions) -> RobustnessReport:
    names = [attack.name for attack in attacks]
    labels, clean = ([value for result in results for value in result[key]] for key in ("labels", "clean"))
    named = {name: [guess for result in results for guess in result[name]] for name in names}
    right = {name: [int(a == b) for a, b in zip(named[name], labels, strict=True)] for name in names}
    rows = tuple(AttackResult.of_classes(a.name, confusion(labels, named[a.name]), a.parameters) for a in attacks)
    hostile, worst, shown = [name for name in names if name != "clean"], None, clean
    if hostile:  # of each image the first wrong class that an attack has found
        guesses = zip(*(named[name] for name in hostile), strict=True)
        wrong = zip(labels, guesses, strict=True)
        shown = [next((guess for guess in found if guess != label), label) for label, found in wrong]
    if len(hostile) > 1:
        worst = AttackResult.of_classes("worst case", confusion(labels, shown), {"attacks": hostile})
    per_class = {}
    for label in sorted(set(labels)):
        mine = [i for i, one in enumerate(labels) if one == label]
        per_class[label] = {"n": len(mine)} | {name: sum(right[name][i] for i in mine) for name in names}
    return RobustnessReport(
        threat_model, len(labels), rows, versions, worst, per_class,
        survived={name: tuple(flags) for name, flags in right.items()}, confusion=confusion(labels, shown),
        collapsed=collapse(confusion(labels, clean)),
    )  # fmt: skip
