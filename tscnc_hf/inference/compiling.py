"""A copy of a model that skips the zeros in its weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tscnc_hf.inference.blocks import fuse_blocks
from tscnc_hf.inference.choosing import Choice, choose, choose_pair
from tscnc_hf.inference.chunks import InChunks, torch_threads
from tscnc_hf.inference.following import Call, activation_of, calls_of, chain_after, is_plain, is_watched
from tscnc_hf.inference.layers import (
    Absorbed,
    SparseConvBlock,
    SparseConvImages,
    SparseLinear,
    SparseMLP,
    WeightIsRead,
)
from tscnc_hf.inference.operators import machine
from tscnc_hf.inference.report import CompileReport, LayerRow, logits_difference
from tscnc_hf.inference.timing import interleaved, race, ratios
from tscnc_hf.method.adversarial.folding import folded_copy
from tscnc_hf.method.adversarial.pixels import logits_of
from tscnc_hf.method.copying import copied


TOLERANCE = 1e-4  # of the range of the logits, or of the largest
SECONDS = 1.0  # for each comparison of whole models
MARGIN = 0.98  # of the time before: what gains less is left as it was
TURNS = 9  # of each, at least; and of the model beside the best copy, which then says whether that gains
BURST = 0.01  # seconds of each in its turn, two calls at least: into the first one others' threads still spin

Inputs = Tensor | Mapping[str, Tensor]


class Tried(NamedTuple):
    """Inputs that a copy is tried with, and the model's logits of them."""

    inputs: Inputs
    expected: Tensor


class Refused:
    """In the place of a copy's method that would take its packed weights for a model's."""

    def __init__(self, method: str):
        self.method = method

    def __call__(self, *args, **kwargs):
        raise ValueError(
            f"{self.method} of a copy by sparse_compile: it holds packed weights, which no model loads. Take it from "
            "the model that the copy was compiled from"
        )


def sparse_compile(model: nn.Module, example: Inputs) -> nn.Module:
    """
    A copy of a classifier, for the CPU and inference only, that computes the same, and faster the more of its weights
    are zero. Linear layers and ungrouped convolutions are replaced where a sparse kernel is faster, as measured on the
    example with as many threads as torch has now; batch norms are folded. Where nothing is gained the copy is as the
    model was. Batches of other sizes, and images of other sizes that the model takes, work, too.

    Args:
        model: float32, on the CPU, in evaluation mode. Stays as it is.
        example: images (n, c, h, w), float32, or a mapping of the model's arguments, such as a processor returns: of
            the batch size and the image size that it is to be fast for.

    Returns:
        The copy. Its `report` (`CompileReport`) says what became of each layer: `print(fast.report.to_markdown())`.

    Raises:
        ValueError: the model is in training mode, is not on the CPU or not in float32, or the example is not; or the
            model's own logits of the example are not numbers (NaN).
        NoKernels: the kernels cannot be compiled: there is no compiler, or no folder to keep them in.
        RuntimeError: the copy would not compute the same, which is a bug.
    """
    _check(model, example)
    machine()
    # whatever the caller has set: a copy made in inference mode or under autocast would be for these only
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        plain = copied(model).requires_grad_(False)
        tried = _tried(plain, example)
        base = _folded(plain, example)
        if base is not plain and not _answers(base, tried):
            base = plain
        models, plans, first = {"before": plain}, {}, {}
        for images, apart in _at_a_time(plain, example):
            part, made = _first(example, images), {}
            tried_part = tried if images is None else _tried(plain, part)
            with torch_threads(1 if apart else torch.get_num_threads()):
                calls = calls_of(base, (nn.Linear, nn.Conv2d), lambda part=part: _run(base, part))
                layers = [call for call in calls.values() if type(call.module) in (nn.Linear, nn.Conv2d)]
                layers = [call for call in layers if not is_watched(call.module)]
                alike: dict[tuple, Choice] = {}
                choices = {call.name: choose(call, alike) for call in layers}
                first = first or choices
                pairs: dict[tuple, SparseConvBlock | None] = {}
                for kind, plan in _plans(choices).items():
                    made[kind] = *_built(base, plan, calls, tried_part, pairs), plan
            for kind, (net, left, plan) in made.items():
                if net is None:
                    continue
                if images is not None:
                    net.forward = InChunks(net, images, apart)
                    if not _answers(net, tried):  # images see one another
                        continue
                name = f"{kind}, {images}, {apart}"
                models[name], plans[name] = net, (images, apart, choices, plan, left)
        calls = {name: _call(net, example) for name, net in models.items()}
        times = race(calls, dict.fromkeys(models), SECONDS, least=TURNS, burst=BURST)
        best = min(times, key=times.__getitem__)
        before, after = _beside(calls["before"], calls[best])
        said = ""
        if best == "before" or after > MARGIN * before:
            best, after = "before", before
            zeros = sum(c.zeros * c.call.module.weight.numel() for c in first.values())
            share = zeros / max(1, sum(c.call.module.weight.numel() for c in first.values()))
            said = f"Left as it was: with {share:.0%} zeros nothing is gained here."
        fast = models[best]
        images, apart, choices, chosen, left = plans.get(best, (None, False, first, {}, ""))
        if images is not None:
            each = " by each thread" if apart else ""
            said = f"Computed {images} images at a time{each}, which the layers' times are of."
        said = " ".join(filter(None, [said, left]))
        rows = [_row(choice, chosen.get(name)) for name, choice in choices.items()]
        difference = logits_difference(_logits(fast, example), tried[0].expected)
    shape = tuple(_tensors(example)[0].shape)
    if best != "before" and hasattr(fast, "save_pretrained"):
        fast.save_pretrained = Refused("save_pretrained")
    fast.report = CompileReport(rows, before, after, difference, torch.get_num_threads(), shape, said)
    return fast


