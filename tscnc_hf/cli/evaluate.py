"""The robustness of any image classifier, ours or not: from a name and a data set to a folder of figures."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_type_hints

from tscnc_hf.cli.parser import ConfigParser, side_or_pair
from tscnc_hf.cli.threads import set_cpu_threads
from tscnc_hf.training.numbers import check_numbers


@dataclass
class EvaluationArguments:
    """
    What is evaluated, on what, against what.

    Parameters:
        model (`str`): Hub id or local folder of an image classifier, dense or packed.
        dataset (`str`, *optional*, defaults to `"uoft-cs/cifar10"`): Hub id, local folder, or "digits"; its test part.
        image_column, label_column (`str`, *optional*): name of the column; found by type if not given.
        test_split (`str`, *optional*): the split to test on; by default "test", else "validation", else a fifth of
            train, which results call train: a model of others may have been trained on it.
        drop_unlabelled (`bool`, *optional*, defaults to `False`): leave out images whose label is negative or missing,
            and say how many.
        image_size (`list[int]`, *optional*): resize the images to this side, or height and width, in pixels, before
            all else. Images are attacked at the size that they have, and the model's image processor resizes and crops
            them inside of what is attacked; those that have none in common, or one above 96 pixels, are brought to the
            model's by it before, and attacked there.
        attacks (`list[str]`, *optional*, defaults to `["clean", "fgsm", "pgd-20", "apgd"]`): of clean, fgsm, pgd-K,
            pgd-KxR, cw-K, apgd, apgd-dlr, square, apgd-ce+t and autoattack; see `make_attack`.
        attack_precision (`str`, *optional*, defaults to `"float32"`): in which attacks search, "float32", "bf16", or
            "tf32" on a GPU. What they find counts only if it fools the model in float32.
        epsilon (`str`, *optional*, defaults to `"8/255"`): radius in pixel units, e.g. "8/255".
        norm (`str`, *optional*, defaults to `"linf"`): norm of the perturbation, "linf" or "l2".
        n (`int`, *optional*): as many test images, drawn with the seed; all by default.
        full (`bool`, *optional*, defaults to `True`): also checks for hidden gradients, accuracy over the radius,
            Lipschitz bounds and examples, which may take longer than the attacks.
        seed (`int`, *optional*, defaults to 0): seed of the attacks, and of what is drawn.
        batch_size (`int`, *optional*, defaults to 128): images attacked at a time; halved by itself where memory runs
            out.
        dense_model (`str`, *optional*): the model before pruning, whose adversarial images must not be stronger.
        output_dir (`str`, *optional*): where figures go, which is not the folder of a model; by default
            `outputs/<model>-robustness`, of a folder its last part, of a Hub id owner-name.
        device (`str`, *optional*): by default a GPU where there is one.
        cpu_threads (`int`, *optional*): threads on a CPU; see `set_cpu_threads`.
        json (`bool`, *optional*, defaults to `False`): print what `results.json` holds on stdout, and nothing else.
    """

    model: str
    dataset: str = "uoft-cs/cifar10"
    image_column: str | None = None
    label_column: str | None = None
    test_split: str | None = None
    drop_unlabelled: bool = False
    image_size: list[int] | None = None
    attacks: list[str] = field(default_factory=lambda: ["clean", "fgsm", "pgd-20", "apgd"])
    attack_precision: str = field(default="float32", metadata={"choices": ("float32", "tf32", "bf16")})
    epsilon: str = "8/255"
    norm: str = field(default="linf", metadata={"choices": ("linf", "l2")})
    n: int | None = None
    full: bool = True
    seed: int = 0
    batch_size: int = 128
    dense_model: str | None = None
    output_dir: str | None = None
    device: str | None = None
    cpu_threads: int | None = None
    json: bool = False

    def __post_init__(self):
        check_numbers(self)
        self._check_texts()
        for name in ("model", "dense_model", "output_dir"):  # "~" of a file of options, where no shell has seen it
            if value := getattr(self, name):
                setattr(self, name, os.path.expanduser(value))
        self.image_size = side_or_pair(self.image_size)
        sides = (self.image_size,) if isinstance(self.image_size, int) else self.image_size
        if sides is not None and (len(sides) not in (1, 2) or min(sides) < 1):
            raise ValueError(f"image_size={self.image_size}: give a side, or height and width, in pixels, above 0")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}: at least 1 image is attacked at a time")
        if self.n is not None and self.n < 1:
            raise ValueError(f"n={self.n}: give 1 test image or more, or leave it out for all")
        if self.cpu_threads is not None and self.cpu_threads < 1:
            raise ValueError(f"cpu_threads={self.cpu_threads}: at least 1 is needed")
        if not self.attacks:
            raise ValueError("attacks=[]: name one or more, such as clean and pgd-20")
        if self.dense_model is not None and not self.full:
            raise ValueError(
                f"dense_model={self.dense_model!r} is for the checks for hidden gradients alone, and full=False leaves"
                " them out: drop one"
            )
        if self.dense_model is not None and all(name == "clean" for name in self.attacks):
            raise ValueError(
                f"dense_model={self.dense_model!r} is for the checks for hidden gradients, and there are none where "
                "nothing is attacked: name another attack than clean, or leave it out"
            )
        if self.output_dir is None:
            name = _folder_name(self.model) or self.model.replace("/", "-")
            self.output_dir = f"outputs/{name}-robustness"

    def _check_texts(self) -> None:
        """ValueError where YAML, or a caller, gives something else than the text that an option is."""
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            number = name == "epsilon" and isinstance(value, int | float)
            if kind in (str, str | None) and not (isinstance(value, kind) or number):
                raise ValueError(f"{name}={value!r}: give one text{'' if kind is str else ', or leave it out'}")


def parse(
    args: Sequence[str] | None = None, prog: str | None = None, epilog: str | None = None
) -> EvaluationArguments:
    """The options, from `--config` and the command line; exit code 2 and a message where one is wrong."""
    (arguments,) = ConfigParser([EvaluationArguments], prog=prog, epilog=epilog).parse(args)
    return arguments


def evaluate_model(arguments: EvaluationArguments) -> dict:
    """
    Evaluate and write `results.json` and, if `full`, `robustness.md` and figures into the output folder. An evaluation
    that was cut off goes on when it is started again; the processes of `accelerate launch` share the work.

    Returns:
        `dict`: what `results.json` holds (docs/results_json.md).

    Raises:
        SystemExit: an option, the model or the data set cannot be used; the message says why.
        BrokenPipeError: nobody reads what is printed any more.
    """
    import torch
    from accelerate import PartialState

    from tscnc_hf.artifact.card.formatting import without_paths
    from tscnc_hf.artifact.models.loading import load_model
    from tscnc_hf.data.class_names import some_names
    from tscnc_hf.evaluation.attacks import make_attack
    from tscnc_hf.evaluation.page import comparison_table
    from tscnc_hf.evaluation.precision import check_precision
    from tscnc_hf.evaluation.run import evaluate
    from tscnc_hf.evaluation.state import OtherEvaluation
    from tscnc_hf.method.adversarial.pixels import pixel_quantity

    _refuse_model_folder(Path(arguments.output_dir))
    given = _device(arguments.device) if arguments.device else None
    use_cpu = given.type == "cpu" if given else not torch.cuda.is_available()
    processes = PartialState(cpu=use_cpu)
    device = given or processes.device
    set_cpu_threads(device, processes.num_processes, arguments.cpu_threads)
    shown = sys.stderr if arguments.json else sys.stdout

    def say(text: str) -> None:
        if processes.is_main_process:
            print(text, file=shown, flush=True)

    try:
        epsilon = pixel_quantity("epsilon", arguments.epsilon, arguments.norm)
        check_precision(arguments.attack_precision, device)
        for name in arguments.attacks:
            make_attack(name, epsilon, arguments.norm)
        model, processor = _load(load_model, arguments.model)
        dense, of_dense = None, None
        if arguments.dense_model is not None:
            dense, of_dense = _load(load_model, arguments.dense_model, "dense_model")
        data = _load_data(arguments, model, processor, say)
        if dense is not None:
            of_dense = _of_dense(dense, of_dense, data)
    except BrokenPipeError:  # nobody reads on: no reason to refuse anything
        raise
    except (ValueError, OSError, ImportError) as error:  # the message says what to do; a traceback would hide it
        raise SystemExit(f"error: {error}") from None
    n = len(data.test) if arguments.n is None else min(arguments.n, len(data.test))
    folder, name = Path(arguments.output_dir), without_paths(_folder_name(arguments.model) or arguments.model)
    say(f"Model: {name}, {sum(p.numel() for p in model.parameters()):,} parameters, on {device}")
    size = "x".join(map(str, data.image_size))
    named = f"{len(data.class_names)} classes ({some_names(data.class_names)})"
    say(f"Data: {n} of {len(data.test)} {data.test.data_split} images of {data.name}, {size}, {named}")
    try:
        results = evaluate(
            model.to(device),
            data.test,
            epsilon=epsilon,
            norm=arguments.norm,
            attacks=arguments.attacks,
            attack_precision=arguments.attack_precision,
            n=n,
            full=arguments.full,
            seed=arguments.seed,
            batch_size=arguments.batch_size,
            processing_class=_of_data(model, processor, data),
            dense_model=dense,
            dense_processing_class=of_dense,
            model_name=name,
            dataset_name=data.name,
            folder=folder,
            page=True,
            class_names=data.class_names,
            distributed=processes.num_processes > 1,
        )
    except OtherEvaluation as error:
        raise SystemExit(f"error: {error}. The option is --output_dir") from None
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    written = "Figures, tables and results.json" if arguments.full else "results.json"
    say(f"\n{comparison_table({name: results})}\n\n{written}: {folder.resolve()}")
    if arguments.json and processes.is_main_process:
        print(json.dumps(results, allow_nan=False))
    return results


def _folder_name(model: str) -> str | None:
    """The last part of a folder here, None of what is none."""
    return Path(os.path.abspath(model)).name if Path(model).is_dir() else None


def _refuse_model_folder(folder: Path) -> None:
    """SystemExit where a model lies: its own results.json and figures would be overwritten."""
    from tscnc_hf.artifact.models.weights import has_weights
    from tscnc_hf.artifact.repository.opening import CONFIG_FILE, SPARSE_FILE

    if has_weights(folder) or any((folder / name).is_file() for name in (CONFIG_FILE, SPARSE_FILE)):
        raise SystemExit(f"error: --output_dir {folder} holds a model; give another folder for the figures")


def _device(name: str):
    """The device of this name; SystemExit where nothing can be computed on it."""
    import torch

    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # whatever the backend thinks of
        reason = (str(error).splitlines() or ["it gives no reason"])[0]
        raise SystemExit(f"error: --device {name} cannot be used here: {reason}") from None
    return device


def _load(load_model, name: str, option: str = "model"):
    try:
        return load_model(name)
    except (OSError, ValueError) as error:  # of transformers, which does not always say which model it was
        raise ValueError(f"{option} {name!r} cannot be loaded: {error}") from error


def _load_data(arguments: EvaluationArguments, model, processor, say: Callable[[str], None]):
    from tscnc_hf.artifact.models.config import input_format
    from tscnc_hf.artifact.models.preprocessing import ModelGeometry, acts
    from tscnc_hf.data.class_names import compare_class_names
    from tscnc_hf.data.loading import load_test_data

    size, channels = input_format(model, processor)
    fit = ModelGeometry(model, processor) if arguments.image_size is None and acts(processor) else None
    names = _class_names(model.config)
    data = load_test_data(
        arguments.dataset,
        image_column=arguments.image_column,
        label_column=arguments.label_column,
        image_size=arguments.image_size or (None if fit else size),
        fit=fit,
        channels=channels or "auto",
        test_split=arguments.test_split,
        drop_unlabelled=arguments.drop_unlabelled,
        class_names=names,
    )
    say(f"Images: {data.description}; {_check_images(model, processor, data)}{f', {fit.text}' if data.fitted else ''}")
    if warning := compare_class_names(names, data.class_names):
        say(warning)
    return data


def _class_names(config) -> list[str]:
    """By number, as the logits are; ValueError where the numbers are others."""
    names, count = config.id2label, config.num_labels
    if missing := [index for index in range(count) if index not in names]:
        found = ", ".join(map(str, list(names)[:3])) + (", ..." if count > 3 else "")
        raise ValueError(
            f"id2label in the model's config.json numbers its {count} classes {found}, without {missing[0]}: they are "
            f"numbered from 0 to {count - 1}, as the logits are. Correct id2label and label2id there"
        )
    return [str(names[index]) for index in range(count)]


def _of_data(model, processor, data):
    """How the model's inputs are made of the images of `data`: those that the processor has made need no resize."""
    from tscnc_hf.artifact.models.preprocessing import preprocessing

    how = preprocessing(model, processor)
    return how._replace(geometry=None) if data.fitted else how


def _of_dense(model, processor, data):
    try:
        return _of_data(model, processor, data)
    except ValueError as error:  # which does not say of which of both
        raise ValueError(f"dense_model: {error}") from error


def _check_images(model, processor, data) -> str:
    """What is done to the size of the images, in words; ValueError where they do not go through the model."""
    import torch

    from tscnc_hf.method.adversarial.pixels import pixel_logits

    how = _of_data(model, processor, data)
    resize = how.resize(*data.image_size)
    try:
        with torch.no_grad():
            pixel_logits(model, *how)(data.test[0]["pixel_values"][None])
    except (RuntimeError, AssertionError, ValueError) as error:
        size, advice = "x".join(map(str, data.image_size)), "Give the size it takes with --image_size"
        if resize is not None:
            size += " pixels, which its image processor makes {}x{},".format(*resize.output)
            advice = "The processor is of another model: correct preprocessor_config.json"
        raise ValueError(f"images of {size} do not go through the model: {error}. {advice}") from error
    attacked = f"attacked at {data.image_size[0]}x{data.image_size[1]}"
    if resize is None:
        return attacked
    return f"{attacked}, and resized to {resize.output[0]}x{resize.output[1]} ({resize.interpolation}) for the model"
