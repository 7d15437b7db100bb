"""Layers whose zeros cost nothing, in place of `nn.Linear` and `nn.Conv2d`. Inference only."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tscnc_hf.inference.operators import ACTIVATIONS, has_tangent, machine
from tscnc_hf.inference.packing import GROUP, pack


class WeightIsRead(AttributeError, RuntimeError):
    """A model reads the weight of a layer that it should only call; the second argument is the layer."""


class NoWeight(nn.Module):
    """
    What multiplies with packed weights: who reads its `weight` is told so.

    Attributes:
        compiled_by (`str`): who put it into a copy of a model; by this a copy is known.
    """

    compiled_by = "sparse_compile"

    def _read(self) -> SparseLayer:
        """The layer whose weight it is."""
        raise NotImplementedError

    def __getattr__(self, name: str):
        if name == "weight":  # no property: torch would turn its error into one of its own
            layer = self._read()
            raise WeightIsRead(
                f"a {type(layer).__name__} has no dense weight; take it from the uncompiled model", layer
            )
        return super().__getattr__(name)


class SparseLayer(NoWeight):
    """
    What sparse layers have in common: packed weights as buffers, a bias, and no gradients.

    Attributes:
        zeros (`float`): share of the weights that are zero.
        activation (`str`): applied to the output; one of `ACTIVATIONS`.
    """

    kind: str  # for reports

    def __init__(self, source: nn.Module):
        super().__init__()
        machine()
        self.zeros = 1 - int(source.weight.count_nonzero()) / source.weight.numel()
        self.activation = "none"
        bias = source.weight.new_zeros(len(source.weight)) if source.bias is None else source.bias.detach().clone()
        # a parameter, which a model is asked for its dtype and device by
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.eval()

    def _pack(self, weight: Tensor, block_channels: int, offsets) -> None:
        entries, rows = pack(weight.detach(), block_channels, offsets)
        self.register_buffer("entries", entries)
        self.register_buffer("rows", rows)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        machine()  # a copy that another process reads needs the kernels, too

    def _read(self) -> SparseLayer:
        return self

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        raise ValueError(
            f"a {type(self).__name__} takes no state: another copy's packed weights may be laid out in another way. "
            "Load that of the model into the model, and compile it anew"
        )

    def _packed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Entries, rows and bias, without the detour of a module's attributes: a call is as short as that."""
        buffers = self._buffers
        return buffers["entries"], buffers["rows"], self._parameters["bias"]

    def _check(self, x: Tensor) -> None:
        if not (self.training or x.requires_grad or has_tangent(x)):
            return
        if self.training:
            raise RuntimeError(
                f"{type(self).__name__} is for inference, and this model is in training mode: call .eval(), or train "
                "the model that it was compiled from"
            )
        if has_tangent(x):
            raise RuntimeError(
                f"{type(self).__name__} has no forward-mode derivatives, and its input has a tangent: take "
                "torch.func.jvp and its like of the model that it was compiled from"
            )
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{type(self).__name__} has no gradients, and its input needs one: use torch.no_grad(), or attack and "
                "train the model that it was compiled from"
            )


class SparseLinear(SparseLayer):
    """
    Sums of a few vectors of tokens for one output at a time; of normalised tokens, if `normalise` was called.

    Args:
        source: float32 layer; its weights are copied.
        vectors: of tokens that are summed up at a time, 1 to 8.
        block_features: input features that are walked at a time; by default all.
    """

    kind = "tokens"

    def __init__(self, source: nn.Linear, vectors: int = 2, block_features: int | None = None):
        super().__init__(source)
        self.in_features, self.out_features = source.in_features, source.out_features
        self.vectors, self.block_features = vectors, min(block_features or self.in_features, self.in_features)
        step = vectors * machine()[0] * 4
        self._pack(source.weight[:, :, None], self.block_features, lambda channel, tap: channel * step)
        self.norm, self.eps = None, 0.0  # no buffer: a shallow copy that gets one leaves this layer as it is

    def like(self, source: nn.Linear) -> SparseLinear:
        """Another layer's weights, walked in the same way."""
        return SparseLinear(source, self.vectors, self.block_features)

    def normalise(self, norm: nn.LayerNorm) -> None:
        """Compute what comes after this norm of the input features, too; it is copied."""
        one = self.bias.new_ones(self.in_features)
        weight, bias = (one if norm.weight is None else norm.weight), (0 * one if norm.bias is None else norm.bias)
        self.norm, self.eps = torch.stack([weight, bias]).detach(), norm.eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(..., in_features) to (..., out_features); `residual` is added before the activation."""
        self._check(x)
        return torch.ops.tscnc.linear.default(
            x, *self._packed(), residual, self.norm, self.eps, self.in_features, self.block_features, GROUP,
            self.vectors, ACTIVATIONS[self.activation],
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, zeros={self.zeros:.1%}, activation={self.activation}"


class Absorbed(NoWeight, nn.Identity):
    """In the place of the second of two layers that are computed as one."""

    def __init__(self, layer: SparseLayer):
        super().__init__()
        self.layer = (layer,)  # not a part of this module

    def _read(self) -> SparseLayer:
        return self.layer[0]


class SparseMLP(NoWeight):
    """Two layers with an activation between, as one: what lies between never leaves the cache."""

    kind = "tokens, both layers at once"
    activation = "none"  # after the second

    def __init__(self, first: SparseLinear, second: SparseLinear):
        super().__init__()
        self.first, self.second = first, second
        self.eval()

    def _read(self) -> SparseLayer:
        return self.first

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(..., first.in_features) to (..., second.out_features); `residual` is added to what comes out."""
        one, two = self.first, self.second
        one._check(x)
        return torch.ops.tscnc.mlp.default(
            x, *one._packed(), *two._packed(), residual, one.norm, one.eps,
            one.in_features, one.block_features, two.block_features, one.vectors, ACTIVATIONS[one.activation],
        )  # fmt: skip


