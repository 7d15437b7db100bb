"""Sparse layers against the dense ones in float64, and calls that must be refused."""

import copy
import random

import pytest
import torch
from torch import nn

from tests.inference.fuzz import TILES, fuzz, thin
from tscnc_hf.inference.layers import (
    SparseChain,
    SparseConvBlock,
    SparseConvImages,
    SparseConvPixels,
    SparseLinear,
    SparseMLP,
)


BATCHES = [1, 3, 16, 17, 64]
CONVOLUTIONS = [  # channels, outputs, size, then the arguments of nn.Conv2d
    (3, 70, (9, 9), dict(kernel_size=3, padding=1)),
    (20, 24, (8, 6), dict(kernel_size=3, padding=1, stride=2)),
    (8, 16, (7, 13), dict(kernel_size=(3, 1), padding=(1, 0))),
    (8, 16, (12, 12), dict(kernel_size=3, padding=2, dilation=2)),
    (8, 16, (9, 9), dict(kernel_size=3, padding=2, dilation=2, stride=2)),
    (8, 16, (12, 10), dict(kernel_size=5, padding=2, stride=3)),
    (16, 24, (6, 6), dict(kernel_size=1, stride=2)),
    (8, 16, (8, 8), dict(kernel_size=4, stride=4)),
]


def sparse_weights(layer, zeros=0.8):
    """An output without a weight, and one that is dense, among others."""
    with torch.no_grad():
        layer.weight[torch.rand_like(layer.weight) < zeros] = 0
        layer.weight[1] = 0
        layer.weight[2] = 1.5
    return layer.requires_grad_(False).eval()


def in_float64(layer, x):
    expected = layer.double()(x.double())
    layer.float()
    return expected


def assert_close(got, expected):
    assert got.shape == expected.shape and got.dtype == torch.float32
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("vectors", range(1, 9))
@pytest.mark.parametrize("block", [None, 33])
def test_linear(vectors, block):
    layer = sparse_weights(nn.Linear(70, 130))
    sparse = SparseLinear(layer, vectors, block)
    for tokens in (*BATCHES, 130):
        x = torch.randn(tokens, 70)
        assert_close(sparse(x), in_float64(layer, x))
    assert_close(sparse(x.view(2, 5, 13, 70)), in_float64(layer, x).view(2, 5, 13, 130))
    assert_close(sparse(x.T.contiguous().T), in_float64(layer, x))


@pytest.mark.parametrize("channels, outputs, size, options", CONVOLUTIONS)
@pytest.mark.parametrize("block", [None, 5])
def test_convolution(channels, outputs, size, options, block):
    layer = sparse_weights(nn.Conv2d(channels, outputs, **options))
    kernels = [SparseConvPixels(layer, size, block), SparseConvPixels(layer, (32, 32), block)]
    kernels += [SparseConvImages(layer, tile, block) for tile in TILES]
    for batch in BATCHES:
        x = torch.randn(batch, channels, *size)
        expected = in_float64(layer, x)
        residual = torch.randn_like(expected, dtype=torch.float32)
        with_residual = torch.relu(expected + residual)
        for kernel in kernels:
            kernel.activation = "none"
            assert_close(kernel(x), expected)
            kernel.activation = "relu"
            assert_close(kernel(x.contiguous(memory_format=torch.channels_last), residual), with_residual)


