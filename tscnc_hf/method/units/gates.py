"""
Hard-concrete gates on channels, hidden units and attention heads (Louizos, Welling and Kingma 2018, arXiv 1712.01312).

A gate multiplies what one layer *reads*: the input channels of `conv2`, the hidden units that `fc2` reads, the heads
that an attention's output projection reads (this place is ours; the first implementation of TSCNC gates a layer's
output, where a batch norm behind it undoes every value but zero, and makes a constant of zero). So a closed gate
contributes exactly zero, and gates fold away into the reading layer's weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tscnc_hf.method.constraints import transformed_l1
from tscnc_hf.method.matrices import LAYERS, computed_weights, full_tensor
from tscnc_hf.method.reports.report import Report, markdown_table, over_rows
from tscnc_hf.method.sharding import replicated
from tscnc_hf.method.units.sites import GateSite, gate_sites, owners


LOW, HIGH = -0.1, 1.1  # the interval that a concrete variable is stretched to before it is clipped to [0, 1]
TEMPERATURE = 2 / 3
LIMIT = math.log(1e2)  # log_alpha is kept in [-LIMIT, LIMIT]: beyond it a gate would not come back


class HardConcreteGate(nn.Module):
    """
    `count` gates z in [0, 1]. In training mode the sample drawn last (`sample_gates`), the same in every forward until
    the next; in evaluation mode the deterministic value.

    Args:
        count (`int`): number of gates.
        channels (`int`): consecutive input channels that share a gate (the size of an attention head, else 1).
        drop_rate (`float`): initial probability that a concrete variable lies below one half, in (0, 1).
        generator (`torch.Generator`, *optional*): of the initial values, N(log((1 - drop_rate) / drop_rate), 0.01).
    """

    def __init__(self, count: int, channels: int = 1, drop_rate: float = 0.3, generator=None):
        super().__init__()
        if not 0 < drop_rate < 1:
            raise ValueError(f"drop_rate={drop_rate} is outside (0, 1)")
        self.channels = channels
        start = math.log(1 - drop_rate) - math.log(drop_rate)
        self.log_alpha = nn.Parameter(start + 0.01 * torch.randn(count, generator=generator))
        self.register_buffer("noise", torch.rand(count, generator=generator), persistent=False)

    def open_probability(self) -> Tensor:
        """P(z != 0), float32 (count,): sigmoid(log_alpha - temperature log(-low / high))."""
        return torch.sigmoid(full_tensor(self.log_alpha).float() - TEMPERATURE * math.log(-LOW / HIGH))

    def deterministic(self) -> Tensor:
        """Float32 (count,) in [0, 1]: the stretched and clipped sigmoid(log_alpha); exactly 0 is closed."""
        return (torch.sigmoid(full_tensor(self.log_alpha).float()) * (HIGH - LOW) + LOW).clamp(0, 1)

    def sampled(self) -> Tensor:
        """Float32 (count,) in [0, 1]: a hard-concrete variable, differentiable in log_alpha."""
        noise = self.noise.float().clamp(1e-6, 1 - 1e-6)
        concrete = torch.sigmoid((torch.logit(noise) + full_tensor(self.log_alpha).float()) / TEMPERATURE)
        return (concrete * (HIGH - LOW) + LOW).clamp(0, 1)

    def forward(self) -> Tensor:
        """(count * channels,): one factor an input channel of the reading layer."""
        values = self.sampled() if self.training else self.deterministic()
        return values.repeat_interleave(self.channels) if self.channels > 1 else values

    def extra_repr(self) -> str:
        return f"{len(self.log_alpha)}, channels={self.channels}"


def attach_gates(
    model: nn.Module,
    layers: Sequence[str] = (),
    drop_rate: float = 0.3,
    generator: torch.Generator | None = None,
) -> list[GateSite]:
    """
    Put gates on the inputs of layers, as submodules `<layer>.gate`: in the state dict, and trained like all else.

    Args:
        model (`nn.Module`): changed in place, before its optimizer is made.
        layers (`Sequence[str]`, *optional*): gate the input channels of the layers whose name ends with one of these,
            Linear or ungrouped convolution, neither frozen nor tied to another layer; by default all `gate_sites`
            that are not frozen, as a gate is folded into the weight of the layer.
        drop_rate (`float`): see `HardConcreteGate`.
        generator (`torch.Generator`, *optional*): on the CPU.

    Returns:
        `list[GateSite]`: where gates stand now.

    Raises:
        ValueError: the model has gates already, no place was found, or a named layer cannot be gated.
    """
    if gated_layers(model):
        raise ValueError("the model has gates already; fold_gates_(model) removes them")
    sites = [site for site in gate_sites(model) if site.reader.weight.requires_grad]
    if layers:
        known = {site.name: site for site in sites}
        sites = [known.get(name) or _named_site(model, name) for name in _matching(model, layers)]
    if not sites:
        raise ValueError(
            f"no place for gates was found in {type(model).__name__}: name the layers whose inputs to gate (layers=, "
            "gate_layers in TSCNCConfig), Linear or ungrouped convolutions inside a block"
        )
    for site in sites:
        gate = HardConcreteGate(site.count, site.channels, drop_rate, generator)
        site.reader.gate = gate.to(site.reader.weight.device).train(site.reader.training)
        site.reader.register_forward_pre_hook(_gate_input)
    return sites


def _matching(model: nn.Module, layers: Sequence[str]) -> list[str]:
    names = [name for name, _ in model.named_modules()]
    for part in layers:
        if not any(f".{name}".endswith(f".{part}") for name in names):
            raise ValueError(f"gate layer {part!r} is not in {type(model).__name__}; layers look like {names[-3:]}")
    return [name for name in names if f".{name}".endswith(tuple(f".{part}" for part in layers))]


def _named_site(model: nn.Module, name: str) -> GateSite:
    layer = model.get_submodule(name)
    if why := computed_weights(layer).get("weight"):
        raise ValueError(f"{name} can have no gates, which are folded into its weight: {why}")
    if not isinstance(layer, LAYERS) or getattr(layer, "groups", 1) != 1:
        raise ValueError(f"{name} is a {type(layer).__name__}: gates stand before Linear and ungrouped convolutions")
    if not layer.weight.requires_grad:
        raise ValueError(f"{name} is frozen (requires_grad=False), and a gate would be folded into its weight")
    if owners(model)[id(layer.weight)] > 1:
        tied = {n: m for n, m in model.named_modules() if m._parameters.get("weight") is layer.weight}
        others = [other for other, module in tied.items() if module is not layer]
        raise ValueError(
            f"{name} can have no gates: {', '.join(others) or 'another layer'} has the same weight, into which they "
            "would be folded. Leave it out of the layers to gate, or give it a weight of its own"
        )
    return GateSite(name, layer)


def _gate_input(layer: nn.Module, inputs: tuple) -> tuple | None:
    gate = layer._modules.get("gate")
    if gate is None:
        return None
    x, *rest = inputs
    values = gate().to(x.dtype)
    return (x * (values if isinstance(layer, nn.Linear) else values.view(-1, *[1] * (layer.weight.ndim - 2))), *rest)


def gated_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that have a gate, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module._modules.get("gate"), HardConcreteGate)
    }


def gate_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The `log_alpha` of every gate: for a parameter group of their own, without weight decay."""
    return [layer.gate.log_alpha for layer in gated_layers(model).values()]


