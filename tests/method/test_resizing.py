"""Resizes against the image libraries that they stand for, PIL and torchvision, and against explicit operators."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as torchvision

from tscnc_hf.method.adversarial.pixels import pixel_inputs
from tscnc_hf.method.resizing import Resize


PIL = {"nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def noise(height, width, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8))


def by_pil(image, size, interpolation):
    picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(size[::-1], PIL[interpolation])
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255


@pytest.mark.parametrize("size", [(32, 32), (24, 20)])
@pytest.mark.parametrize("times", [1, 2, 4, 7])
def test_nearest_by_whole_multiples_is_exactly_what_pil_makes(size, times):
    image, wanted = noise(*size), (times * size[0], times * size[1])
    assert torch.equal(Resize(*wanted, "nearest")(image[None] / 255), by_pil(image, wanted, "nearest"))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size, wanted", [((32, 32), (128, 128)), ((32, 32), (224, 224)), ((20, 24), (33, 47)),
                                          ((96, 80), (32, 37)), ((32, 32), (32, 64))])  # fmt: skip
def test_the_others_are_pil_s_but_for_its_rounding_in_each_direction(interpolation, size, wanted):
    image = noise(*size)
    ours, theirs = Resize(*wanted, interpolation)(image[None] / 255), by_pil(image, wanted, interpolation)
    directions = sum(a != b for a, b in zip(size, wanted, strict=True))
    assert 0.2 / 255 < (ours - theirs).abs().max() <= (0.6 * directions) / 255
    assert 0 <= ours.min() and ours.max() <= 1


def test_the_direction_that_comes_first_matters_where_bicubic_is_cut_off():
    image = noise(64, 64)
    by_library = torchvision.resize(image[None], [37, 51], interpolation=torchvision.InterpolationMode.BICUBIC) / 255
    ours = [Resize(37, 51, "bicubic", first=first)(image[None] / 255) for first in ("width", "height")]
    off = [(made - by_library).abs().max() * 255 for made in ours]
    assert off[0] < 1.2 < 3 < off[1]


def test_a_crop_is_cut_out_and_what_lies_outside_is_black():
    image = noise(8, 10)[None] / 255
    assert torch.equal(Resize(8, 10, "nearest", (1, 2, 5, 6))(image), image[:, :, 1:6, 2:8])
    padded = Resize(8, 10, "nearest", (-1, -2, 10, 13))(image)
    assert torch.equal(padded[:, :, 1:9, 2:12], image) and padded.shape == (1, 3, 10, 13)
    assert padded.count_nonzero() == image.count_nonzero()
    assert Resize(16, 20, "bilinear", (4, 5, 8, 10)).output == (8, 10)
    assert Resize(16, 20, "bilinear").output == (16, 20)


CASES = [
    (Resize(16, 16, "nearest"), (4, 4), 4.0),
    (Resize(12, 8, "nearest"), (4, 4), math.sqrt(6)),
    (Resize(8, 8, "bilinear"), (8, 8), 1.0),
    (Resize(20, 17, "bilinear"), (5, 6), None),
    (Resize(17, 20, "bicubic", (3, 4, 12, 13)), (5, 6), None),
    (Resize(3, 5, "bicubic"), (5, 6), None),
]


@pytest.mark.parametrize("resize, size, known", CASES, ids=[str(number) for number in range(len(CASES))])
def test_the_gain_is_the_operator_norm_of_the_whole_map(resize, size, known):
    """Column by column; about grey, so that bicubic is not cut off at 0 and 1, which stretches nothing."""
    changes = 0.1 * torch.eye(math.prod(size), dtype=torch.float64).reshape(-1, 1, *size)
    columns = (resize(0.5 + changes) - resize(torch.full_like(changes, 0.5))).flatten(1) / 0.1
    exact = torch.linalg.matrix_norm(columns, 2).item()
    assert resize.gain(*size) == pytest.approx(exact, rel=1e-6)
    assert known is None or exact == pytest.approx(known, rel=1e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "resize",
    [Resize(16, 16, "nearest"), Resize(11, 13, "bilinear", (1, 2, 8, 9)), Resize(11, 13, "bicubic", first="height")],
    ids=lambda resize: resize.interpolation,
)
def test_gradients_are_those_of_finite_differences(resize, layout):
    pixels = 0.3 + 0.4 * torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pixels = pixels.to(memory_format=layout).requires_grad_()

    def inputs(x):
        return pixel_inputs(x, [0.4, 0.5, 0.6], [0.2, 0.25, 0.3], [2, 1, 0], lambda height, width: resize)

    assert torch.autograd.gradcheck(inputs, pixels, fast_mode=True)
    assert inputs(pixels).shape[2:] == resize.output


@pytest.mark.parametrize(
    "resize, before",
    [
        (Resize(16, 16, "nearest"), True),
        (Resize(16, 16, "nearest", (1, 2, 15, 14)), True),
        (Resize(16, 16, "nearest", (1, 2, 16, 14)), False),  # a row of black
        (Resize(8, 8, "nearest", (-1, 0, 8, 8)), False),
        (Resize(11, 13, "bilinear"), False),
    ],
)
def test_pixels_that_are_only_picked_may_be_normalised_before(resize, before):
    pixels, how = torch.rand(2, 3, 8, 8), ([0.4, 0.5, 0.6], [0.2, 0.25, 0.3], [2, 1, 0])
    assert resize.only_picks is before
    first, then = resize(pixel_inputs(pixels, *how)), pixel_inputs(resize(pixels), *how)
    assert torch.equal(first, then) is before
    assert torch.equal(pixel_inputs(pixels, *how, lambda height, width: resize), then)


@pytest.mark.parametrize("resize", [Resize(16, 16, "nearest"), Resize(11, 13, "bicubic")], ids=["nearest", "bicubic"])
def test_autocast_and_compilation_change_no_pixel(resize):
    pixels = torch.rand(1, 3, 8, 8)
    plain = resize(pixels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(resize(pixels), plain)
    # sizes fixed: torch 2.10 fails where it makes symbols of them, which a second size in one process has it do
    assert torch.equal(torch.compile(resize, backend="aot_eager", dynamic=False)(pixels), plain)


def test_json_and_back():
    for resize, _, _ in CASES:
        assert Resize.from_dict(resize.to_dict()) == resize
