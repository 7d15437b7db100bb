"""
Pruning while training: the masks of a model, and what is done with them around an optimizer step.

Weights stay ordinary parameters. Between two steps the pruned ones are exactly zero, so every forward, constraint,
report and checkpoint sees the pruned network. Three ways to spend the time between the first choice of masks and the
last, all without touching the model's code:

* plain: a pruned weight is zero when a step begins, and competes with what the step made of it;
* latent weights (straight-through estimator; Guo, Yao and Chen 2016, "dynamic network surgery"): a dense copy is
  brought back for the optimizer step, which moves it by the gradient at the pruned network, so that a weight that was
  pruned too early can return in earnest;
* learned scores (HYDRA, Sehwag et al. 2020): weights are frozen, and what the optimizer moves in their place is a
  score for each, by the gradient times the weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from tscnc_hf.method.criteria import find_criterion, initial_scores
from tscnc_hf.method.matrices import WeightMatrix, full_tensor
from tscnc_hf.method.pruning.allocation import Allocation
from tscnc_hf.method.pruning.layer_rates import LayerRates, near_threshold
from tscnc_hf.method.pruning.regrowth import exchanged, forget_moments_
from tscnc_hf.method.sharding import laid_out, local


class Pruner:
    """
    Args:
        weights (`Iterable[WeightMatrix]`): the prunable weights.
        criterion (`str`): a registered name, see `tscnc_hf.method.criteria`.
        allocation (`Allocation` or `str`): what is pruned how; a scope's name for the rest as it is by default. Any
            object with the methods `masks` and `check` and the attribute `scope` of `Allocation` will do. (`near` is
            asked of it, too, where it has one, if its scope is "learned".)
        latent (`bool`): keep dense weights while the schedule runs. Learned scores always do; the criteria "movement"
            and "taylor" and the scope "learned" need them to judge pruned weights, and have them too.
        rate_learning_rate (`float`): of the factors of the scope "learned".

    A weight with requires_grad=False is left alone: its mask, latent weight and score stay, and a sparsity is that of
    the others. One that has no gradient in a step (a layer that was skipped) keeps latent weight and score, too.

    The order of calls in a step, `begin` once before the first of them: backward, `before_step`, the optimizer's step,
    `after_step`, perhaps `update`, `apply_`; at last `update` to the target, `finish`, `apply_`.
    """

    def __init__(
        self,
        weights: Iterable[WeightMatrix],
        criterion: str = "magnitude",
        allocation: Allocation | str = "global",
        *,
        latent: bool = False,
        rate_learning_rate: float = 0.01,
    ):
        self.records = {record.name: record for record in weights}
        self.criterion_name, self.criterion = criterion, find_criterion(criterion)
        self.allocation = Allocation(allocation) if isinstance(allocation, str) else allocation
        learned = self.allocation.scope == "learned"
        self._rates = LayerRates(list(self.records), rate_learning_rate) if learned else None
        self._latent = latent or self.criterion.learned or bool(self.criterion.gathers) or self._rates is not None
        self._pruned: dict[str, Tensor] = {}  # True = zero: masked_fill_ then also clears NaN and inf
        self._dense: dict[str, Tensor] = {}  # latent weights, while the schedule runs
        self._scores: dict[str, Tensor] = {}  # learned ones
        self._gathered: dict[str, Tensor] = {}  # NaN where there has never been a gradient
        self._gathered_steps: dict[str, int] = {}  # in which there was one since the masks were chosen
        self._cut: Tensor | None = None  # by how much more this step's gradients of pruned weights were clipped
        self._moving: set[str] = set()  # during a step: in whose place latent weights or scores are
        self._near: dict[str, Tensor] = {}  # bool: near the threshold, where rates are learned
        self._zeros: dict[str, Tensor] = {}  # True = zero when the model came, and to stay so
        self.initial_sparsity = 0.0

    # ---- what there is ----

    @property
    def weights(self) -> dict[str, Tensor]:
        """The parameters as they are now: wrapping a model for FSDP2 puts new ones into its modules."""
        return {name: self._weight(name) for name in self.records}

    def _weight(self, name: str) -> Tensor:
        return self.records[name].module._parameters[name.rsplit(".", 1)[-1]]

    @property
    def masks(self) -> dict[str, Tensor]:
        """Bool, True = kept, whole also where weights are sharded; empty before the first `update`."""
        return {name: ~full_tensor(pruned) for name, pruned in self._pruned.items()}

    @property
    def local_masks(self) -> dict[str, Tensor]:
        """`masks`, sharded as the weights are: without communication."""
        return {name: ~pruned for name, pruned in self._pruned.items()}

    @property
    def prunable_count(self) -> int:
        return sum(weight.numel() for weight in self.weights.values())

    @property
    def pruned_count(self) -> int:
        return sum(int(full_tensor(pruned).sum()) for pruned in self._pruned.values())

    @property
    def active(self) -> bool:
        """Whether latent weights or scores are in use: between `begin` and `finish`."""
        return bool(self._dense)

    @property
    def learns_scores(self) -> bool:
        """Whether the weights are frozen at present, and scores move in their place."""
        return bool(self._scores)

    def target_count(self, sparsity: float) -> int:
        return round(sparsity * self.prunable_count)

    def check(self, target: float) -> None:
        """
        Whether the target can be reached.

        Raises:
            ValueError: it cannot, with the floors, the pattern and the layers' own sparsities (the message has the
                largest that can); the criterion needs what this model does not have; there is nothing to prune.
        """
        records = self._whole_records()
        if not records:
            raise ValueError(
                "the model has nothing to prune: no Linear or convolution weight was found that is trained "
                "(requires_grad) and not excluded"
            )
        scores = None
        if not self.criterion.learned:
            given = (
                {record.name: torch.ones_like(record.weight) for record in records} if self.criterion.gathers else None
            )
            scores = self._checked_scores(records, given)
        self.allocation.check(records, target)
        if self._zeros and target > 0:
            magnitude = {record.name: record.weight.abs() for record in records}
            for sparsity in (self.initial_sparsity, target):  # the first and the last choice
                self._masks(records, magnitude if scores is None else scores, sparsity, {})

    # ---- around an optimizer step ----

    @torch.no_grad()
    def begin(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """The schedule starts. The optimizer is given so that moments of weights are not taken for those of scores."""
        if not self._latent or self.active:
            return
        weights = self.weights
        self._dense = {name: weight.detach().clone() for name, weight in weights.items()}
        if self.criterion.gathers:
            # in half precision a sum stands still after some hundred steps
            wide = {name: torch.promote_types(weight.dtype, torch.float32) for name, weight in weights.items()}
            self._gathered = {n: torch.full_like(w, math.nan, dtype=wide[n]) for n, w in weights.items()}
            self._gathered_steps = dict.fromkeys(weights, 0)
        if self.criterion.learned:
            whole = {name: replace(r, weight=full_tensor(self._dense[name])) for name, r in self.records.items()}
            self._scores = self._all_laid_out({name: initial_scores(record) for name, record in whole.items()})
            self._forget_moments(optimizer)

    @torch.no_grad()
    def before_step(self) -> None:
        """After backward and clipping: gather what the criterion needs, and let the optimizer move what it is to."""
        if not self.active:
            return
        products = {}
        for name, weight in self.weights.items():
            gradient, dense = weight.grad, self._dense[name]
            if gradient is None:
                continue
            if self.criterion.gathers or self._rates is not None:
                seen = gradient.clone()
                if self._cut is not None and name in self._pruned:  # weights are judged by what is the same for all
                    part = local(seen)
                    part.copy_(torch.where(local(self._pruned[name]), part / self._cut, part))
                seen = seen.nan_to_num(0.0, 0.0, 0.0)  # of a step with an overflow, which a gradient scaler skips
                if self.criterion.gathers:
                    gathered = self._gathered[name]
                    if self._gathered_steps[name] == 0:
                        gathered.zero_()
                    seen = seen.to(gathered.dtype)
                    gathered += seen if self.criterion.gathers == "mean" else -seen * dense
                    self._gathered_steps[name] += 1
                if name in self._near:
                    products[name] = full_tensor((seen * dense * self._near[name]).sum())
            if self.learns_scores:
                gradient.mul_(dense).mul_(self._scores[name].sign())
                weight.copy_(self._scores[name])
            else:
                weight.copy_(dense)
            self._moving.add(name)
        self._cut = None
        if products:
            self._rates.learn(products)

    def freeze_others(self, model: nn.Module) -> None:
        """While scores are learned: no gradients for anything but the prunable weights (biases, norms, gates)."""
        if self.learns_scores:
            own = {id(weight) for weight in self.weights.values()}
            for parameter in model.parameters():
                if id(parameter) not in own:
                    parameter.grad = None

    @torch.no_grad()
    def after_step(self) -> None:
        """After the optimizer's step: its result becomes the latent weight, or the score."""
        for name in self._moving:
            weight = self._weight(name)
            if self.learns_scores:
                self._scores[name].copy_(weight)
                weight.copy_(self._dense[name])
            else:
                self._dense[name].copy_(weight)
        self._moving.clear()

    @torch.no_grad()
    def update(self, sparsity: float) -> None:
        """
        Choose the masks anew, exactly round(sparsity * prunable_count) zeros; of the weights that are not frozen, if
        some are.

        Raises:
            ValueError: the criterion needs gradients and there were none; scores that are not finite; a sparsity that
                cannot be reached.
        """
        records = self._whole_records()
        gradients = self._whole_gradients()
        unknown = {name for name, gradient in (gradients or {}).items() if bool(gradient.isnan().any())}
        scores = self._checked_scores(records, gradients and {n: g.nan_to_num() for n, g in gradients.items()})
        if unknown:
            scores = _ranked_by_magnitude(records, scores, unknown)
        if self._rates is not None:
            scores = self._rates.weigh(scores)
        standing = self._standing_masks()
        records = [record for record in records if record.name not in standing]
        masks = {}
        if records:
            masks = self._masks(records, scores, sparsity, standing)
        if self._rates is not None:
            self._near = self._all_laid_out(self._near_threshold(records, self._zeros_last(scores), masks))
        self.masks_from(standing | masks)
        if self.criterion.gathers == "mean":
            for name, steps in self._gathered_steps.items():
                self._gathered[name] /= max(steps, 1)  # the last mean holds until there is another gradient
                self._gathered_steps[name] = 0

    def _checked_scores(self, records: Sequence[WeightMatrix], gradients: Mapping[str, Tensor] | None) -> dict:
        """ValueError where the criterion, which may be anybody's, does not give each weight a score."""
        scores, said = self.criterion.score(records, gradients), f"the criterion {self.criterion_name!r}"
        if not isinstance(scores, Mapping):
            raise ValueError(
                f"{said} returns a {type(scores).__name__}: a map, name of the weight -> scores, is needed"
            )
        for record in records:
            found = scores.get(record.name)
            if not isinstance(found, Tensor) or found.shape != record.weight.shape:
                given = f"scores of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"{found!r}"
                raise ValueError(
                    f"{said} gives {record.name} {given}; a score for each of {tuple(record.weight.shape)} is needed"
                )
        return scores

    def _masks(
        self,
        records: Sequence[WeightMatrix],
        scores: Mapping[str, Tensor],
        sparsity: float,
        standing: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """
        What the allocation chooses, of weights that were zero when the model came (`keep_zeros`) none.

        Raises:
            ValueError: it keeps one of those, as an allocation may that is not global.
        """
        # what others write as an allocation need not know of masks that stand
        scores = self._zeros_last(scores)
        masks = self.allocation.masks(records, scores, sparsity, *([standing] if standing else []))
        for name, mask in masks.items():
            if name in self._zeros and (back := int((mask & full_tensor(self._zeros[name])).sum())):
                raise ValueError(
                    f"keep_masks=True keeps the zeros that the model came with, and at a sparsity of {sparsity:.6g} "
                    f"with scope={self.allocation.scope!r} {name} has to get {back} of them back: prune single "
                    "weights with the scope 'global', without floors and layers' own sparsities, or use "
                    "keep_masks=False"
                )
        return masks

    def _zeros_last(self, scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Scores with those of the zeros that stay below all others: a weight that matters may have a 0, too."""
        zeros = {name: full_tensor(zero) for name, zero in self._zeros.items()}
        return {n: score.masked_fill(zeros[n], -math.inf) if n in zeros else score for n, score in scores.items()}

    def _near_threshold(
        self, records: Sequence[WeightMatrix], scores: Mapping[str, Tensor], masks: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        if hasattr(self.allocation, "near"):
            return self.allocation.near(records, scores, masks)
        return near_threshold(scores, masks)

    @property
    def frozen(self) -> list[str]:
        """The weights that are left alone at present: requires_grad=False."""
        return [name for name, weight in self.weights.items() if not weight.requires_grad]

    def _standing_masks(self) -> dict[str, Tensor]:
        masks = {name: ~full_tensor(self._pruned[name]) for name in self.frozen if name in self._pruned}
        return {
            name: masks.get(name, torch.ones(weight.shape, dtype=torch.bool, device=weight.device))
            for name, weight in self.weights.items()
            if not weight.requires_grad
        }

    @torch.no_grad()
    def finish(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """The schedule ends: masks stay as they are, and what is not zero is trained as ever."""
        if self.learns_scores:
            self._forget_moments(optimizer)
        for tensors in self._by_kind.values():
            tensors.clear()
        self._gathered_steps.clear()

    @torch.no_grad()
    def apply_(self) -> None:
        """Set the pruned weights to exactly zero."""
        weights = self.weights
        for name, pruned in self._pruned.items():
            if self.active:
                weights[name].copy_(self._dense[name])
            weights[name].masked_fill_(pruned, 0.0)

    def gradients(self) -> dict[str, Tensor]:
        """Copies of the gradients that there are, of pruned weights too, as the weights are sharded."""
        return {name: weight.grad.clone() for name, weight in self.weights.items() if weight.grad is not None}

    @torch.no_grad()
    def regrow(
        self, share: float, gradients: Mapping[str, Tensor], optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        """
        After the schedule: exchange a share of the kept weights for pruned ones (`exchanged`), as many. These begin at
        zero, without moments. Weights without a gradient, as frozen ones are, keep their masks.

        Args:
            gradients: of a step, from `gradients` before they were masked.
        """
        self.apply_()
        whole = {name: full_tensor(gradient).float() for name, gradient in gradients.items()}
        records, masks = self._whole_records(), {name: self.masks[name] for name in whole}
        given = None
        if self.criterion.gathers:  # the mean over this one step
            given = {r.name: whole.get(r.name, torch.zeros_like(r.weight)) for r in records}
        scores = self.criterion.score(records, given)
        records = [record for record in records if record.name in whole]
        found = exchanged(records, masks, scores, whole, share, self.allocation)
        for name, weight in self.weights.items():
            if name in found:
                grown = laid_out(found[name] & ~masks[name], weight)
                forget_moments_(getattr(optimizer, "state", {}).get(weight, {}), weight, grown)
        self.masks_from(self.masks | found)

    @torch.no_grad()
    def mask_gradients_(self) -> None:
        """Zero the gradients of pruned weights, so that clipping and moments see only what can move (frozen masks)."""
        weights = self.weights
        for name, pruned in self._pruned.items():
            if (gradient := weights[name].grad) is not None:
                gradient.masked_fill_(pruned, 0.0)

    @torch.no_grad()
    def set_gradients_aside_(self) -> dict[str, Tensor]:
        """
        Zero the gradients of pruned weights that may return, for as long as the norm is taken by which gradients are
        clipped: what is not there says nothing of how far the network may move. At 99 % they are several times as long
        as the others, whose steps they would cut short. What is not finite stays, for those who look for overflows.

        Returns:
            What was taken away, sharded as the gradients are, for `put_gradients_back_`.
        """
        aside = {}
        for name, weight in self.weights.items():  # in this order, so that a norm of them rounds alike when resumed
            if name in self._pruned and (gradient := weight.grad) is not None:
                taken = self._pruned[name] & gradient.isfinite()
                aside[name] = gradient.masked_fill(~taken, 0.0)
                gradient.masked_fill_(taken, 0.0)
        return aside

    @torch.no_grad()
    def put_gradients_back_(
        self, aside: Mapping[str, Tensor], factor: Tensor | float, cut: Tensor | None = None
    ) -> None:
        """
        Undo `set_gradients_aside_`, with the factor (a scalar) by which these gradients are clipped. `cut`: that over
        the factor of the others, which criteria that gather gradients leave out again.
        """
        weights, self._cut = self.weights, cut if self.active else None
        for name, gradient in aside.items():
            local(weights[name].grad).add_(local(gradient) * factor)

    # ---- masks and state from elsewhere ----

    def masks_from(self, masks: Mapping[str, Tensor]) -> None:
        """Take given masks (bool, True = kept). ValueError when names or shapes differ from the prunable weights."""
        weights = self.weights
        if masks and masks.keys() != weights.keys():
            odd = sorted(masks.keys() ^ weights.keys())
            raise ValueError(f"masks do not fit the model's prunable weights; differing names: {', '.join(odd[:5])}")
        for name, mask in masks.items():
            given, needed = tuple(mask.shape), tuple(weights[name].shape)
            if given != needed:
                raise ValueError(f"mask of {name} has shape {given}, its weight {needed}")
        self._pruned = self._all_laid_out({name: ~mask for name, mask in masks.items()})

    @torch.no_grad()
    def keep_zeros(self) -> None:
        """Take the zeros that the weights have now as masks: of a sparse checkpoint that is to be trained further."""
        self.masks_from({name: full_tensor(weight) != 0 for name, weight in self.weights.items()})
        self._zeros = dict(self._pruned)
        self.initial_sparsity = self.pruned_count / max(self.prunable_count, 1)

    def state(self) -> dict[str, Tensor]:
        """
        What a resumed run needs, by name: masks, zeros that stay, and, while the schedule runs, latent weights, scores
        and sums.
        """
        state = {f"mask.{name}": mask for name, mask in self.masks.items()}
        for kind, tensors in self._by_kind.items():
            state |= {f"{kind}.{name}": full_tensor(tensor) for name, tensor in tensors.items()}
        state["pruning.gathered_steps"] = torch.tensor([self._gathered_steps.get(name, 0) for name in self.records])
        state["pruning.initial_sparsity"] = torch.tensor(self.initial_sparsity, dtype=torch.float64)
        state |= {f"zero.{name}": full_tensor(zero) for name, zero in self._zeros.items()}
        if self._rates is not None:
            state |= {f"rate.{name}": tensor for name, tensor in self._rates.state().items()}
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """
        Go on from what `state` gave; keys that are not the pruner's are passed over.

        Raises:
            ValueError: the state is of another model, or of a run with another criterion or scope.
        """

        def part(kind: str) -> dict[str, Tensor]:
            return {name[len(kind) + 1 :]: tensor for name, tensor in state.items() if name.startswith(f"{kind}.")}

        dense, scores, gathered, rates = map(part, ("latent", "score", "gathered", "rate"))
        fits = bool(dense) <= self._latent and bool(scores) == (bool(dense) and self.criterion.learned)
        fits &= bool(gathered) == (bool(dense) and bool(self.criterion.gathers))
        if not fits or bool(rates) != (self._rates is not None):
            raise ValueError(
                f"the checkpoint is of a run with another way of pruning than criterion={self.criterion_name!r}, "
                f"scope={self.allocation.scope!r}, latent={self._latent}: resume with the options that it was started "
                "with"
            )
        self.masks_from(part("mask"))
        self._zeros = self._all_laid_out(part("zero"))  # the model may have more by now, which are masks
        for kind, tensors in self._by_kind.items():
            tensors.clear()
            tensors.update(self._all_laid_out(part(kind)))
        numbers = part("pruning")
        steps = numbers["gathered_steps"].tolist() if self._gathered else []
        self._gathered_steps = dict(zip(self.records, steps, strict=False))
        self.initial_sparsity = float(numbers.get("initial_sparsity", 0.0))
        if self._rates is not None:
            self._rates.load(rates)

    # ---- inside ----

    @property
    def _by_kind(self) -> dict[str, dict[str, Tensor]]:
        """What there is while the schedule runs, under the names that a state has for it."""
        return {"latent": self._dense, "score": self._scores, "gathered": self._gathered, "rate.near": self._near}

    def _all_laid_out(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: laid_out(tensor, self._weight(name)) for name, tensor in tensors.items()}

    def _whole_records(self) -> list[WeightMatrix]:
        """Records with the values that count: scores, latent weights, or the weights; whole, float32, no gradient."""
        values = self._scores or self._dense or self.weights
        return [replace(r, weight=full_tensor(values[name].detach()).float()) for name, r in self.records.items()]

    def _whole_gradients(self) -> dict[str, Tensor] | None:
        if not self.criterion.gathers:
            return None
        mean = self.criterion.gathers == "mean"
        counts = {name: max(steps, 1) if mean else 1 for name, steps in self._gathered_steps.items()}
        whole = {name: full_tensor(gathered).float() / counts[name] for name, gathered in self._gathered.items()}
        if all(bool(gathered.isnan().any()) for gathered in whole.values()):
            raise ValueError(
                f"the criterion {self.criterion_name!r} needs gradients and there were none: call begin(), and "
                "before_step() after each backward, before the masks are chosen"
            )
        return whole

    def _forget_moments(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Moments of weights say nothing of scores, nor those of scores of weights: start anew."""
        states = getattr(optimizer, "state", {})
        for weight in self.weights.values():
            states.pop(weight, None)


def _ranked_by_magnitude(
    records: Sequence[WeightMatrix], scores: Mapping[str, Tensor], unknown: set[str]
) -> dict[str, Tensor]:
    """
    Scores where some weights have never had a gradient. Of those nothing is known but their magnitude: the smallest
    gets the smallest of the other weights' scores, the median their median and so on, so that such a layer is pruned
    as much as the others are on the whole, neither more nor less.
    """
    known = torch.cat([score.flatten() for name, score in scores.items() if name not in unknown]).sort().values
    ranked = dict(scores)
    for record in records:
        if record.name in unknown:
            weight = record.weight.abs().flatten()
            place = torch.linspace(0, len(known) - 1, len(weight), device=known.device).round().long()
            values = known.new_empty(len(weight)).scatter_(0, weight.argsort(stable=True), known[place])
            ranked[record.name] = values.view(record.weight.shape)
    return ranked
