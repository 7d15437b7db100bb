"""What the recipes share: options of data and model, and the steps between data and a finished folder."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from tscnc_hf.artifact.card.formatting import without_tokens
from tscnc_hf.cli.parser import ConfigParser, side_or_pair
from tscnc_hf.cli.refusing import refusal
from tscnc_hf.training.config import DENSE_TWIN, TSCNCConfig
from tscnc_hf.training.numbers import check_numbers
from tscnc_hf.training.resume.termination import INTERRUPTED_STATUS


# options that `load_image_data` knows by the same name
OF_DATA = (
    "image_column", "label_column", "test_split", "drop_unlabelled", "image_size", "channels", "augmentation",
    "validation_fraction", "train_limit", "test_limit",
)  # fmt: skip
DECODE = {"auto": "auto", "once": True, "as-read": False}  # as `in_memory` of load_image_data


@dataclass
class DataArguments:
    """
    Where images come from. Model selection uses a part of train or a split of its own; the test split is touched once,
    at the end.

    Parameters:
        dataset (`str`, *optional*, defaults to `"uoft-cs/cifar10"`): Hub id, local folder (parquet or one folder per
            class), or "digits" (scikit-learn's, no download).
        image_column, label_column (`str`, *optional*): name of the column; found by type if not given.
        test_split (`str`, *optional*): the split to test on; by default "test", else "validation", else a fifth of
            train.
        drop_unlabelled (`bool`, *optional*, defaults to `False`): leave out images whose label is negative or missing,
            and say how many.
        image_size (`list[int]`, *optional*): resize the images of the data set to this side, or height and width, in
            pixels; they are trained on and attacked at that size. By default the size that they have.
        input_size (`list[int]`, *optional*): side, or height and width, of what the model gets: its own preprocessing
            resizes the images, inside of what is attacked. By default the model gets them as they are; a model that is
            fine-tuned, as its image processor makes them.
        interpolation (`str`, *optional*): of that resize, "nearest" (input_size a whole multiple of the image's),
            "bilinear" or "bicubic"; by default that of the model's weights, or "bilinear". A model that is fine-tuned
            has its own.
        channels (`str`, *optional*, defaults to `"auto"`): channels of the images, "rgb", "grey", or "auto", which is
            grey where the training images are.
        decode (`str`, *optional*, defaults to `"auto"`): when images are decoded, "once", into memory, "as-read", in
            every batch anew, which needs no memory for images and an image_size, or "auto", once up to 96 pixels a
            side and 4 GB.
        augmentation (`str`, *optional*, defaults to `"crop-flip"`): how training images are varied, "none", "flip",
            "crop" or "crop-flip". Crops are of the padded image where images are in memory, and random resized crops
            where they are decoded as read.
        validation_fraction (`float`, *optional*, defaults to 0.1): part of train that is kept for model selection,
            where the data set has no split "validation" beside the one to test on.
        train_limit (`int`, *optional*): train on the first n images only.
        test_limit (`int`, *optional*): test on the first n images only.
        data_notes (`list[str]`, *optional*): sentences that a reader of figures on this data needs, such as what was
            done to the images before; the card shows them.
        test_attacks (`list[str]`, *optional*, defaults to `["clean", "pgd-20"]`): attacks of the final figures; see
            `make_attack`.
        attack_precision (`str`, *optional*, defaults to `"float32"`): in which those search, "float32", "bf16", or
            "tf32" on a GPU. What they find counts only if it fools the model in float32.
        test_full (`bool`, *optional*, defaults to `True`): also checks for hidden gradients, accuracy over the radius,
            Lipschitz bounds and examples, which may take longer than the attacks.
        compare_dense (`bool`, *optional*, defaults to `False`): also train a dense twin, the same but for pruning and
            constraints, and show both side by side.
        cpu_threads (`int`, *optional*): threads on a CPU. By default a single process has all cores: `accelerate
            launch` gives it one, which makes training half as fast or worse.
        resume (`bool`, *optional*, defaults to `False`): go on from the last whole checkpoint in the output folder;
            from the beginning where there is none yet. `resume_from_checkpoint` (of `TrainingArguments`) names a
            checkpoint to go on from instead, or is "true", which is the same as this.
    """

    dataset: str = "uoft-cs/cifar10"
    image_column: str | None = None
    label_column: str | None = None
    test_split: str | None = None
    drop_unlabelled: bool = False
    image_size: list[int] | None = None
    input_size: list[int] | None = None
    interpolation: str | None = field(default=None, metadata={"choices": ("nearest", "bilinear", "bicubic")})
    channels: str = field(default="auto", metadata={"choices": ("rgb", "grey", "auto")})
    decode: str = field(default="auto", metadata={"choices": tuple(DECODE)})
    augmentation: str = field(default="crop-flip", metadata={"choices": ("none", "flip", "crop", "crop-flip")})
    validation_fraction: float = 0.1
    train_limit: int | None = None
    test_limit: int | None = None
    data_notes: list[str] = field(default_factory=list)
    test_attacks: list[str] = field(default_factory=lambda: ["clean", "pgd-20"])
    attack_precision: str = field(default="float32", metadata={"choices": ("float32", "tf32", "bf16")})
    test_full: bool = True
    compare_dense: bool = False
    cpu_threads: int | None = None
    resume: bool = False

    def __post_init__(self):
        check_numbers(self)
        self.image_size, self.input_size = side_or_pair(self.image_size), side_or_pair(self.input_size)
        if self.interpolation is not None and self.input_size is None:
            raise ValueError(f"interpolation={self.interpolation!r} has no effect without input_size")
        if self.cpu_threads is not None and self.cpu_threads < 1:
            raise ValueError(f"cpu_threads={self.cpu_threads}: at least 1 is needed")

    @property
    def of_model(self) -> dict:
        """Arguments of `timm_model` and `vit_from_config`: those that were given."""
        given = {"input_size": self.input_size, "interpolation": self.interpolation}
        return {name: value for name, value in given.items() if value is not None}


def parse(model_arguments: type, args: list[str] | None = None) -> tuple[TSCNCConfig, DataArguments, object]:
    """The options of a recipe, from `--config` and the command line."""
    parsed = ConfigParser([TSCNCConfig, DataArguments, model_arguments]).parse(args)
    with one_line_errors():
        resume_point(*parsed[:2])  # a wrong one ends here, before data is read
    return parsed


def resume_point(config: TSCNCConfig, arguments: DataArguments) -> str | bool:
    """
    What to go on from: the folder that `resume_from_checkpoint` names, else whether `resume` or it asks for the last.

    Raises:
        ResumeError: the folder is not there, or is no checkpoint.
    """
    from transformers.trainer import TRAINER_STATE_NAME

    from tscnc_hf.training.resume.checkpoints import ResumeError

    named = config.resume_from_checkpoint
    if named is None or str(named).lower() in ("", "true", "false"):
        return arguments.resume or str(named).lower() == "true"
    if not (Path(named) / TRAINER_STATE_NAME).is_file():
        what = "is no checkpoint of a training run" if Path(named).is_dir() else "does not exist"
        raise ResumeError(f"resume_from_checkpoint={named} {what}: name a folder such as <output_dir>/checkpoint-100")
    return named


@contextmanager
def one_line_errors(kinds: tuple = (ValueError, OSError, ImportError)) -> Iterator[None]:
    """Inside, what cannot be used ends the process: the message says what to do, a traceback would hide it."""
    try:
        yield
    except kinds as error:  # ImportError: a tracker that is not installed
        raise refusal(f"error: {error}") from None


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, Ctrl-C ends the process with status 130, without a traceback; a trainer has saved what it could."""
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED_STATUS) from None


def load_data(arguments: DataArguments, seed: int, photos: int | tuple[int, int] | None = None):
    """
    `ImageData` as the options say; `photos` is as there. An attack that does not exist ends here, before data is read.
    """
    from tscnc_hf.artifact.models.building import check_input_size
    from tscnc_hf.data.loading import load_image_data
    from tscnc_hf.evaluation.attacks import make_attack

    with one_line_errors():
        for name in arguments.test_attacks:
            make_attack(name, 0.0)
        data = load_image_data(
            arguments.dataset,
            **{name: getattr(arguments, name) for name in OF_DATA},
            in_memory=DECODE[arguments.decode],
            seed=seed,
            photos=photos,
        )
        check_input_size(data.image_size, arguments.input_size, arguments.interpolation or "bilinear")
    data.notes = list(arguments.data_notes)
    say(f"Data: {data.description}")
    return data


def check_test(config: TSCNCConfig, arguments: DataArguments, data) -> None:
    """SystemExit where an attack of the test does not fit data or device: known before any training."""
    from tscnc_hf.evaluation.attacks import check_attacks
    from tscnc_hf.evaluation.precision import check_precision

    fit = {"epsilon": config.epsilon, "norm": config.norm, "image_size": data.image_size}
    with one_line_errors():
        check_precision(arguments.attack_precision, config.device)
        check_attacks(arguments.test_attacks, len(data.class_names), **fit)


def of_test(arguments: DataArguments) -> dict:
    """Arguments of `TSCNCTrainer.test`."""
    names = {"attacks": "test_attacks", "full": "test_full", "attack_precision": "attack_precision"}
    return {name: getattr(arguments, option) for name, option in names.items()}


def say(text: str) -> None:
    """One line on stdout, from the first of several processes only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, flush=True)


def train(config: TSCNCConfig, model, processor, data, resume: str | bool = False):
    """Train and return the trainer. `resume`: a checkpoint, or whether to go on from the last in the output folder."""
    from transformers.utils.logging import disable_progress_bar

    from tscnc_hf.training.resume.checkpoints import checkpoints
    from tscnc_hf.training.trainer import TSCNCTrainer

    disable_progress_bar()  # of reading and writing files; training keeps its own
    with one_line_errors():
        trainer = TSCNCTrainer(
            model, config, train_dataset=data.train, eval_dataset=data.validation, processing_class=processor
        )
    class_names = [str(model.config.id2label[index]) for index in range(model.config.num_labels)]
    trainer.data_identity = data.identity
    of_data = {"dataset_name": data.name, "notes": data.notes}
    trainer.publisher.keep(class_names=class_names, command=command_line(), **of_data)
    goal = f"to {config.target_sparsity:.1%} sparsity" if config.target_sparsity else "dense"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    adversary = f"with {config.adversary}, epsilon {config.epsilon:.4g}"
    say(
        f"Training {goal}: {config.objective} {adversary if config.objective != 'natural' else '(no adversary)'}, "
        f"TSC {config.tsc_weight:g}, CNC {config.cnc_weight:g}; {parameters:,} parameters"
    )
    if resume is True and not checkpoints(config.output_dir):  # cut off before the first, or a twin that is to come
        say(f"No checkpoint in {config.output_dir} yet: training from the beginning")
        resume = False
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


def rehearse(config: TSCNCConfig, model, processor, data) -> None:
    """
    Refuse before a twin is trained what the run itself would refuse after that: all that is known before its first
    step. The model is of no use then.
    """
    from tscnc_hf.training.trainer import TSCNCTrainer

    if config.teacher == DENSE_TWIN:  # which is not there yet
        config = config.changed(distill_weight=0.0)
    with one_line_errors():
        TSCNCTrainer(
            model, config, train_dataset=data.train, eval_dataset=data.validation, processing_class=processor
        ).check_schedule()


def dense_twin(config: TSCNCConfig) -> TSCNCConfig:
    """The same run without pruning and constraints, in a folder beside: inside, a push would upload it too."""
    from tscnc_hf.training.ablation.grid import DENSE_OPTIONS

    folder = f"{Path(config.output_dir)}-dense-twin"
    return config.changed(output_dir=folder, keep_masks=False, push_to_hub=False, **DENSE_OPTIONS)


def finish(trainer, data, arguments: DataArguments, dense: dict | None = None) -> dict:
    """
    Test once (which saves the model before), save the folder with its results and card, push if asked for; print the
    table and the folder's path.
    """
    from tscnc_hf.evaluation.page import comparison_table

    results = trainer.test(data.test, **of_test(arguments))
    if dense is not None:
        results["dense"] = dense
    trainer.save_model()  # with the card; uploads too when push_to_hub is set
    columns = ({"dense": dense} if dense else {}) | {"pruned": results}
    say(f"\n{comparison_table(columns)}\n\nModel, card and figures: {Path(trainer.args.output_dir).resolve()}")
    return results


def run(config: TSCNCConfig, arguments: DataArguments, build: Callable[[], tuple], data) -> None:
    """Train what `build()` gives (model, image processor), after a dense twin if asked for, and `finish` it."""
    from transformers import set_seed

    from tscnc_hf.data.decoding import ImageError
    from tscnc_hf.training.compressor import ScheduleError
    from tscnc_hf.training.resume.checkpoints import ResumeError, finished_text, others_text
    from tscnc_hf.training.resume.storage import StorageError

    def build_one(config: TSCNCConfig) -> tuple:
        set_seed(config.seed)  # the twin starts from the same weights
        with one_line_errors():
            return build()

    def train_one(config: TSCNCConfig, resume: str | bool):
        return train(config, *build_one(config), data, resume)

    check_test(config, arguments, data)
    if config.teacher == DENSE_TWIN and not arguments.compare_dense:
        raise SystemExit(f"error: teacher={DENSE_TWIN} is the twin that compare_dense=True trains: set that, too")
    dense = None
    with one_line_errors((StorageError, ResumeError, ScheduleError, ImageError)):  # of others a traceback says more
        resume = resume_point(config, arguments)
        if text := finished_text(config.output_dir):  # it may be the one that this run starts from
            raise ResumeError(text)
        if arguments.compare_dense:
            if not resume and (text := others_text(config.output_dir)):
                raise ResumeError(text)  # before the twin is trained, not after
            rehearse(config, *build_one(config), data)
            twin = train_one(dense_twin(config), bool(resume))
            dense = twin.test(data.test, **of_test(arguments))
            twin.save_model()  # a model like any other, with its card
            if config.teacher == DENSE_TWIN:
                config = replace(config, teacher=twin.args.output_dir)
        trainer = train_one(config, resume)
        finish(trainer, data, arguments, dense)
    trainer.end()


def command_line() -> str:
    """
    What was typed to start this process, as far as it can be told: the launcher, the script and its options, but for
    the values of those whose names end in "token", since cards say the command.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if "ACCELERATE_MIXED_PRECISION" in os.environ:  # set by accelerate launch, always
        launcher = ["accelerate", "launch", *(["--num_processes", str(processes)] if processes > 1 else [])]
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = ["torchrun", "--nproc_per_node", os.environ.get("LOCAL_WORLD_SIZE", str(processes))]
    else:
        launcher = ["python"]
    return without_tokens(shlex.join([*launcher, *sys.argv]))
