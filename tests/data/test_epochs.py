"""`set_epoch` reaches a data set wherever it lies."""

import pytest
import torch
from torch.utils.data import ChainDataset, ConcatDataset, DataLoader, Dataset, IterableDataset, StackDataset, Subset

from tscnc_hf.data.epochs import set_epoch


class Holds(Dataset):
    """Somebody's own."""

    def __init__(self, inner):
        self.labels, self._parts = list(range(1000)), {"train": inner}

    def __getitem__(self, index):
        return self._parts["train"][index]

    def __len__(self):
        return len(self._parts["train"])


class Plain:
    """No `Dataset` of torch, and with a cycle."""

    def __init__(self, inner):
        self.source, self.me = [inner], self

    def __getitem__(self, index):
        return self.source[0][index]


class Stream(IterableDataset):
    def __init__(self, inner):
        self.inner = inner

    def __iter__(self):
        return (self.inner[place] for place in range(len(self.inner)))


class Crops:
    """A transform that wants to know the epoch, held by a `datasets.Dataset`."""

    def __init__(self):
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __call__(self, batch):
        return batch


WAYS = {
    "itself": lambda data: data,
    "subset": lambda data: Subset(data, range(8)),
    "concatenated": lambda data: ConcatDataset([data.subset(range(2)), Subset(data, range(4))]),
    "random split": lambda data: torch.utils.data.random_split(data, [0.5, 0.5])[1],
    "nested": lambda data: Subset(ConcatDataset([Subset(Holds(data), range(6))]), range(3)),
    "own": Holds,
    "plain": Plain,
    "stacked": lambda data: StackDataset(image=data, again=Holds(data)),
    "stream": Stream,
    "chained": lambda data: ChainDataset([Stream(data), Stream(Plain(data))]),
    "loader": lambda data: DataLoader(Subset(data, range(3))),
}


@pytest.mark.parametrize("way", WAYS)
def test_it_arrives(way, digits):
    data = digits.train.subset(range(16))
    set_epoch(WAYS[way](data), 3)
    assert data.epoch == 3


def test_every_part_is_told(digits):
    parts = [digits.train.subset([place]) for place in range(3)]
    set_epoch((ConcatDataset([parts[0], Holds(parts[1])]), Subset(parts[2], [0]), None), 2)
    assert [part.epoch for part in parts] == [2] * 3


def test_items_are_not_taken_for_data_sets():
    class Item:
        def __getitem__(self, key):
            raise AssertionError

    set_epoch([{"pixel_values": Item(), "labels": 0}] * 3, 1)


def test_a_transform_of_a_hub_data_set_is_told():
    import datasets

    crops = Crops()
    set_epoch(Subset(datasets.Dataset.from_dict({"image": [1, 2]}).with_transform(crops), [0]), 5)
    assert crops.epoch == 5


@pytest.mark.parametrize("wrap", [WAYS["subset"], WAYS["nested"], WAYS["own"]])
def test_training_sees_other_crops_in_every_epoch(wrap, digits, build, make_trainer):
    seen, data = [], digits.train.subset(range(8))

    class Watched(Holds):
        def __getitem__(self, index):
            seen.append(data.epoch)
            return super().__getitem__(index)

    options = {"num_train_epochs": 3, "objective": "natural", "adversary": "none", "target_sparsity": 0}
    make_trainer(build("vit"), train=Subset(Watched(wrap(data)), range(3)), **options).train()
    assert seen[-9:] == [0] * 3 + [1] * 3 + [2] * 3


def test_workers_that_stay_are_told(digits):
    data = digits.train.subset(range(4))
    loader = DataLoader(Subset(Holds(data), range(4)), num_workers=1, persistent_workers=True)
    epochs = [torch.stack([batch["pixel_values"] for batch in loader])]
    set_epoch(loader, 1)
    epochs.append(torch.stack([batch["pixel_values"] for batch in loader]))
    loader._iterator._shutdown_workers()
    assert not torch.equal(*epochs)
    expected = torch.stack([data[place]["pixel_values"] for place in range(4)])
    assert torch.equal(epochs[1].squeeze(1), expected)
