"""Where gates can stand in a network: between a layer that makes channels and the one that reads them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

from tscnc_hf.method.matrices import LAYERS, computed_weights, full_name


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
        channels: input channels a gate.
    """

    name: str
    reader: nn.Module
    makers: tuple[nn.Module, ...] = ()
    channels: int = 1

    @property
    def count(self) -> int:
        """Number of gates."""
        return input_channels(self.reader) // self.channels


def gate_sites(model: nn.Module) -> list[GateSite]:
    """
    Where gates can stand so that a closed one makes a channel removable: hidden units of an MLP, heads of an
    attention, channels inside a residual block, between two layers of an `nn.Sequential`. Only where nothing between
    the two layers mixes channels (batch norm and activations do not; layer norm, squeeze-excitation and GRN do), and
    only where no other layer has the weight of the reader, into which its gates are folded.
    """
    sites = {}
    for name, module in model.named_modules():
        children = dict(module.named_children())
        pairs = [pair for pair in PAIRS if set(pair) <= children.keys()]
        if isinstance(module, nn.Sequential):
            layers = [key for key, child in children.items() if isinstance(child, LAYERS)]
            pairs += zip(layers, layers[1:], strict=False)
        found = [
            GateSite(full_name(name, reader), children[reader], (children[maker],))
            for maker, reader in pairs
            if _feeds(children, maker, reader)
        ]
        heads = head_site(name, module, children)
        sites |= {site.name: site for site in (*found, heads) if site is not None}
    computed, layers = computed_weights(model), owners(model)  # gates are folded into what a layer multiplies with
    return [
        site
        for site in sites.values()
        if full_name(site.name, "weight") not in computed and layers[id(site.reader.weight)] <= 1
    ]


def owners(model: nn.Module) -> Counter[int]:
    """Of each parameter, by its id, how many layers have it: more than one where weights are tied."""
    return Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)


def _feeds(children: dict[str, nn.Module], maker: str, reader: str) -> bool:
    """Whether `reader` takes what `maker` gives, channel by channel."""
    first, last = children[maker], children[reader]
    if not (isinstance(first, LAYERS) and isinstance(last, LAYERS)) or getattr(last, "groups", 1) != 1:
        return False
    names = list(children)
    between = [children[name] for name in names[names.index(maker) + 1 : names.index(reader)]]
    return len(first.weight) == input_channels(last) and all(map(_keeps_apart, between))


def _keeps_apart(module: nn.Module) -> bool:
    """Whether each channel is worked on by itself, as far as can be told; of what has weights, only batch norms do."""
    plain = not isinstance(module, MIXING) and next(module.parameters(), None) is None
    return plain or isinstance(module, nn.modules.batchnorm._BatchNorm)


def head_site(name: str, module: nn.Module, children: dict[str, nn.Module]) -> GateSite | None:
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
    return GateSite(full_name(name, reader), children[reader], makers, inputs // heads)


def input_channels(layer: nn.Module) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
