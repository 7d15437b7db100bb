"""Training and evaluating on data sets that can only be iterated."""

import random
from itertools import islice

import pytest
import torch
from torch.utils.data import IterableDataset

from tscnc_hf.data.streams import FirstItems, is_stream


OPTIONS = {"max_steps": 6, "per_device_train_batch_size": 4, "objective": "natural", "adversary": "none"}
OPTIONS |= {"eval_attack_steps": 0, "save_strategy": "steps", "save_steps": 1, "optim": "sgd", "learning_rate": 0.1}
OPTIONS |= {"target_sparsity": 0.5, "pruning_interval": 1, "tsc_weight": 0, "cnc_weight": 0}


class Passes(IterableDataset):
    """`count` images a pass, augmented by the epoch."""

    def __init__(self, data, count):
        self.data, self.count, self.epochs = data, count, []

    def __iter__(self):
        self.epochs.append(self.data.epoch)
        return (self.data[place % len(self.data)] for place in range(self.count))


class Shuffled(Passes):
    """By Python's own random numbers, as each pass begins."""

    def __iter__(self):
        order = random.sample(range(len(self.data)), len(self.data))
        return (self.data[place] for place in order[: self.count])


class Endless(IterableDataset):
    def __init__(self, data):
        self.data, self.given = data, 0

    def __iter__(self):
        place = 0
        while True:
            self.given += 1
            yield self.data[place % len(self.data)]
            place += 1


class Once(IterableDataset):
    """It is over after one pass."""

    def __init__(self, data, count):
        self.items = iter([data[place] for place in range(count)])

    def __iter__(self):
        return self.items


class Own:
    """No data set of torch's: without a length, and with items that cannot be picked."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        raise TypeError("how should I know")

    def __getitem__(self, index):
        return self.data[index % len(self.data)]


def hub_stream(data, shuffled):
    import datasets

    rows = [data[place] for place in range(len(data))]
    columns = {
        "pixel_values": [row["pixel_values"].numpy() for row in rows],
        "labels": [int(r["labels"]) for r in rows],
    }
    stream = datasets.Dataset.from_dict(columns).to_iterable_dataset(num_shards=2).map(lambda row: row)
    return stream.shuffle(seed=3, buffer_size=5) if shuffled else stream


STREAMS = {
    "one pass": lambda data: Passes(data, 100),
    "two passes": lambda data: Passes(data, 14),
    "many passes": lambda data: Passes(data, 4),
    "endless": Endless,
    "shuffled": lambda data: Shuffled(data, 12),
    "datasets": lambda data: hub_stream(data, False),
    "datasets, shuffled": lambda data: hub_stream(data, True),
}


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_trains_and_is_resumed_exactly(name, digits, build, make_trainer, tmp_path):
    def run(folder, resume=None):
        data = digits.train.subset(range(12))
        trainer = make_trainer(
            build("vit", seed=0 if resume is None else 7, dropout=0.2), train=STREAMS[name](data), **OPTIONS,
            output_dir=str(tmp_path / folder),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.state.global_step == 6
        return weights(trainer)

    whole = run("whole")
    for step in (3, 5):
        again = run(f"cut-{step}", str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert [name for name in whole if not torch.equal(whole[name], again[name])] == []


def test_each_pass_has_its_epoch_and_too_few_batches_make_no_step(digits, build, make_trainer):
    stream = Passes(digits.train.subset(range(12)), 20)  # 5 batches: two steps of two, and one that is left
    options = OPTIONS | {"gradient_accumulation_steps": 2, "save_strategy": "no"}
    trainer = make_trainer(build("vit"), train=stream, **options)
    trainer.train()
    assert trainer.state.global_step == 6 and stream.epochs == [0, 1, 2]


def test_another_number_of_images_a_step_is_refused(digits, build, make_trainer, tmp_path):
    stream = Passes(digits.train.subset(range(12)), 100)
    make_trainer(build("vit"), train=stream, **OPTIONS).train()
    other = make_trainer(build("vit"), train=stream, **(OPTIONS | {"per_device_train_batch_size": 2, "max_steps": 8}))
    with pytest.raises(ValueError, match=r"images_a_step=4 \(now 2\)"):
        other.train(resume_from_checkpoint=True)


def test_a_stream_that_is_over_does_not_end_training_early(digits, build, make_trainer):
    trainer = make_trainer(build("vit"), train=Once(digits.train, 8), **OPTIONS)
    with pytest.raises(
        RuntimeError, match="too few images for an optimizer step in pass 2, after step 2 of 6.*intact"
    ):
        trainer.train()


def test_steps_are_asked_for(digits, build, make_trainer):
    with pytest.raises(ValueError, match="max_steps has to be specified"):
        make_trainer(build("vit"), train=Passes(digits.train, 100), **(OPTIONS | {"max_steps": -1}))


def test_evaluation_of_a_stream_is_bounded(digits, build, make_trainer):
    data = digits.validation.subset(range(20))
    expected = make_trainer(build("vit"), evaluate=data, **OPTIONS).evaluate()
    stream = Endless(data)
    trainer = make_trainer(build("vit"), evaluate=stream, eval_stream_images=20, **OPTIONS)
    for given in (None, stream, {"some": stream}):
        found = trainer.evaluate(given)
        name = "eval_some_accuracy" if isinstance(given, dict) else "eval_accuracy"
        assert found[name] == expected["eval_accuracy"]
    assert stream.given == 60
    with pytest.raises(ValueError, match="the stream has no image"):
        trainer.evaluate(Once(data, 0))
    assert len(trainer.predict(Passes(data, 20)).label_ids) == 20  # all that there is


def test_a_stream_is_tested_on_its_first_images(digits, build, make_trainer):
    data = digits.test.subset(range(10))
    trainer = make_trainer(build("vit"), **OPTIONS)
    with pytest.raises(ValueError, match="give n"):
        trainer.test(Endless(data), ("clean",))
    assert trainer.test(Endless(data), ("clean",), n=10)["robustness"]["n"] == 10


def test_what_is_a_stream(digits):
    assert is_stream(Passes(digits.train, 3)) and is_stream(iter([1])) and is_stream(Own(digits.train))
    assert (
        not is_stream(digits.train) and not is_stream([1]) and is_stream(hub_stream(digits.test.subset([0, 1]), False))
    )
    assert len(list(FirstItems(Passes(digits.train, 3), 5))) == 3
    loader = torch.utils.data.DataLoader(FirstItems(Endless(digits.train), 5), batch_size=None, num_workers=2)
    assert len(list(islice(loader, 9))) == 5
