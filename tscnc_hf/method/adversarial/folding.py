"""Cheaper attacks on convolutional networks: in evaluation mode a batch norm is but an affine map of its input."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.fusion import fuse_conv_bn_weights

from tscnc_hf.method.adversarial.pixels import attack_mode, logits_of
from tscnc_hf.method.copying import copied
from tscnc_hf.method.weight_use import why_computed


TOLERANCE = 1e-2  # of the largest logit: rounding is at most 1e-3 of it (TF32), a wrong fold about its own size
Run = Callable[[nn.Module], object]  # one forward pass of the module that it is given


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody has put a hook on it, which nothing else in its place would call."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name, None) for name in names)


class FoldedCopy:
    """
    A copy of a model in evaluation mode in which every batch norm that follows a convolution is folded into it. The
    pixel gradients are those of the model up to rounding, and cost about a tenth less. Holds one copy of the weights.

    Attributes:
        model (`nn.Module`): the copy, to be called; its weights are those of the last `refresh`.
        pairs (`tuple`): names of (convolution, batch norm) that were folded.
    """

    def __init__(self, source: nn.Module, pairs: list[tuple[str, str]]):
        self.source, self.pairs = source, tuple(pairs)
        self.model = copied(source).eval().requires_grad_(False)
        for conv_name, norm_name in pairs:
            conv = self.model.get_submodule(conv_name)
            bias = conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias
            # of its own: another layer may have the same weight, and another norm behind it
            for name, tensor in (("weight", conv.weight), ("bias", bias)):
                setattr(conv, name, nn.Parameter(tensor.detach().clone(), requires_grad=False))
            parent, _, child = norm_name.rpartition(".")
            # what a layer does beside normalising stays: the parts of timm's BatchNormAct2d, or nothing
            rest = nn.Sequential(*self.model.get_submodule(norm_name).children())
            setattr(self.model.get_submodule(parent), child, rest)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the weights and statistics that the source has now."""
        own, now = _tensors(self.model), _tensors(self.source)
        folded = {id(own[f"{conv_name}.{key}"]) for conv_name, _ in self.pairs for key in ("weight", "bias")}
        for name, tensor in own.items():
            if id(tensor) not in folded:
                tensor.copy_(now[name])
        for conv_name, norm_name in self.pairs:
            conv, norm = self.source.get_submodule(conv_name), self.source.get_submodule(norm_name)
            weight, bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            own[f"{conv_name}.weight"].copy_(weight)
            own[f"{conv_name}.bias"].copy_(bias)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under all their names."""
    return {
        name: tensor
        for named in (model.named_parameters, model.named_buffers)
        for name, tensor in named(remove_duplicate=False)
    }


@torch.no_grad()
def folded_copy(model: nn.Module, inputs: Tensor, run: Run | None = None) -> FoldedCopy | None:
    """
    The copy, or None where there is nothing to fold, or where the folded network would not answer as the model does,
    whatever its statistics will be: a convolution whose output goes to two places, or is called twice.

    Which norm follows which convolution is read off one forward pass of `inputs` (b, c, h, w), in evaluation mode, or
    of what `run` calls a model with, which takes more than images.
    """
    if any(is_hooked(module) or type(module).__name__ == "OptimizedModule" for module in model.modules()):
        return None  # gates, or somebody's own instruments: their effect on a copy is not ours to guess
    names = {module: name for name, module in model.named_modules()}
    made: dict[int, tuple[str, Tensor]] = {}  # keeps the tensors: a freed one's id would be given out again
    pairs: dict[str, str] = {}

    def after_conv(module: nn.Module, args: tuple, output: Tensor) -> None:
        made[id(output)] = (names[module], output)

    def before_norm(module: nn.Module, args: tuple) -> None:
        if args and id(args[0]) in made and module.track_running_stats and module.running_mean is not None:
            pairs.setdefault(made[id(args[0])][0], names[module])

    with ExitStack() as hooks, attack_mode(model):
        for module in model.modules():
            plain = isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd)
            if plain and not why_computed(module):  # what a weight is computed from can not be scaled
                hooks.enter_context(module.register_forward_hook(after_conv))
            elif isinstance(module, _BatchNorm):
                hooks.enter_context(module.register_forward_pre_hook(before_norm))
        model(inputs) if run is None else run(model)
    made.clear()
    if not pairs:
        return None
    found = list(pairs.items())
    return FoldedCopy(model, found) if _folds_well(model, found, inputs, run) else None


def _folds_well(model: nn.Module, pairs: list[tuple[str, str]], inputs: Tensor, run: Run | None) -> bool:
    """
    Whether the folded network is the same function, tried on a copy in float32 whose statistics and factors are drawn
    at random: fresh batch norms change next to nothing, and then a wrong fold changes nothing either.
    """
    probe = copied(model).eval().float()
    if "_original_forward" in vars(probe):  # accelerate's autocast would round away what is looked for
        probe.forward = probe._original_forward
    generator = torch.Generator().manual_seed(0)

    def drawn(tensor: Tensor, low: float, high: float) -> Tensor:
        return torch.empty(tensor.shape).uniform_(low, high, generator=generator).to(tensor.device)

    for module in probe.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats and module.running_mean is not None:
            mean, variance, weight = module.running_mean, module.running_var, module.weight
            mean.add_(drawn(mean, -0.5, 0.5) * variance.sqrt())
            variance.mul_(drawn(variance, 0.5, 2.0))
            if weight is not None:  # a branch that starts at zero counts as well
                weight.copy_(torch.where(weight == 0, 1.0, weight) * drawn(weight, 0.5, 1.5))
    inputs = inputs.float()
    run = run or (lambda net: net(inputs))
    expected, without = logits_of(run(probe)).float(), FoldedCopy(probe, pairs).model
    try:
        folded = logits_of(run(without)).float()
    except Exception:  # of a model that reads more of a norm than its output
        return False
    difference = (folded - expected).abs().max()
    return bool(difference <= TOLERANCE * expected.abs().max().clamp(min=1e-6))