@pytest.mark.parametrize("zeros", [0.0, 1.0])
def test_dense_and_empty_weights(zeros):
    linear, conv = nn.Linear(40, 20), nn.Conv2d(6, 10, 3, padding=1)
    for layer in (linear, conv):
        with torch.no_grad():
            layer.weight.mul_(1 - zeros)
    x, image = torch.randn(5, 40), torch.randn(2, 6, 7, 7)
    assert_close(SparseLinear(linear)(x), in_float64(linear, x).detach())
    for kernel in (SparseConvPixels(conv, (7, 7)), SparseConvImages(conv, (4, 4)), SparseConvImages(conv, (2, 7), 4)):
        assert_close(kernel(image), in_float64(conv, image).detach())


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads(threads):
    before = torch.get_num_threads()
    layer, conv = sparse_weights(nn.Linear(50, 300)), sparse_weights(nn.Conv2d(9, 140, 3, padding=1))
    torch.set_num_threads(threads)
    try:
        for batch in (1, 2, 7, 40):
            x, image = torch.randn(batch, 50), torch.randn(batch, 9, 11, 5)
            assert_close(SparseLinear(layer)(x), in_float64(layer, x))
            for kernel in (SparseConvPixels(conv, (11, 5)), SparseConvImages(conv, (2, 4))):
                assert_close(kernel(image), in_float64(conv, image))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "activation, function",
    [("relu", torch.relu), ("gelu", nn.functional.gelu), ("silu", nn.functional.silu)],
)
def test_activations_over_their_whole_range(activation, function):
    layer = nn.Linear(1, 1, bias=False).requires_grad_(False)
    layer.weight.fill_(1.0)
    sparse = SparseLinear(layer)
    sparse.activation = activation
    x = torch.cat([torch.linspace(-30, 30, 20001), torch.tensor([-1e30, -100.0, -0.0, 0.0, 1e-30, 100.0, 1e30])])
    expected = function(x.double())
    assert ((sparse(x[:, None])[:, 0] - expected).abs() <= 1e-6 + 1e-6 * expected.abs()).all()
    assert sparse(torch.tensor([[float("nan")]])).isnan().all()


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("features", [1, 3, 30])
def test_a_layer_norm_before_the_product(features, affine):
    norm = nn.LayerNorm(features, eps=1e-3, elementwise_affine=affine).requires_grad_(False)
    for parameter in norm.parameters():
        parameter.normal_()
    one, two = sparse_weights(nn.Linear(features, 90)), sparse_weights(nn.Linear(90, 20))
    sparse = SparseLinear(one, 3)
    other = copy.copy(sparse)
    sparse.normalise(norm)
    for tokens in (1, 31, 200):
        x = torch.randn(tokens, features) * 5 + 3
        given = in_float64(norm, x)
        assert_close(sparse(x), in_float64(one, given))
        assert_close(SparseMLP(sparse, SparseLinear(two, 3))(x), in_float64(two, in_float64(one, given)))
        assert_close(other(x), in_float64(one, x))
    with pytest.raises(RuntimeError, match="norm of shape"):
        sparse.norm = sparse.norm[:1]
        sparse(x)


def test_two_layers_at_once():
    one, two = sparse_weights(nn.Linear(30, 90)), sparse_weights(nn.Linear(90, 20))
    first = SparseLinear(one, 2)
    first.activation = "gelu"
    both = SparseMLP(first, SparseLinear(two, 2, 31))
    for tokens in (1, 31, 200):
        x = torch.randn(tokens, 30)
        assert_close(both(x), in_float64(two, nn.functional.gelu(in_float64(one, x))))


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("channels, outputs, size, options", CONVOLUTIONS)
def test_two_convolutions_at_once(channels, outputs, size, options, tile):
    """With a residual; the rows between them are seldom a multiple of the tile's, and threads share one batch."""
    first = sparse_weights(nn.Conv2d(channels, outputs, **options))
    second = sparse_weights(nn.Conv2d(outputs, 20, (3, 2), padding=(2, 1), dilation=(2, 1)))
    both = SparseConvBlock(SparseConvImages(first, tile, 5), SparseConvImages(second, tile))
    both.first.activation, both.second.activation = "silu", "relu"
    for images in (1, 16, 40):
        x = torch.randn(images, channels, *size)
        expected = in_float64(second, nn.functional.silu(in_float64(first, x)))
        residual = torch.randn(expected.shape)
        assert_close(both(x), expected.relu())
        assert_close(both(x, residual), (expected + residual).relu())


def test_only_a_second_convolution_of_stride_1_can_be_joined():
    layer = nn.Conv2d(4, 4, 3, stride=2)
    with pytest.raises(ValueError, match=r"stride \(2, 2\)"):
        SparseConvBlock(SparseConvImages(layer, (2, 2)), SparseConvImages(layer, (2, 2)))


def small_chain():
    convs = [thin(nn.Conv2d(*of), random.Random(0)) for of in ((4, 6, 3, 2, 1), (6, 6, 3, 1, 1), (4, 6, 1, 2))]
    sizes = (9, 8), (5, 4), (9, 8)
    first, second, shortcut = (SparseConvPixels(conv, size) for conv, size in zip(convs, sizes, strict=True))
    second.activation = "relu"
    steps = [(shortcut, 0, -1), (first, 0, -1), (second, 2, 1)]
    return convs, SparseChain(nn.Sequential(first, second, shortcut), steps)