def _beside(one: Callable[[], object], other: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds: the median of one, and as many times that as the other takes in the middle of the turns."""
    times = interleaved({"one": one, "other": other}, SECONDS, least=TURNS, most=4 * TURNS, burst=BURST)
    median = times["one"].median
    return median, median * ratios(times["other"].calls, times["one"].calls).median


def _check(model: nn.Module, example: Inputs) -> None:
    if any(module.training for module in model.modules()):
        raise ValueError("the model is in training mode: a compiled model is for inference, call model.eval() first")
    for name, module in model.named_modules():
        if isinstance(getattr(module, "weight_orig", None), nn.Parameter):
            raise ValueError(
                f"{name}.weight is computed anew in each call, by torch.nn.utils.prune or its like: make it final "
                "first, torch.nn.utils.prune.remove(layer, 'weight')"
            )
    for what, tensors in (
        ("the model", [*model.parameters(), *model.buffers()]),
        ("the example", _tensors(example)),
    ):
        for tensor in tensors:
            if tensor.device.type != "cpu":
                raise ValueError(f"{what} is on {tensor.device}: the kernels are for CPUs; move it with .to('cpu')")
            if tensor.is_floating_point() and tensor.dtype != torch.float32:
                raise ValueError(f"{what} is {tensor.dtype}: the kernels compute in float32; convert it with .float()")


def _tensors(example: Inputs) -> list[Tensor]:
    found = [example] if isinstance(example, Tensor) else [t for t in example.values() if isinstance(t, Tensor)]
    if not found or any(t.numel() == 0 for t in found):
        raise ValueError("example: give images (n, c, h, w) with at least one image, or a mapping that holds them")
    return found


def _run(model: nn.Module, example: Inputs) -> object:
    return model(example) if isinstance(example, Tensor) else model(**example)


def _call(model: nn.Module, example: Inputs) -> Callable[[], object]:
    return lambda: _run(model, example)


def _logits(model: nn.Module, example: Inputs) -> Tensor:
    return logits_of(_run(model, example))


def _tried(model: nn.Module, example: Inputs) -> list[Tried]:
    """
    What a copy of the model is tried with: the example, which may say nothing (zeros); images drawn at random of its
    shape; and one more of these, as what a model does may depend on their number. The latter where the model takes it.
    """
    tried = [Tried(example, _logits(model, example))]
    if tried[0].expected.isnan().any():
        raise ValueError(
            "the model's own logits of the example are not numbers (NaN), so that no copy can be compared with it: "
            "give an example that it has an answer to, or mend its weights"
        )
    for inputs in (_drawn(example), _drawn(_one_more(example))):
        with suppress(Exception):  # what a model does with images that nobody has asked for is its own affair
            expected = _logits(model, inputs)
            if not expected.isnan().any():
                tried.append(Tried(inputs, expected))
    return tried


def _drawn(example: Inputs) -> Inputs:
    generator = torch.Generator().manual_seed(0)  # of its own: that of torch belongs to the caller

    def drawn(value: object) -> object:
        known = isinstance(value, Tensor) and value.is_floating_point()
        return torch.randn(value.shape, generator=generator, dtype=value.dtype) if known else value

    return drawn(example) if isinstance(example, Tensor) else {name: drawn(value) for name, value in example.items()}


def _one_more(example: Inputs) -> Inputs:
    def more(value: object) -> object:
        return torch.cat([value, value[:1]]) if isinstance(value, Tensor) and value.ndim else value

    return more(example) if isinstance(example, Tensor) else {name: more(value) for name, value in example.items()}


def _difference(model: nn.Module, tried: list[Tried]) -> float:
    """The largest of all that was tried."""
    return max(logits_difference(_logits(model, inputs), expected) for inputs, expected in tried)


def _answers(model: nn.Module, tried: list[Tried]) -> bool:
    """Whether it computes the same; not if it cannot be called as the model can."""
    try:
        return _difference(model, tried) <= TOLERANCE
    except Exception:  # of a model's code that reads what a module in another's place has not
        return False


def _at_a_time(model: nn.Module, example: Inputs) -> list[tuple[int | None, bool]]:
    """
    Numbers of images to try: all of them (None), and as many as vectors have lanes, of one thread or of all. True
    beside one: each thread takes so many from the first layer to the last.
    """
    lengths, lanes, threads = {len(tensor) for tensor in _tensors(example)}, machine()[0], torch.get_num_threads()
    if len(lengths) != 1 or "forward" in vars(model):  # somebody put it in the place of its class's
        return [(None, False)]
    images = lengths.pop()
    sizes = sorted({size for size in (lanes, lanes * threads) if size < images})
    apart = [(lanes, True)] if threads > 1 and images >= lanes * threads else []
    return [(None, False), *((size, False) for size in sizes), *apart]


def _first(example: Inputs, images: int | None) -> Inputs:
    if images is None:
        return example
    if isinstance(example, Tensor):
        return example[:images]
    return {name: value[:images] if isinstance(value, Tensor) else value for name, value in example.items()}


def _folded(model: nn.Module, example: Inputs) -> nn.Module:
    """With batch norms folded into convolutions, where that is the same function."""
    images = next((tensor for tensor in _tensors(example) if tensor.ndim == 4), None)
    folded = None if images is None else folded_copy(model, images, lambda net: _run(net, example))
    return model if folded is None else folded.model


def _plans(choices: dict[str, Choice]) -> dict[str, dict[str, nn.Module]]:
    """Sparse layers by name. Whether images lie innermost concerns what is between layers, so both are tried."""

    def pick(kinds: Callable[[str], bool], dense: Callable[[Choice], float]) -> dict[str, nn.Module]:
        picked = {}
        for name, choice in choices.items():
            kernels = {kind: kernel for kind, kernel in choice.kernels.items() if kinds(kind)}
            if kernels:
                layer, took = min(kernels.values(), key=lambda kernel: kernel[1])
                if took < dense(choice):
                    picked[name] = layer
        return picked

    images = SparseConvImages.kind
    plans = {
        "pixels": pick(lambda kind: kind != images, lambda choice: choice.dense_ms),
        "fastest": pick(lambda kind: True, lambda choice: choice.dense_ms),
        # every convolution that can: no change of layout in between
        "images": pick(
            lambda kind: kind in (images, SparseLinear.kind),
            lambda choice: choice.dense_ms * (2 if images in choice.kernels else 1),
        ),
    }
    different: dict[str, dict[str, nn.Module]] = {}
    for name, plan in plans.items():
        if plan and plan not in different.values():
            different[name] = plan
    return different


def _built(
    base: nn.Module,
    plan: dict[str, nn.Module],
    calls: dict[str, Call],
    tried: list[Tried],
    pairs: dict[tuple, SparseConvBlock | None],
) -> tuple[nn.Module | None, str]:
    """
    A copy with the plan's layers in it, tried; but those of which more is read than their output stay. None if no
    layer is left. And what was left out because the model would not bear it, as a sentence.
    """
    plan, fusions, blocks, left = dict(plan), None, True, ""
    while plan:
        made = copy.deepcopy(base)
        placed = {name: copy.copy(layer) for name, layer in plan.items()}
        for name, layer in placed.items():
            _replace(made, name, layer)
        fused = _fuse(made, placed, calls, fusions)

        def pair(one: str, two: str, placed=placed) -> SparseConvBlock | None:
            return choose_pair((calls[one], placed[one]), (calls[two], placed[two]), pairs)

        try:
            blocks = blocks and fuse_blocks(made, pair) > 0
            made.eval()  # what was put into it is in training mode, as all new modules are
            # without fusions only what the model was tried with counts: others' rounding may turn a choice of its own
            difference = _difference(made, tried if blocks or fused else tried[:1])
        except Exception as error:  # a sum larger than the layer's output; code that reads what was replaced
            if stays := {name for name, layer in placed.items() if layer is _read_of(error)}:
                plan = {name: layer for name, layer in plan.items() if name not in stays}
                continue
            if not blocks and not fused:
                raise
            difference, why = math.inf, f" ({type(error).__name__}: {str(error).partition(chr(10))[0][:80]})"
        else:
            why = ""
        if difference <= TOLERANCE:
            return made, left
        if blocks:
            blocks, left = False, f"No sums, norms or attention of blocks were fused: the model does not bear it{why}."
            continue
        if not fused:
            raise RuntimeError(
                f"the compiled model's logits differ by {difference:.1e} of their range or size, more than "
                f"{TOLERANCE}: please report this with the model's architecture"
            )
        # an output that goes to two places, one of them unseen: without the fusion that does harm, or any
        fusions = set() if fusions is not None else _harmless(base, plan, calls, tried, fused)
    return None, ""


def _read_of(error: Exception) -> object:
    """The module that has not what the model's code reads of it."""
    return error.args[1] if isinstance(error, WeightIsRead) else getattr(error, "obj", None)


def _harmless(
    base: nn.Module,
    plan: dict[str, nn.Module],
    calls: dict[str, Call],
    tried: list[Tried],
    fused: set[str],
) -> set[str]:
    """Those layers whose fusion with what follows alone leaves the logits as they are."""
    kept = set()
    for name in fused:
        made, layer = copy.deepcopy(base), copy.copy(plan[name])
        placed = {name: layer} | {
            after.name: copy.copy(plan[after.name]) for after in chain_after(name, calls) if after.name in plan
        }
        for place, module in placed.items():
            _replace(made, place, module)
        _fuse(made, placed, calls, {name})
        if _answers(made, tried):
            kept.add(name)
    return kept


def _fuse(
    model: nn.Module, placed: dict[str, nn.Module], calls: dict[str, Call], only: set[str] | None = None
) -> set[str]:
    """
    Activations into the layers before them, and two linear layers with an activation between into one module.

    Args:
        placed: the sparse layers, by name, which are in the model.
        only: names of the layers that may be fused with what follows; by default all.

    Returns:
        Names of the layers that were.
    """
    fused, taken = set(), set()
    for name, layer in placed.items():
        if calls[name].calls != 1 or name in taken or (only is not None and name not in only):
            continue
        for after in chain_after(name, calls):
            if is_watched(after.module):
                break
            if after.name in placed:
                second = placed[after.name]
                if _is_long(calls[name], layer) and isinstance(second, SparseLinear):
                    if second.vectors != layer.vectors:
                        second = SparseLinear(after.module, layer.vectors, second.block_features)
                    _replace(model, name, SparseMLP(layer, second))
                    _replace(model, after.name, Absorbed(second))
                    fused.add(name)
                    taken.add(after.name)
                break
            function = activation_of(after.module) if is_plain(after.module) else None
            if function is None or (function != "none" and layer.activation != "none"):
                break
            if function != "none":
                layer.activation = function
                _replace(model, after.name, nn.Identity())
                fused.add(name)
    return fused


def _is_long(call: Call, layer: nn.Module) -> bool:
    """Whether a linear layer has tokens enough for all threads: two layers at once share out nothing else."""
    if not isinstance(layer, SparseLinear):
        return False
    return math.prod(call.shape[:-1]) >= 4 * torch.get_num_threads() * layer.vectors * machine()[0]


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _row(choice: Choice, chosen: nn.Module | None) -> LayerRow:
    times = [took for _, took in choice.kernels.values()]
    kinds = {kind: took for kind, (_, took) in choice.kernels.items()}
    sparse = min(times, default=float("nan")) if chosen is None else kinds[chosen.kind]
    return LayerRow(
        choice.call.name,
        tuple(choice.call.module.weight.shape),
        choice.zeros,
        choice.dense_ms,
        sparse,
        "dense" if chosen is None else chosen.kind,
    )
