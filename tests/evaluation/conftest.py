"""Small networks that are trained for real, so that attacks have something to do."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tscnc_hf.method.adversary import pgd, seeded_generator


class AsTheyAre:
    """Says that a model takes pixels as they are."""

    image_mean, image_std = [0.0], [1.0]


@pytest.fixture(scope="session")
def as_they_are():
    return AsTheyAre


@pytest.fixture(scope="session")
def train_network(digits):
    """`train_network(epsilon, seed=0)`: a convolutional network of the digits, in evaluation mode."""

    def train(epsilon: float, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, stride=2), nn.ReLU(),
            nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10),
        )  # fmt: skip
        optimizer = torch.optim.Adam(model.parameters(), 2e-3)
        generator = seeded_generator("cpu", seed, "train")
        for _ in range(300):
            batch = digits.train.__getitems__(torch.randint(len(digits.train), (128,), generator=generator).tolist())
            x, y = batch["pixel_values"].float(), batch["labels"]
            if epsilon:
                x = pgd(model, x, y, epsilon=epsilon, steps=3, generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        model.zero_grad(set_to_none=True)
        return model.eval()

    return train


@pytest.fixture(scope="session")
def robust_network(train_network):
    return train_network(0.1)


@pytest.fixture(scope="session")
def plain_network(train_network):
    return train_network(0.0)
