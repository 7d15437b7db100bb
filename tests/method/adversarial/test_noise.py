"""Noise by place: the same for an image in whatever batch it is; and noise it is."""

import itertools

import pytest
import torch

from tscnc_hf.method.adversarial.ball import NORMS, random_start
from tscnc_hf.method.adversarial.noise import PlacedNoise, normal_like, seeded_generator, uniform_like
from tscnc_hf.method.adversarial.pgd import ADVERSARIES, craft


KEY = (0, "train", 7)


def drawn(first: int, count: int, draw, key=KEY) -> torch.Tensor:
    return draw(torch.empty(count, 3, 4, 5), PlacedNoise("cpu", key, first, count))


@pytest.mark.parametrize("draw", [uniform_like, normal_like])
def test_a_batch_cut_up_draws_what_the_whole_draws(draw):
    whole = drawn(0, 70, draw)
    for cuts in ([0, 8, 70], [0, 4, 20, 37, 38, 70], list(range(71))):
        parts = [drawn(first, last - first, draw) for first, last in itertools.pairwise(cuts)]
        assert torch.equal(torch.cat(parts), whole)


def test_images_keys_and_draws_differ():
    rows = torch.cat([drawn(0, 40, uniform_like, key) for key in (KEY, (0, "train", 8), (1, "train", 7))]).flatten(1)
    assert len(rows.unique(dim=0)) == 120
    noise = PlacedNoise("cpu", KEY, 0, 40)
    x = torch.empty(40, 3, 4, 5)
    assert not torch.equal(uniform_like(x, noise), uniform_like(x, noise))


def test_it_is_uniform_and_normal():
    """Moments and correlations of 1,000 images, within five standard errors."""
    for draw, mean, deviation in ((uniform_like, 0.5, 12**-0.5), (normal_like, 0.0, 1.0)):
        values = (drawn(5, 1000, draw).double().flatten(1) - mean) / deviation
        error = 5 / values.numel() ** 0.5
        assert abs(values.mean()) < error
        assert abs(values.square().mean() - 1) < 1.5 * error
        neighbours = (values[1:] * values[:-1]).mean(), (values[:, 1:] * values[:, :-1]).mean()
        blocks = (values[16:] * values[:-16]).mean()
        assert all(abs(correlation) < error * 1.05 for correlation in (*neighbours, blocks))
    assert 0 <= drawn(0, 1000, uniform_like).min() and drawn(0, 1000, uniform_like).max() < 1


@pytest.mark.parametrize(
    ("adversary", "norm"),
    [(name, norm) for name in ADVERSARIES[1:] for norm in NORMS if (name, norm) != ("n-fgsm", "l2")],
)
def test_an_adversary_makes_of_an_image_the_same_in_every_batch(adversary, norm):
    torch.manual_seed(0)
    weight = torch.randn(60, 10, dtype=torch.float64)
    x, y = torch.rand(22, 3, 4, 5, dtype=torch.float64), torch.randint(10, (22,))

    def attack(part: slice) -> torch.Tensor:
        noise = PlacedNoise("cpu", KEY, part.start, part.stop - part.start)
        options = {"epsilon": 0.1, "steps": 2, "step_size": None, "norm": norm, "generator": noise}
        return craft(adversary, lambda z: z.flatten(1) @ weight, x[part], y[part], **options)

    parts = [attack(slice(0, 3)), attack(slice(3, 19)), attack(slice(19, 22))]
    assert torch.allclose(torch.cat(parts), attack(slice(0, 22)), rtol=0, atol=1e-12)


def test_a_torch_generator_draws_as_torch_does():
    x = torch.rand(6, 3, 4, 4)
    noise = torch.rand(x.shape, generator=seeded_generator("cpu", 3))
    expected = (x + (2 * noise - 1) * 0.1).clamp(0, 1)
    assert torch.equal(random_start(x, 0.1, generator=seeded_generator("cpu", 3)), expected)


def test_another_number_of_images_is_an_error():
    with pytest.raises(ValueError, match="for the 8 images from place 16 on, not for 5"):
        uniform_like(torch.empty(5, 3, 4, 4), PlacedNoise("cpu", KEY, 16, 8))
