"""
Operators with arguments drawn at random, right ones and damaged ones: a right call computes what torch computes, a
damaged one is an error, and no call touches memory that is not its own. `make test-sanitizers` runs this in a Python
that AddressSanitizer is loaded into, with kernels that it and UndefinedBehaviorSanitizer watch.
"""

import contextlib
import random
import sys

import torch
from torch import nn

from tscnc_hf.inference import building
from tscnc_hf.inference.layers import (
    SparseChain,
    SparseConvBlock,
    SparseConvImages,
    SparseConvPixels,
    SparseLinear,
    SparseMLP,
)
from tscnc_hf.inference.operators import machine


SANITIZERS = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")
TILES = [(1, 1), (2, 2), (2, 4), (2, 7), (2, 8), (4, 4)]


def thin(layer: nn.Module, draw: random.Random) -> nn.Module:
    """With a share of zeros that is drawn, now and then all or none, and an output without a weight."""
    with torch.no_grad():
        layer.weight[torch.rand_like(layer.weight) < draw.choice([0.0, 0.5, 0.9, 0.99, 1.0])] = 0
        layer.weight[draw.randrange(len(layer.weight))] = 0
    return layer.requires_grad_(False).eval()


def drawn_linear(draw: random.Random):
    features, outputs = draw.randint(1, 90), draw.randint(1, 150)
    layer = thin(nn.Linear(features, outputs, bias=draw.random() < 0.7), draw)
    vectors, block = draw.randint(1, 8), draw.choice([None, draw.randint(1, 90)])
    x = torch.randn(*draw.choice([(), (draw.randint(1, 4),)]), draw.randint(1, 150), features)
    sparse = SparseLinear(layer, vectors, block)
    if draw.random() < 0.3:
        norm = nn.LayerNorm(features, eps=0.1).requires_grad_(False)
        sparse.normalise(norm)
        layer = nn.Sequential(norm, layer)
    if draw.random() < 0.3:
        second = thin(nn.Linear(outputs, draw.randint(1, 70)), draw)
        sparse.activation = "gelu"
        both = SparseMLP(sparse, SparseLinear(second, vectors, draw.choice([None, draw.randint(1, 90)])))
        return sparse, both, lambda x: second(nn.functional.gelu(layer(x))), x
    return sparse, sparse, layer, x


def drawn_conv(draw: random.Random):
    def pair(low: int, high: int) -> tuple[int, int]:
        return draw.randint(low, high), draw.randint(low, high)

    kernel, stride, dilation, padding = pair(1, 5), pair(1, 4), pair(1, 3), pair(0, 4)
    size = [
        max(1, (k - 1) * d + 1 - 2 * p + draw.randint(0, 14))
        for k, d, p in zip(kernel, dilation, padding, strict=True)
    ]
    channels, outputs = draw.randint(1, 20), draw.randint(1, 100)
    layer = nn.Conv2d(channels, outputs, kernel, stride, padding, dilation, bias=draw.random() < 0.7)
    layer = thin(layer, draw)
    block = draw.choice([None, draw.randint(1, 20)])
    x = torch.randn(draw.choice([1, 1, 2, 3, 5, 15, 16, 17, 33]), channels, *size)
    if draw.random() < 0.4:
        sparse = whole = SparseConvPixels(layer, draw.choice([tuple(size), (31, 31)]), block)
    else:
        sparse = whole = SparseConvImages(layer, draw.choice(TILES), block)
    order = draw.choice(["contiguous", "channels last", "innermost", "gaps"])
    if order == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif order == "innermost":
        x = x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    elif order == "gaps":
        x = torch.cat([x, x], dim=-1)[..., : size[1]]
    dense = layer
    if isinstance(sparse, SparseConvPixels) and draw.random() < 0.4:
        second = thin(nn.Conv2d(outputs, outputs, 1), draw)
        last = SparseConvPixels(second, layer(x[:1]).shape[2:])
        whole = SparseChain(nn.Sequential(sparse, last), [(sparse, 0, -1), (last, 1, 1)])

        def dense(x):
            return second(between := layer(x)) + between

    if isinstance(sparse, SparseConvImages) and draw.random() < 0.6:
        sides = layer(x[:1]).shape[2:]
        kernel, dilation = pair(1, 3), pair(1, 2)
        padding = [
            max(draw.randint(0, 3), ((k - 1) * d + 2 - side) // 2)
            for k, d, side in zip(kernel, dilation, sides, strict=True)
        ]
        second = thin(nn.Conv2d(outputs, draw.randint(1, 70), kernel, 1, padding, dilation), draw)
        sparse.activation = "relu"
        whole = SparseConvBlock(
            sparse, SparseConvImages(second, sparse.tile, draw.choice([None, draw.randint(1, 90)]))
        )

        def dense(x):
            return second(layer(x).relu())

    return sparse, whole, dense, x


def attended(draw: random.Random) -> None:
    """Heads of any number and size, as views with gaps; sizes that the kernel is not for are an error."""
    images, heads, queries, keys = draw.randint(1, 3), draw.randint(1, 4), draw.randint(1, 70), draw.randint(1, 70)
    size, gap = draw.choice([1, 8, 16, 32, 48, 80, 96]), draw.randint(0, 3)
    q, k, v = (torch.randn(images, n, heads, size + gap)[..., :size].transpose(1, 2) for n in (queries, keys, keys))
    if size % machine()[0]:
        with contextlib.suppress(RuntimeError):
            torch.ops.tscnc.attention(q, k, v, 1.0)
            raise AssertionError(f"heads of {size} features were no error")
        return
    expected = nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=0.2).float()
    assert torch.allclose(torch.ops.tscnc.attention(q, k, v, 0.2), expected, rtol=1e-4, atol=2e-5)
    for wrong in ((q[:, :, :, :-1], k, v), (q, k[:, :, 1:], v), (q[0], k, v), (q, k, v[:, :-1]), (q.double(), k, v)):
        try:
            torch.ops.tscnc.attention(*wrong, 0.2)
        except RuntimeError:
            continue
        raise AssertionError(f"a damaged call was no error: {[x.shape for x in wrong]}")