@torch.no_grad()
def sample_gates(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draw the sample that every forward in training mode uses until the next one. Once an optimizer step."""
    for layer in gated_layers(model).values():
        layer.gate.noise.uniform_(generator=generator)


@torch.no_grad()
def clamp_gates_(model: nn.Module) -> None:
    """Keep log_alpha in [-log 100, log 100] (as Louizos et al.): after every optimizer step."""
    for parameter in gate_parameters(model):
        parameter.clamp_(-LIMIT, LIMIT)


def gate_sparse_constraint(model: nn.Module, a: float = 100.0, l0: float = 1e-3, l2: float = 5e-4) -> Tensor:
    """
    TSC on gates: sum over gates g of rho_a(pi_g C_g), pi_g = P(z_g != 0) and C_g the sum of l2/2 w^2 + l0 over the
    weights of its channels, those that make them (where known) and those that read them. The magnitude is what enters
    rho_a; the first implementation feeds it a negative number, which has a pole.

    Args:
        model (`nn.Module`): with gates.
        a (`float`): shape of transformed l1, > 0 (100 in the first implementation).
        l0, l2 (`float`): >= 0, cost of a weight that is there, and of its square.

    Returns:
        `Tensor`: float32 scalar in [0, (a + 1) times the number of gates).
    """
    makers = {site.name: site.makers for site in gate_sites(model)}
    terms = []
    for name, layer in gated_layers(model).items():
        count = len(layer.gate.log_alpha)
        weight = full_tensor(layer.weight).float()
        parts = [weight.reshape(1, len(weight), count, -1).transpose(1, 2)]
        # (blocks, gate, ...): a fused qkv has three blocks of heads
        making = [full_tensor(maker.weight).float() for maker in makers.get(name, ())]
        parts += [weight.reshape(-1, count, layer.gate.channels, weight[0].numel()) for weight in making]
        cost = sum(l2 / 2 * part.square().sum(dim=(0, 2, 3)) + l0 * (part.numel() // count) for part in parts)
        terms.append(transformed_l1(layer.gate.open_probability() * cost, a).sum())
    if not terms:
        raise ValueError("the model has no gates: attach_gates(model) before training")
    return torch.stack(terms).sum()


@torch.no_grad()
def _fold(layer: nn.Module) -> None:
    weight = layer.weight
    factors = layer.gate.deterministic().repeat_interleave(layer.gate.channels).to(weight.device, weight.dtype)
    weight.mul_(replicated(factors.view(1, -1, *[1] * (weight.ndim - 2)), weight))


def fold_gates_(model: nn.Module) -> None:
    """Multiply the gates' deterministic values into the weights and remove them: a plain model of the same outputs."""
    for layer in gated_layers(model).values():
        _fold(layer)
        del layer.gate
        for key, hook in list(layer._forward_pre_hooks.items()):
            if hook is _gate_input:
                del layer._forward_pre_hooks[key]


@contextmanager
def detached_gates(model: nn.Module) -> Iterator[None]:
    """Inside, the model has no gates and its weights are as they are, to load a plain checkpoint into it."""
    gates = {layer: layer.gate for layer in gated_layers(model).values()}
    for layer in gates:
        del layer.gate
    try:
        yield
    finally:
        for layer, gate in gates.items():
            layer.gate = gate


@contextmanager
def folded_gates(model: nn.Module) -> Iterator[None]:
    """Inside, the model is as after `fold_gates_`, to publish it or report on it; afterwards bit for bit as before."""
    weights = {layer: layer.weight.detach().clone() for layer in gated_layers(model).values()}
    for layer in weights:
        _fold(layer)
    try:
        with detached_gates(model):
            yield
    finally:
        with torch.no_grad():
            for layer, weight in weights.items():
                layer.weight.copy_(weight)


@dataclass(frozen=True)
class GateRow:
    """
    The gates before one layer, by their deterministic values.

    Attributes:
        name: of the reading layer.
        gates, closed: number of gates, and of those that are exactly 0.
        expected_open: sum of P(z != 0).
        channels: input channels a gate.
        removable: indices of the closed gates: channels (or heads) that can be cut out for good, in the reading layer
            and, where `makers_known`, in the layers that make them.
    """

    name: str
    gates: int
    closed: int
    expected_open: float
    channels: int
    removable: tuple[int, ...]
    makers_known: bool


@dataclass(frozen=True)
class GateReport(Report):
    """All gates of a model; fractions are of gates."""

    rows: tuple[GateRow, ...]

    SUMMARY = ("gates", "closed")
    gates = over_rows(sum, "gates")
    closed = over_rows(sum, "closed")

    def to_markdown(self) -> str:
        rows = [(f"`{r.name}`", r.gates, r.closed, f"{r.expected_open:.1f}", r.channels) for r in self.rows]
        rows.append(("all", self.gates, self.closed, "", ""))
        return markdown_table(("read by", "gates", "closed", "expected open", "channels a gate"), rows)


@torch.no_grad()
def gate_report(model: nn.Module) -> GateReport:
    """Which gates are closed, and so which channels are removable; no rows for a model without gates."""
    known = {site.name for site in gate_sites(model)}
    rows = []
    for name, layer in gated_layers(model).items():
        closed = (layer.gate.deterministic() == 0).nonzero().flatten().tolist()
        expected = layer.gate.open_probability().sum().item()
        count = len(layer.gate.log_alpha)
        rows.append(GateRow(name, count, len(closed), expected, layer.gate.channels, tuple(closed), name in known))
    return GateReport(tuple(rows))
