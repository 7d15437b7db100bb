"""What a forward pass costs: multiply-accumulates, of the dense network and of its non-zero weights only."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tscnc_hf.method.copying import copied
from tscnc_hf.method.matrices import LAYERS, full_tensor
from tscnc_hf.method.reports.places import weight_places
from tscnc_hf.method.reports.report import Report, markdown_table


# products of two activations, where no weight takes part (in anything but a linear layer or convolution)
PRODUCTS = ("bmm", "baddbmm", "scaled_dot_product", "attention_forward")


@dataclass(frozen=True)
class LayerFlops:
    """
    What one module costs itself, without the modules inside it.

    Attributes:
        name: of the module; of an attention, its products of queries, keys and values.
        macs: multiply-accumulates of one forward pass.
        nonzero: fraction of the module's prunable weights that are not zero; 1 where it has none.
        sparse_macs: the multiply-accumulates that a non-zero weight takes part in: macs x nonzero, and all of the
            products of activations.
    """

    name: str
    macs: int
    nonzero: float
    sparse_macs: int


@dataclass(frozen=True)
class FlopsReport(Report):
    """
    Multiply-accumulates of one forward pass; a FLOP count is twice that (one multiplication, one addition).

    Counted are convolutions, linear layers and the products inside an attention, as `torch.utils.flop_counter` does;
    not norms, activations, softmax, biases and pooling. `sparse_macs` is what an engine would do that skipped every
    zero weight for free; on dense kernels, zeros save nothing until they are cut out (`slim`).

    Attributes:
        rows: one per module that multiplies, in the order of the modules.
        input_shape: of the input, batch first.
        macs, sparse_macs: over all rows.
    """

    rows: tuple[LayerFlops, ...]
    input_shape: tuple[int, ...]
    macs: int
    sparse_macs: int

    SUMMARY = ("flops", "sparse_flops")

    @property
    def flops(self) -> int:
        return 2 * self.macs

    @property
    def sparse_flops(self) -> int:
        return 2 * self.sparse_macs

    def to_markdown(self) -> str:
        rows = [(f"`{r.name}`", f"{r.macs:,}", f"{r.nonzero:.2%}", f"{r.sparse_macs:,}") for r in self.rows]
        share = self.sparse_macs / max(self.macs, 1)
        rows.append(("all", f"{self.macs:,}", f"{share:.2%} of the MACs", f"{self.sparse_macs:,}"))
        return markdown_table(("layer", "MACs", "non-zero weights", "MACs of those"), rows)


@torch.no_grad()
def flops_report(model: nn.Module, input_shape: Sequence[int]) -> FlopsReport:
    """
    Count what a forward pass in evaluation mode multiplies. Nothing is computed (shapes only) and the model keeps its
    state.

    Args:
        model (`nn.Module`): takes one tensor, e.g. images.
        input_shape (`Sequence[int]`): (b, c, h, w); with b = 1 the cost of an image.

    Raises:
        ValueError: the forward pass failed on this shape, or needs more than shapes.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    counter = FlopCounterMode(display=False)
    shapes = _without_data(model).eval()
    try:
        with counter:
            shapes(torch.empty(tuple(input_shape), device="meta", dtype=dtype))
    except (RuntimeError, ValueError, AssertionError, TypeError, NotImplementedError) as error:
        raise ValueError(
            f"the forward pass of {type(model).__name__} could not be followed on an input of shape "
            f"{tuple(input_shape)}, which should be (b, c, h, w): {error}"
        ) from error
    root = type(model).__name__
    inclusive = {
        name.removeprefix(root).lstrip("."): {getattr(op, "__name__", str(op)): n for op, n in counts.items()}
        for name, counts in counter.get_flop_counts().items()
        if name == root or name.startswith(f"{root}.")
    }
    own = {name: Counter(counts) for name, counts in inclusive.items()}
    for name, counts in inclusive.items():
        if name:
            own[_around(name, inclusive)].subtract(counts)
    nonzero, total = Counter(), Counter()  # of the prunable weights that a module multiplies with
    for record, layers in weight_places(model):
        left, size = int(torch.count_nonzero(full_tensor(record.weight))), record.weight.numel()
        for names in layers.values():
            called = [name for name in names if name.rpartition(".")[0] in inclusive]
            for name in called or names:
                nonzero[_around(name, inclusive)] += left
                total[_around(name, inclusive)] += size
    rows, places = [], [name for name, _ in model.named_modules(remove_duplicate=False)]
    for name in [name for name in places if sum(own.get(name, {}).values())]:
        macs = {op: flops // 2 for op, flops in own[name].items()}
        share = nonzero[name] / total[name] if total[name] else 1.0
        layer = isinstance(model.get_submodule(name), LAYERS)
        products = 0 if layer else sum(n for op, n in macs.items() if any(word in op for word in PRODUCTS))
        multiplied = sum(macs.values()) - products
        rows.append(LayerFlops(name, multiplied + products, share, round(multiplied * share) + products))
    return FlopsReport(
        tuple(rows), tuple(input_shape), sum(row.macs for row in rows), sum(row.sparse_macs for row in rows)
    )


def _without_data(model: nn.Module) -> nn.Module:
    """A copy on the meta device that never held the weights."""
    memo: dict[int, object] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = torch.empty_like(tensor, device="meta")
        # trained ones that go into a module as they are (CaiT's token) would be asked for their gradient function
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    return _in_one_place(copied(model, memo), set())


def _in_one_place(model: nn.Module, seen: set[nn.Module]) -> nn.Module:
    """With a module of its own wherever the same one stands again: torch counts what it does under one name only."""
    for name, child in model._modules.items():
        if child in seen:
            model._modules[name] = child = copy.deepcopy(child)
        if child is not None:
            seen.add(child)
            _in_one_place(child, seen)
    return model


def _around(name: str, counted: dict) -> str:
    """The nearest module around that was called, at last the whole model."""
    name = name.rpartition(".")[0]
    return name if not name or name in counted else _around(name, counted)