WILD = (-1, -4, 2**31 - 1, -(2**31), 10**7)


def damage_unseen(layer: nn.Module, draw: random.Random) -> None:
    """Numbers that change without torch's noticing: what comes out may be anything, but of memory that is ours."""
    for packed in (layer.placed if isinstance(layer, SparseConvPixels) else layer.entries, layer.rows):
        for _ in range(3 if packed.numel() else 0):
            packed.data.view(-1)[draw.randrange(packed.numel())] = draw.choice(WILD)


def damage(layer: nn.Module, x: torch.Tensor, draw: random.Random) -> None:
    """One number among offsets, rows or sizes that a kernel must not follow."""
    wild = draw.choice(WILD)
    entries = layer.entries
    if isinstance(layer, SparseConvPixels):
        layer.size = tuple(x.shape[2:])
        entries = layer.placed = layer._placed(*layer.size)
    kind = draw.choice(["offset", "row", "sizes", "bias", "dtype"])
    if kind == "offset" and len(entries):
        entries[draw.randrange(len(entries)), 0] = wild
    elif kind == "sizes":
        layer.rows = layer.rows[:, :, :2]
    elif kind == "bias":
        layer.bias = nn.Parameter(torch.zeros(len(layer.rows[0]) + 1), requires_grad=False)
    elif kind == "dtype":
        layer.rows = layer.rows.long()
    else:
        block, row = draw.randrange(len(layer.rows)), draw.randrange(len(layer.rows[0]))
        layer.rows[block, row, draw.randrange(3)] = wild


def fuzz(rounds: int, seed: int = 0) -> None:
    """AssertionError where a result is wrong, or a damaged call is none to the operator."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    for number in range(rounds):
        torch.set_num_threads(draw.choice([1, 2, 3]))
        if draw.random() < 0.1:
            attended(draw)
            continue
        damaged, sparse, dense, x = draw.choice([drawn_linear, drawn_conv])(draw)
        with torch.no_grad():
            with torch.backends.mkldnn.flags(enabled=False):  # oneDNN crashes where all of a row is padding
                expected = dense(x)
            assert torch.allclose(sparse(x), expected, rtol=1e-4, atol=2e-5), f"seed {seed}, round {number}: {sparse}"
            damage_unseen(damaged, draw)
            with contextlib.suppress(RuntimeError):
                sparse(x)
            damage(damaged, x, draw)
            try:
                sparse(x)
            except RuntimeError:
                continue
        raise AssertionError(f"seed {seed}, round {number}: a damaged call was no error: {damaged}")


if __name__ == "__main__":
    building.FLAGS = (*building.FLAGS, *SANITIZERS)
    fuzz(int(sys.argv[1]), seed=int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    print(f"{sys.argv[1]} rounds: clean")
