"""Cut dead channels, hidden units and attention heads out of a network for good, with the same outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from tscnc_hf.method.adversarial.pixels import logits_of
from tscnc_hf.method.copying import copied
from tscnc_hf.method.reports.flops import flops_report
from tscnc_hf.method.reports.report import Report, by, markdown_table
from tscnc_hf.method.units.dead import DeadUnits, find_dead_units
from tscnc_hf.method.units.gates import fold_gates_
from tscnc_hf.method.units.groups import KINDS, structure_groups
from tscnc_hf.method.units.sites import HEAD_COUNTS
from tscnc_hf.method.units.widths import HEAD_CHANNELS, follow_shapes_, replace_tensor_
from tscnc_hf.method.weight_use import why_computed


EQUAL = 1e-6  # of the largest logit, in float64 (an attention may take its softmax in float32): a wrong cut moves more


@torch.no_grad()
def cut_dead_units(
    model: nn.Module,
    example_inputs: Tensor | None = None,
    multiple_of: int = 1,
    uniform: bool = False,
    kinds: Sequence[str] = KINDS,
) -> tuple[nn.Module, SlimReport]:
    """
    A smaller dense copy of a model with the same outputs in evaluation mode. `tscnc_hf.slim` is this and keeps the
    config of a transformers model true.

    A unit of a `structure_groups` group is cut out if it is exactly dead:
    * nobody reads it: all weights that read it are zero;
    * or all weights that make it are zero (of a head: those of its values), so that it is the same number whatever
      the input. 0 is cut; another constant is first added to the bias of the reading layer (or taken off the running
      mean of the batch norm behind it), where that is exact: not if the reader, or a depthwise convolution on the
      way, pads with zeros, nor if squeeze-excitation multiplies it.

    Everything else stays: residual streams (which all blocks of a stage share), units that are only inactive on some
    inputs, tied weights, grouped convolutions; the report says where and why. One unit of a group always stays. After
    the cut both models are run in float64 on the example inputs and on noise of their shape; a group after whose cut
    the outputs differ is left alone. Needs memory for about three more copies of the weights in float64.

    Args:
        model (`nn.Module`): not changed. Gates are folded in the copy. The copy is in evaluation mode if the model is.
        example_inputs (`Tensor`, *optional*): a batch that the model takes, e.g. `torch.randn(2, 3, 32, 32)`. By
            default one like this, of the shape that the config (or timm's `pretrained_cfg`) names.
        multiple_of (`int`): keep this many units, or a multiple, of channels and hidden units, by leaving dead ones
            in, for kernels that like 8 or 16. Odd widths cost nothing on the CPU that `make bench-slimming` ran on.
        uniform (`bool`): keep the same share of units in every group of a kind (as many as the fullest one needs), so
            that the config can say it more often.
        kinds (`Sequence[str]`): which of "channels", "hidden", "heads" to cut.

    Returns:
        The copy and its `SlimReport`.

    Raises:
        ValueError: no example inputs and no shape known, inputs that the model does not take, a model that is sharded,
            compiled or wrapped, or an argument out of range.
    """
    if multiple_of < 1 or set(kinds) - set(KINDS):
        raise ValueError(f"multiple_of={multiple_of} must be at least 1, kinds={kinds} a choice of {', '.join(KINDS)}")
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        raise ValueError("the model is sharded over processes: gather it first (e.g. save it and load it in one)")
    generator = torch.Generator().manual_seed(0)
    if example_inputs is None:
        example_inputs = torch.randn(2, *_input_shape(model), generator=generator)
    _check_forward(model)
    slimmed = copied(model)
    fold_gates_(slimmed)
    exact = copied(slimmed).double().eval()
    noise = 2 * torch.randn(example_inputs.shape, generator=generator, dtype=torch.float64)
    inputs = torch.cat([example_inputs.detach().cpu().double(), noise]).to(next(exact.parameters()).device)
    parameters = sum(p.numel() for p in slimmed.parameters())
    rows: dict[str, SlimRow] = {}
    expected = before = None
    while True:  # what only a dead unit read is dead as well
        found, outputs = find_dead_units(exact, inputs, kinds)
        expected = outputs if expected is None else expected
        _choose(found, {name: row.units for name, row in rows.items()}, multiple_of, uniform)
        _leave_alone_what_matters(exact, found, inputs, expected)
        rows |= {dead.group.name: _row(dead, rows.get(dead.group.name)) for dead in found}  # one unit is no group
        if before is None:
            before = flops_report(slimmed, (1, *inputs.shape[1:]))
        if all(dead.keep.all() for dead in found):
            break
        _cut_(exact, found)
        _cut_(slimmed, found)
    report = SlimReport(
        rows=tuple(rows.values()),
        parameters_before=parameters,
        parameters_after=sum(p.numel() for p in slimmed.parameters()),
        macs_before=before.macs,
        macs_after=flops_report(slimmed, before.input_shape).macs,
        input_shape=before.input_shape,
        difference=_relative(outputs, expected),
    )
    return slimmed, report


@torch.no_grad()
def why_not_cut(model: nn.Module, kinds: Sequence[str] = KINDS) -> dict[str, str]:
    """
    The groups whose units stay, whatever is zeroed: name -> why. Tried, with one zeroed unit in each group of a copy
    on the CPU: the attention of some networks (CaiT, DaViT, MetaFormer) cannot have fewer heads, and nothing but its
    forward code says so.

    Raises:
        ValueError: the model does not say how large its inputs are, or `cut_dead_units` cannot be tried on it.
    """
    shape = _input_shape(model)
    tried = copied(model).cpu()
    for group in structure_groups(tried):
        keep = torch.ones(group.count, dtype=torch.bool)
        keep[-1] = group.count < 2
        for name, mask in group.unit_masks(keep).items():
            if not group.blocked:
                tried.get_parameter(name).mul_(mask)
    _, report = cut_dead_units(tried, torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)), kinds=kinds)
    return {row.name: row.why for row in report.rows if row.kept == row.units > 1}


def _check_forward(model: nn.Module) -> None:
    """
    A copy whose forward is that of the model it was copied from would agree with it whatever is cut. One by
    `sparse_compile` has no weights to cut, and a weight that is computed in each call cannot be copied.
    """
    for name, module in model.named_modules():
        if by := getattr(module, "compiled_by", ""):
            raise ValueError(
                f"the model is a copy by {by}, of packed weights: slim the model that it was compiled from"
            )
        weight = vars(module).get("weight")
        if isinstance(weight, Tensor) and not weight.is_leaf:
            raise ValueError(
                f"{name or type(module).__name__}.weight is {why_computed(module)}, before which the model cannot be "
                "copied and cut"
            )
        forward = vars(module).get("forward")
        owner = getattr(forward, "__self__", None) or next(iter(getattr(forward, "args", ())), None)
        if hasattr(module, "_orig_mod") or (forward is not None and owner is not module):
            raise ValueError(
                f"{name or type(module).__name__} is compiled, or its forward was replaced by somebody else's: unwrap "
                "the model first, e.g. accelerator.unwrap_model(model, keep_fp32_wrapper=False) or model._orig_mod"
            )


def _input_shape(model: nn.Module) -> tuple[int, int, int]:
    config = getattr(model, "config", None)
    for source in (getattr(config, "pretrained_cfg", None), getattr(model, "pretrained_cfg", None)):
        size = source.get("input_size") if isinstance(source, dict) else getattr(source, "input_size", None)
        if size:
            return tuple(size)
    config = getattr(config, "vision_config", config)  # of CLIP and its like
    side, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    if not side or not channels:
        raise ValueError(
            f"{type(model).__name__} does not say how large its inputs are: pass example_inputs, e.g. "
            "torch.randn(2, 3, 32, 32)"
        )
    return channels, *((side, side) if isinstance(side, int) else side)


def _choose(found: list[DeadUnits], units: Mapping[str, int], multiple_of: int, uniform: bool) -> None:
    """
    Which units stay: the living ones, and of the dead ones as many as asked for, the first ones first. `units` has the
    number of units that groups had before anything was cut.
    """
    wanted = [max(int((~dead.dead).sum()), 1) for dead in found]
    if uniform:
        at_first = [units.get(dead.group.name, dead.group.count) for dead in found]
        shares: dict[str, Fraction] = {}
        for dead, number, count in zip(found, wanted, at_first, strict=True):
            shares[dead.group.kind] = max(shares.get(dead.group.kind, Fraction(0)), Fraction(number, count))
        wanted = [math.ceil(shares[d.group.kind] * count) for d, count in zip(found, at_first, strict=True)]
    for dead, number in zip(found, wanted, strict=True):
        step = 1 if dead.group.kind == "heads" else multiple_of
        missing = -(-number // step) * step - int(dead.keep.sum())  # slicing stops at all dead units
        dead.keep[dead.dead.nonzero().flatten()[:missing]] = True


def _leave_alone_what_matters(exact: nn.Module, found: list[DeadUnits], inputs: Tensor, expected: Tensor) -> None:
    """Where the outputs differ without the dead units, names and order of layers have misled: those groups stay."""
    if _difference(exact, found, inputs, expected) <= EQUAL:
        return
    for dead in found:
        if _difference(exact, [dead], inputs, expected) > EQUAL:
            dead.why, dead.left = "without its dead units the model answers differently", int(dead.dead.sum())
            dead.unread, dead.constant = torch.zeros_like(dead.unread), torch.zeros_like(dead.constant)
            dead.keep = ~dead.dead
    difference = _difference(exact, found, inputs, expected)
    if difference > EQUAL:
        raise ValueError(
            f"the slimmed {type(exact).__name__} differs by {difference:.1e} of its largest output, and no single "
            "group explains it: it cannot be slimmed exactly. Please report this architecture."
        )


def _difference(exact: nn.Module, found: list[DeadUnits], inputs: Tensor, expected: Tensor) -> float:
    """Of the outputs of a copy without the units, relative to the largest output; infinite if it cannot run."""
    if all(dead.keep.all() for dead in found):
        return 0.0
    slimmed = copied(exact)
    _cut_(slimmed, found)
    try:
        outputs = logits_of(slimmed(inputs))
    except (RuntimeError, ValueError, AssertionError, IndexError):
        return float("inf")
    same = outputs.shape == expected.shape and bool(outputs.isfinite().all())
    return _relative(outputs, expected) if same else float("inf")


def _relative(outputs: Tensor, expected: Tensor) -> float:
    return ((outputs - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def _cut_(model: nn.Module, found: list[DeadUnits]) -> None:
    """Give the constants to their readers, then cut. The groups may be those of a copy of the model."""
    modules = dict(model.named_modules())
    found = [dead for dead in found if not dead.keep.all()]
    for dead in found:
        _fold_(modules, dead)
    for dead in found:
        for part in dead.group.parts:
            module = modules[part.layer]
            tensor = getattr(module, part.tensor_name)
            smaller = tensor.index_select(part.dim, part.expand(dead.keep).nonzero().flatten().to(tensor.device))
            replace_tensor_(module, part.tensor_name, smaller.contiguous(memory_format=_memory_format(tensor)))
            follow_shapes_(module)
        if dead.group.owner is not None:
            attention = modules[dead.group.owner]
            for key in (*HEAD_COUNTS, *HEAD_CHANNELS):
                if type(number := getattr(attention, key, None)) is int:
                    setattr(attention, key, number // dead.group.count * int(dead.keep.sum()))


def _memory_format(tensor: Tensor) -> torch.memory_format:
    last = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last and not tensor.is_contiguous() else torch.contiguous_format


def _fold_(modules: dict[str, nn.Module], dead: DeadUnits) -> None:
    """Add what the reader takes from the constant units that go to its bias, or take it off the mean behind it."""
    part = dead.group.parts[-1]
    reader = modules[part.layer]
    gone = part.expand(dead.constant & ~dead.keep)
    given = torch.where(gone, dead.values, 0.0).to(reader.weight.device)
    if not given.any():
        return
    weight = reader.weight.double()
    added = (weight.flatten(2).sum(2) if weight.ndim > 2 else weight) @ given
    if reader.bias is not None:
        reader.bias.copy_(reader.bias + added)
    else:
        mean = modules[dead.group.after].running_mean
        mean.copy_(mean - added)


def _row(dead: DeadUnits, earlier: SlimRow | None) -> SlimRow:
    """The row of a group, on top of what was cut out of it earlier."""
    group, cut = dead.group, ~dead.keep
    units, unread, constant = (earlier.units, earlier.unread, earlier.constant) if earlier else (group.count, 0, 0)
    unread, constant = unread + int((dead.unread & cut).sum()), constant + int((dead.constant & cut).sum())
    kept, spared = int(dead.keep.sum()), int((dead.dead & dead.keep).sum())
    words = "one unit must stay" if kept == 1 else "kept for the width that was asked for"
    why = "; ".join(filter(None, (dead.why, words if spared else "")))
    return SlimRow(group.name, group.kind, units, kept, unread, constant, dead.left + spared, why)


@dataclass(frozen=True)
class SlimRow:
    """
    One group of units.

    Attributes:
        name, kind: see `StructureGroup`.
        units, kept: before and after.
        unread, constant: of those that were cut, the units that nobody read, and those that were read but constant.
        left: dead units that stay.
        why: the reason, empty if `left` is 0 and the group can be cut.
    """

    name: str
    kind: str
    units: int
    kept: int
    unread: int
    constant: int
    left: int
    why: str


@dataclass(frozen=True)
class SlimReport(Report):
    """
    What was cut out of a model and what it costs now.

    Attributes:
        rows: one per group of units.
        parameters_before, parameters_after: all parameters.
        macs_before, macs_after: multiply-accumulates of one input (see `flops_report`).
        input_shape: of that input, batch first.
        difference: largest difference of the outputs, in float64, relative to the largest output.
        config: for a model with a config, how the widths are kept in it: "as before" (nothing was cut), "config" (in
            the config's own fields) or "recorded" (in `config.tscnc`); empty otherwise.
    """

    rows: tuple[SlimRow, ...]
    parameters_before: int
    parameters_after: int
    macs_before: int
    macs_after: int
    input_shape: tuple[int, ...]
    difference: float
    config: str = ""

    SUMMARY = ("removed",)

    @property
    def removed(self) -> int:
        return sum(row.units - row.kept for row in self.rows)

    def to_markdown(self) -> str:
        head = ("read by", "kind", "units", "kept", "cut: unread", "cut: constant", "dead but left", "why")
        rows = [(f"`{r.name}`", r.kind, r.units, r.kept, r.unread, r.constant, r.left, r.why) for r in self.rows]
        sums = [
            ("units", sum(row.units for row in self.rows), sum(row.kept for row in self.rows)),
            ("parameters", self.parameters_before, self.parameters_after),
            (f"MACs, input {by(self.input_shape)}", self.macs_before, self.macs_after),
        ]
        ratios = [(name, f"{a:,}", f"{b:,}", f"{a / max(b, 1):.2f}") for name, a, b in sums]
        after = markdown_table(("", "before", "after", "ratio"), ratios)
        return f"{markdown_table(head, rows, text=('kind', 'why'))}\n\n{after}"
