"""What tells a data set from others: pixels, labels, augmentation; not what it is called, and not a random crop."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Subset

from tscnc_hf.data.identity import dataset_identity, spread
from tscnc_hf.data.loading import load_image_data


def identity(**options) -> dict:
    return load_image_data("digits", **({"augmentation": "crop"} | options)).identity


def test_the_same_data_has_the_same_identity_whatever_was_asked_for():
    one, other = identity(), identity(train_limit=10**6, in_memory=True)
    assert one["asked"] != other["asked"]
    assert {**one, "asked": 0} == {**other, "asked": 0}


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"augmentation": "none"}, {"train"}),
        ({"seed": 1}, {"train"}),
        ({"train_limit": 100}, {"train"}),
        ({"test_limit": 100}, {"test"}),
        ({"validation_fraction": 0.2}, {"train", "validation"}),
        ({"image_size": 16}, {"train", "validation", "test"}),
        ({"channels": "grey"}, {"train", "validation", "test"}),
    ],
)
def test_every_argument_that_changes_data_changes_the_part(options, parts):
    one, other = identity(), identity(**options)
    assert {part for part in ("train", "validation", "test") if one[part] != other[part]} == parts


@pytest.mark.parametrize("in_memory", [True, False])
def test_folders_are_told_by_their_images_and_not_by_their_names(in_memory, tmp_path):
    def folder(name: str, grey: int) -> str:
        for split in ("train", "test"):
            for label in ("a", "b"):
                path = tmp_path / name / split / label
                path.mkdir(parents=True)
                for number in range(6):
                    Image.new("RGB", (16, 16), (grey, number, 0)).save(path / f"{number}.png")
        return str(tmp_path / name)

    options = {"image_size": 16, "in_memory": in_memory, "augmentation": "none"}
    one, same, other = (
        load_image_data(folder(name, grey), **options).identity for name, grey in (("x", 1), ("y", 1), ("z", 2))
    )
    assert one["asked"]["dataset"] == "x" and {**one, "asked": 0} == {**same, "asked": 0}
    assert all(one[part]["digest"] != other[part]["digest"] for part in ("train", "validation", "test"))


class Foreign:
    """Somebody's data set, augmented at random."""

    def __init__(self, labels):
        self.given = labels

    def __len__(self):
        return len(self.given)

    def __getitem__(self, place):
        noise = torch.rand(3, 8, 8) * random.random() * np.random.random()
        return {"pixel_values": noise, "labels": self.given[place]}


def test_a_foreign_data_set_is_told_by_its_size_and_labels_and_no_random_state_moves():
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    one = dataset_identity(Foreign([0, 1] * 50))
    assert one == dataset_identity(Foreign([0, 1] * 50)) and one["items"] == 100
    assert one != dataset_identity(Foreign([1, 0] * 50)) and one != dataset_identity(Foreign([0, 1] * 49))
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_parts_and_sums_of_ours_are_told_by_ours(digits):
    train = digits.train
    first, second = Subset(train, range(10)), Subset(train, range(1, 11))
    assert dataset_identity(first)["of"] == train.identity
    assert dataset_identity(first) != dataset_identity(second)
    assert dataset_identity(ConcatDataset([first, second])) != dataset_identity(ConcatDataset([second, first]))


def test_of_a_stream_nothing_is_known():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield {"labels": 0}

    assert dataset_identity(Stream()) == {}


def test_places_are_spread_evenly_with_both_ends():
    assert spread(0) == [] and spread(1) == [0] and spread(5) == [0, 1, 2, 3, 4]
    places = spread(1000, 4)
    assert places == [0, 333, 666, 999]