def test_convolutions_of_a_block_as_one_call():
    (first, second, shortcut), chain = small_chain()
    for size in ((9, 8), (12, 7)):
        x = torch.randn(3, 4, *size)
        between = in_float64(first, x)
        assert_close(chain(x), torch.relu(in_float64(second, between) + in_float64(shortcut, x)))
    with pytest.raises(RuntimeError, match="no gradients"):
        chain(x.requires_grad_())
    with pytest.raises(RuntimeError, match="training mode"):
        chain.train()(x.detach())


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors, plan: (tensors[:-1], plan), "8 tensors and 39 numbers"),
        (lambda tensors, plan: ([], []), "0 tensors"),
        (lambda tensors, plan: (tensors, [1, *plan[1:]]), "takes 1 and -1, which are none before it"),
        (lambda tensors, plan: (tensors, [0, 1, *plan[2:]]), "takes 0 and 1, which are none before it"),
        (lambda tensors, plan: (tensors, [0, 0, *plan[2:]]), "residual is"),
        (lambda tensors, plan: (tensors, [*plan[:-1], 7]), "activation 7"),
    ],
)
def test_a_damaged_chain_is_refused(change, message):
    _, chain = small_chain()
    tensors = [tensor for layer, _, _ in chain.steps for tensor in (layer.placed, layer.rows, layer.bias)]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.tscnc.chain(torch.randn(1, 4, 9, 8), *change(tensors, chain.plan))


def test_shapes_for_compilers():
    _, chain = small_chain()
    tensors = [tensor for layer, _, _ in chain.steps for tensor in (layer.placed, layer.rows, layer.bias)]
    torch.library.opcheck(
        torch.ops.tscnc.chain.default,
        (torch.randn(3, 4, 9, 8), tensors, chain.plan),
        test_utils=("test_schema", "test_faketensor"),
    )
    conv = thin(nn.Conv2d(4, 6, 3, 2, 1), random.Random(0))
    x = torch.randn(3, 4, 9, 8)
    for kernel in (SparseConvPixels(conv, (9, 8)), SparseConvImages(conv, (2, 2))):
        arguments = (x, getattr(kernel, "placed", kernel.entries), kernel.rows, kernel.bias, None, *kernel._geometry())
        more = ((2, 2), kernel.block_channels) if isinstance(kernel, SparseConvImages) else ()
        operator = torch.ops.tscnc.conv_images if more else torch.ops.tscnc.conv_pixels
        torch.library.opcheck(
            operator.default, (*arguments, *more, 64, 0), test_utils=("test_schema", "test_faketensor")
        )


@pytest.mark.parametrize(
    "x, message",
    [
        (torch.randn(2, 5), "has not 6 features"),
        (torch.randn(0, 6), "is empty"),
        (torch.randn(2, 6, dtype=torch.float64), "take float32"),
        (torch.randn(2, 6, requires_grad=True), "no gradients"),
    ],
)
def test_wrong_input_is_refused(x, message):
    with pytest.raises(RuntimeError, match=message):
        SparseLinear(thin(nn.Linear(6, 3), random.Random(0)))(x)


def test_training_mode_is_refused():
    with pytest.raises(RuntimeError, match="training mode"):
        SparseLinear(nn.Linear(6, 3)).train()(torch.randn(2, 6))


def test_packed_weights_are_looked_at_again_when_they_change():
    layer, x = nn.Linear(6, 3).requires_grad_(False), torch.randn(2, 6)
    sparse = SparseLinear(layer)
    for make in (lambda: torch.tensor([[[0, 0, 99]] * 3], dtype=torch.int32), lambda: sparse.rows.clone()):
        for _ in range(50):  # in the memory of the ones before, often
            right, sparse.rows = sparse.rows, make()
            if (sparse.rows == right).all():
                assert_close(sparse(x), in_float64(layer, x))
                sparse.rows[0, 0, 0] = 3
            with pytest.raises(RuntimeError, match="rows do not name|among the"):
                sparse(x)
            sparse.rows = right
    with torch.inference_mode():  # in which tensors have no versions
        fresh = SparseLinear(layer)
        assert_close(fresh(x), in_float64(layer, x))
        fresh.entries[:, 0] = 2**30
        with pytest.raises(RuntimeError, match="outside the tile"):
            fresh(x)


def test_images_smaller_than_the_kernel_are_refused():
    for kernel in (SparseConvPixels(nn.Conv2d(1, 1, 5), (5, 5)), SparseConvImages(nn.Conv2d(1, 1, 5), (1, 1))):
        with pytest.raises(RuntimeError, match="smaller than the kernel"):
            kernel(torch.randn(1, 1, 4, 5))


def test_arguments_drawn_at_random():
    before = torch.get_num_threads()
    try:
        fuzz(60)
    finally:
        torch.set_num_threads(before)
