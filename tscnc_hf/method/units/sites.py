"""Where gates can stand in a network: between a layer that makes channels and the one that reads them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from tscnc_hf.method.matrices import CONVOLUTIONS


# (layer that makes the channels, layer that reads them), by the names that timm, transformers and torchvision use
PAIRS = (("fc1", "fc2"), ("conv1", "conv2"), ("conv2", "conv3"), ("conv_dw", "conv_pwl"), ("pwconv1", "pwconv2"))
HEAD_COUNTS = ("num_heads", "num_attention_heads")
HEAD_READERS = ("proj", "o_proj", "out_proj")
HEAD_MAKERS = ("qkv", "q_proj", "k_proj", "v_proj")
# Modules without weights that mix channels all the same.
MIXING = (nn.Flatten, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm, nn.Softmax, nn.ChannelShuffle)


@dataclass(frozen=True)
class GateSite:
    """
    A place for gates.

    Attributes:
        name: of the layer that reads the gated channels; its input is what the gates multiply.
        reader, makers: that layer, and those that make the channels (empty if not known).
        count, channels: number of gates, and input channels a gate.
    """

    name: str
    reader: nn.Module
    makers: tuple[nn.Module, ...]
    count: int
    channels: int


def gate_sites(model: nn.Module) -> list[GateSite]:
    """
    Where gates can stand so that a closed one makes a channel removable: hidden units of an MLP, heads of an
    attention, channels inside a residual block, between two layers of an `nn.Sequential`. Only where nothing between
    the two layers mixes channels (batch norm and activations do not; layer norm, squeeze-excitation and GRN do).
    """
    sites = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        children = dict(module.named_children())
        for maker, reader in PAIRS:
            if maker in children and reader in children and _feeds(children, maker, reader):
                sites[prefix + reader] = make_site(prefix + reader, children[reader], (children[maker],))
        if isinstance(module, nn.Sequential):
            layers = [key for key, child in children.items() if isinstance(child, (nn.Linear, *CONVOLUTIONS))]
            for maker, reader in zip(layers, layers[1:], strict=False):
                if _feeds(children, maker, reader):
                    sites[prefix + reader] = make_site(prefix + reader, children[reader], (children[maker],))
        site = head_site(prefix, module, children)
        if site is not None:
            sites[site.name] = site
    return list(sites.values())


def _feeds(children: dict[str, nn.Module], maker: str, reader: str) -> bool:
    """Whether `reader` takes what `maker` gives, channel by channel."""
    first, last = children[maker], children[reader]
    if not isinstance(last, (nn.Linear, *CONVOLUTIONS)) or not isinstance(first, (nn.Linear, *CONVOLUTIONS)):
        return False
    names = list(children)
    between = [children[name] for name in names[names.index(maker) + 1 : names.index(reader)]]
    return (
        len(first.weight) == input_channels(last)
        and getattr(last, "groups", 1) == 1
        and all(map(_keeps_apart, between))
    )


def _keeps_apart(module: nn.Module) -> bool:
    """Whether a module works on each channel by itself, as far as can be told: what has weights and is no batch norm
    does not."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return True
    return not isinstance(module, MIXING) and next(module.parameters(), None) is None


def head_site(prefix: str, module: nn.Module, children: dict[str, nn.Module]) -> GateSite | None:
    """The heads of an attention, by the names of its projections; None where `module` is no such attention."""
    heads = next((getattr(module, key) for key in HEAD_COUNTS if isinstance(getattr(module, key, None), int)), 0)
    reader = next((key for key in HEAD_READERS if isinstance(children.get(key), nn.Linear)), None)
    makers = tuple(children[key] for key in HEAD_MAKERS if isinstance(children.get(key), nn.Linear))
    if reader is None or not makers or heads < 2 or isinstance(module, nn.MultiheadAttention):
        return None
    mixing = [children[key] for key in ("norm", "gate") if children.get(key) is not None]  # timm's options
    inputs = children[reader].in_features
    if inputs % heads or not all(map(_keeps_apart, mixing)) or any(len(m.weight) % inputs for m in makers):
        return None
    return make_site(prefix + reader, children[reader], makers, inputs // heads)


def make_site(name: str, reader: nn.Module, makers: tuple[nn.Module, ...], channels: int = 1) -> GateSite:
    return GateSite(name, reader, makers, input_channels(reader) // channels, channels)


def input_channels(layer: nn.Module) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