class SparseConv(SparseLayer):
    """
    An ungrouped convolution with zeros outside the image.

    Args:
        source: float32 layer, padding_mode "zeros"; its weights are copied.
    """

    def __init__(self, source: nn.Conv2d):
        super().__init__(source)
        self.in_channels, self.out_channels = source.in_channels, source.out_channels
        self.kernel_size, self.stride = source.kernel_size, source.stride
        self.dilation, self.padding = source.dilation, conv_padding(source)

    def _geometry(self) -> tuple:
        return self.in_channels, self.kernel_size, self.stride, self.padding, self.dilation

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"zeros={self.zeros:.1%}, activation={self.activation}"
        )


def conv_padding(source: nn.Conv2d) -> tuple[int, int] | None:
    """Rows and columns of zeros on each side; None where the two sides differ, or are no zeros."""
    if source.padding_mode != "zeros":
        return None
    if source.padding == "valid":
        return (0, 0)
    if source.padding == "same":
        total = [d * (k - 1) for k, d in zip(source.kernel_size, source.dilation, strict=True)]
        return None if any(t % 2 for t in total) else (total[0] // 2, total[1] // 2)
    return tuple(source.padding)


class SparseConvPixels(SparseConv):
    """
    Pixels of one image side by side in vectors: for few images.

    Args:
        size: (height, width) of the images that offsets are kept for; for others they are computed in each call.
        block_channels: input channels that are walked at a time; by default all.
    """

    kind = "pixels"

    def __init__(self, source: nn.Conv2d, size: tuple[int, int], block_channels: int | None = None):
        super().__init__(source)
        self.block_channels = min(block_channels or self.in_channels, self.in_channels)
        blocks = -(-self.in_channels // self.block_channels)
        self.block_channels = -(-self.in_channels // blocks)  # blocks of about one size, as the kernel takes them
        self.size, self.taps = tuple(size), self.kernel_size[0] * self.kernel_size[1]
        self._pack(source.weight.flatten(2), self.block_channels, lambda channel, tap: channel * self.taps + tap)
        self.register_buffer("placed", self._placed(*self.size))

    def like(self, source: nn.Conv2d) -> SparseConvPixels:
        """Another layer's weights, walked in the same way."""
        return SparseConvPixels(source, self.size, self.block_channels)

    def _placed(self, height: int, width: int) -> Tensor:
        """Entries with the offsets of images of this size, as `Planes` in kernels.h lays them out."""
        (kh, kw), (sy, sx), (py, px), (dy, dx) = self.kernel_size, self.stride, self.padding, self.dilation
        out_height = (height + 2 * py - (kh - 1) * dy - 1) // sy + 1
        out_width = (width + 2 * px - (kw - 1) * dx - 1) // sx + 1
        phases = 1 if kh == 1 else sy
        plane = (out_height + (kh - 1) * dy // sy) * out_width
        index = self.entries[:, 0]
        channel, tap = index // self.taps, index % self.taps
        down, kx = tap // kw * dy, tap % kw
        offset = channel * (kw * phases * plane) + (kx * phases + down % sy) * plane + down // sy * out_width
        return torch.stack([offset * 4, self.entries[:, 1]], dim=1)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(n, in_channels, h, w) to contiguous (n, out_channels, h', w'); `residual` is added before activation."""
        self._check(x)
        _, rows, bias = self._packed()
        entries = self._buffers["placed"] if x.shape[2:] == self.size else self._placed(x.shape[2], x.shape[3])
        return torch.ops.tscnc.conv_pixels.default(
            x, entries, rows, bias, residual, *self._geometry(), GROUP, ACTIVATIONS[self.activation]
        )


class SparseChain(NoWeight):
    """
    Convolutions of a block, one after another and with its residual sums, as one call: for few images, where a call
    costs as much as what it computes.

    Args:
        block: what they are called in; its modules stay where they are.
        steps: (layer, input, residual): which of what came before it gets, and adds: 0 is the block's own input,
            1 what the first layer returns, and so on; -1 is no residual.
        argument: what the block's input is called, for who gives it by name.
    """

    def __init__(self, block: nn.Module, steps: list[tuple[SparseConvPixels, int, int]], argument: str = "x"):
        super().__init__()
        self.argument = argument
        for name, child in block.named_children():
            self.add_module(name, child)
        self.steps = tuple(steps)
        self.size = steps[0][0].size
        self.plan = [
            number
            for layer, source, residual in steps
            for number in (source, residual, layer.in_channels, *layer.kernel_size, *layer.stride, *layer.padding,
                           *layer.dilation, GROUP, ACTIVATIONS[layer.activation])
        ]  # fmt: skip
        self.eval()

    def _read(self) -> SparseLayer:
        return self.steps[0][0]

    def forward(self, *given: Tensor, **named: Tensor) -> Tensor:
        """(n, in_channels of the first, h, w) to what the last layer returns."""
        if len(given) + len(named) != 1 or not {self.argument} >= set(named):
            raise TypeError(f"a block that was compiled takes one argument, {self.argument}: give it alone")
        x = given[0] if given else named[self.argument]
        self.steps[0][0]._check(x)
        if x.shape[2:] == self.size:
            tensors = []
            for layer, _, _ in self.steps:
                _, rows, bias = layer._packed()
                tensors += layer._buffers["placed"], rows, bias
            return torch.ops.tscnc.chain.default(x, tensors, self.plan)
        made = [x]
        for layer, source, residual in self.steps:
            made.append(layer(made[source], None if residual < 0 else made[residual]))
        return made[-1]


class SparseConvImages(SparseConv):
    """
    Images side by side in vectors, and innermost in memory, in what comes out as well: for many images.

    Args:
        tile: (height, width) in pixels of the output, of a size that the kernels are built for.
        block_channels: input channels that are walked at a time; by default all.
    """

    kind = "images"

    def __init__(self, source: nn.Conv2d, tile: tuple[int, int], block_channels: int | None = None):
        super().__init__(source)
        self.tile, self.block_channels = tuple(tile), min(block_channels or self.in_channels, self.in_channels)
        (kh, kw), (sy, sx), (dy, dx) = self.kernel_size, self.stride, self.dilation
        height, width = (tile[0] - 1) * sy + (kh - 1) * dy + 1, (tile[1] - 1) * sx + (kw - 1) * dx + 1
        step = machine()[0] * 4

        def offsets(channel: Tensor, tap: Tensor) -> Tensor:  # as `Window` in kernels.h lays them out
            return (channel % self.block_channels * (height * width) + tap // kw * (dy * width) + tap % kw * dx) * step

        self._pack(source.weight.flatten(2), self.block_channels, offsets)

    def like(self, source: nn.Conv2d) -> SparseConvImages:
        """Another layer's weights, walked in the same way."""
        return SparseConvImages(source, self.tile, self.block_channels)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(n, in_channels, h, w) to (n, out_channels, h', w'), n innermost; `residual` is added before."""
        self._check(x)
        return torch.ops.tscnc.conv_images.default(
            x, *self._packed(), residual, *self._geometry(), self.tile, self.block_channels, GROUP,
            ACTIVATIONS[self.activation],
        )  # fmt: skip


class SparseConvBlock(NoWeight):
    """Two convolutions, the second of stride 1, as one, a few rows at a time: what lies between stays in a cache."""

    kind = "images, both layers at once"

    def __init__(self, first: SparseConvImages, second: SparseConvImages):
        super().__init__()
        if second.stride != (1, 1) or first.tile != second.tile:
            raise ValueError(
                f"stride {second.stride} and tiles {first.tile}, {second.tile}: (1, 1) and one tile are needed"
            )
        self.first, self.second = first, second
        self.eval()

    def _read(self) -> SparseLayer:
        return self.first

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """As the first layer's, then the second's forward."""
        one, two = self.first, self.second
        one._check(x)
        return torch.ops.tscnc.conv_block.default(
            x, *one._packed(), *two._packed(), residual, *one._geometry(),
            two.kernel_size, two.padding, two.dilation, one.tile, one.block_channels, two.block_channels,
            ACTIVATIONS[one.activation], ACTIVATIONS[two.activation],
        )  # fmt: skip
