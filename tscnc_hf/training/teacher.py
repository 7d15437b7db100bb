"""The dense robust network that a run follows while it prunes and fine-tunes: another one, or what it was itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from tscnc_hf.artifact.files.identity import weights_digest
from tscnc_hf.artifact.files.state import STATE_FILE, load_state
from tscnc_hf.artifact.models.loading import load_model, logits_fn
from tscnc_hf.data.class_names import class_names_of_model, has_no_names, refuse_another_order, some_names
from tscnc_hf.method.adversarial.distillation import distillation_term
from tscnc_hf.method.adversarial.pixels import LogitsFn
from tscnc_hf.method.copying import copied
from tscnc_hf.method.sharding import is_sharded
from tscnc_hf.training.compressor import Compressor
from tscnc_hf.training.config import OWN_DENSE, TSCNCConfig


PREFIX = "teacher."  # of its weights in a checkpoint


class Teacher:
    """
    Predictions of a network that does not train, in evaluation mode and with its own preprocessing, as a term of the
    loss (`distillation_term`).

    Attributes:
        digest: of the weights of a network that was loaded, part of the run's identity; None of a run's own.

    Args:
        args (`TSCNCConfig`): the options. A `teacher` that has a name is loaded here.
        student (`nn.Module`): the network that is to learn.
        outputs: its number of classes, None where it is not known.
        images (`Tensor`, *optional*): (b, c, h, w) in [0, 1], as they will come, of which one is sent through.

    Raises:
        ValueError: the teacher has other classes or takes other images; see `load_model`. OSError: it is not there.
    """

    def __init__(self, args: TSCNCConfig, student: nn.Module, outputs: int | None, images: Tensor | None):
        self.args, self.digest = args, None
        self._model: nn.Module | None = None
        self._forward: LogitsFn | None = None
        self._kept: dict[str, Tensor] | None = None  # the run's own as a checkpoint had it, until the next step
        if args.distill_weight > 0 and args.teacher != OWN_DENSE:
            try:
                model, processor = load_model(args.teacher)
            except (OSError, ValueError) as error:  # which says nothing of what it was wanted for
                kind = OSError if isinstance(error, OSError) else ValueError
                raise kind(f"teacher={args.teacher!r}: {' '.join(str(error).split())}") from error
            self.digest = weights_digest(model)
            self._is(model, logits_fn(model, processor))
            self._check(student, outputs, images)

    def _check(self, student: nn.Module, outputs: int | None, images: Tensor | None) -> None:
        name, model = f"teacher={self.args.teacher!r}", self._model
        ours, theirs = class_names_of_model(student) or [], class_names_of_model(model)
        if _others(ours, theirs):
            raise ValueError(
                f"{name} was trained for other classes ({some_names(theirs)}) than the model ({some_names(ours)}), or "
                "for these in another order: its predictions are compared number by number. Give one of the same "
                "classes"
            )
        if outputs is not None and model.config.num_labels != outputs:
            raise ValueError(
                f"{name} has {model.config.num_labels} classes and the model {outputs}: give one of as many"
            )
        if images is None:
            return
        try:
            self.logits(images[:1])
        except (RuntimeError, AssertionError, ValueError, IndexError) as error:
            shape = "x".join(map(str, images.shape[1:]))
            raise ValueError(f"images of {shape} do not go through {name}: {error}") from error

    def _is(self, model: nn.Module, forward: LogitsFn) -> None:
        model.eval().requires_grad_(False).zero_grad(set_to_none=True)
        self._model, self._forward = model.to(self.args.device), forward
        if self.args.channels_last:
            model.to(memory_format=torch.channels_last)

    def start(self, max_steps: int) -> int:
        """The first step that follows it: pruning begins, or a sparse model is fine-tuned."""
        return round(self.args.pruning_start * max_steps) if self.args.target_sparsity > 0 else 0

    def before_step(
        self, step: int, max_steps: int, compressor: Compressor, logits: Callable[[nn.Module], LogitsFn]
    ) -> None:
        """
        As pruning begins, before anything is pruned: the run's own network as it is now, its average where it has one.
        """
        if self.args.distill_weight == 0 or self.args.teacher != OWN_DENSE:
            return
        if step == 0:
            self._model = self._kept = None  # of a training before
        if self._model is None and step >= self.start(max_steps):
            with compressor.published() as model:
                own = model if is_sharded(compressor.model) else copied(model)
            self._is(own, logits(own))
            if self._kept is not None:
                own.load_state_dict(self._kept)
                self._kept = None

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Float32 (b, k), of pixels (b, c, h, w)."""
        return self._forward(x.to(self.args.device))

    def taught(self, x: Tensor, step: int, max_steps: int) -> Tensor | None:
        """`logits` in a step that follows them, None in one that does not."""
        return self.logits(x) if self.args.distill_weight > 0 and step >= self.start(max_steps) else None

    def terms(self, taught: Tensor, clean: Tensor, adversarial: Tensor, weights: Tensor | None) -> dict[str, Tensor]:
        """{"distill_loss"}, of logits (b, k): the teacher's, and the network's of clean and adversarial images."""
        args = self.args
        term = distillation_term(clean, adversarial, taught, args.distill_temperature, weights)
        return {"distill_loss": args.distill_weight * term}

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: the weights of the run's own, once there are any."""
        if self._model is None or self.digest is not None:
            return {}
        return {f"{PREFIX}{name}": tensor for name, tensor in self._model.state_dict().items()}

    def load_state(self, folder: str | os.PathLike) -> None:
        """
        Take back the run's own from a checkpoint's folder, where it has one. It is made at the next step: only then
        does the network compute in the precision of training, as the one that it was copied from did.
        """
        if self.args.distill_weight == 0 or self.args.teacher != OWN_DENSE:
            return
        state, _ = load_state(Path(folder) / STATE_FILE)
        own = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
        self._model, self._kept = None, own or None


def _others(ours: Sequence[str], theirs: Sequence[str]) -> bool:
    """Whether names differ, where both have names, or the order of numbers that stand for them."""
    if not ours:
        return False
    try:
        refuse_another_order(ours, theirs)
    except ValueError:
        return True
    return ours != theirs and not (has_no_names(ours) or has_no_names(theirs))


@lru_cache(maxsize=8)
def teacher_digest(name: str) -> str:
    """Of the weights behind the name of a teacher, a folder or Hub id."""
    return weights_digest(load_model(name)[0])
