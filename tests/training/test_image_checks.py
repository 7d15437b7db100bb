"""What is known of images, labels and the model's outputs before the first step is refused there, by name."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset
from torchvision.transforms import v2
from transformers import ViTImageProcessor

from tscnc_hf.data.batches import collate
from tscnc_hf.evaluation.measures.robustness import evaluate_robustness
from tscnc_hf.method.adversarial.pixels import Preprocessing, logits_of
from tscnc_hf.training.image_checks import check_images
from tscnc_hf.training.trainer import TSCNCTrainer


PROCESSOR = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.25])


class Stream(IterableDataset):
    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return (self.items[place] for place in range(len(self.items)))


def network(norm=False):
    layers = [nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), *([nn.BatchNorm2d(4)] if norm else [])]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 10))


class Items(Dataset):
    """Labels that nobody sees before the items are read."""

    def __init__(self, ids, size=8):
        self.ids, self.size = ids, size

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, place):
        return {"pixel_values": torch.full((3, self.size, self.size), 0.5), "labels": self.ids[place]}


def trainer(make_config, train, evaluate=None, model=None, collator=None, **options):
    options = {"objective": "natural", "max_steps": 4, "target_sparsity": 0} | options
    model = network() if model is None else model
    return TSCNCTrainer(model, make_config(**options), collator, train, evaluate, processing_class=PROCESSOR)


@pytest.mark.parametrize("wrong", [10, -1, -100])
@pytest.mark.parametrize("objective", ["natural", "mart"])
def test_labels_that_only_a_later_batch_has(wrong, objective, make_config):
    ids = [3] * 63 + [wrong]
    with pytest.raises(ValueError, match=rf"labels run from .*{wrong}.* but the model has 10 outputs"):
        trainer(make_config, Items(ids), objective=objective).train()
    plain = trainer(make_config, Items([3] * 64), Items(ids), objective=objective)
    with pytest.raises(ValueError, match="but the model has 10 outputs"):
        plain.evaluate()


def test_labels_of_no_class_are_not_said_to_need_outputs(make_config):
    listed = [{"pixel_values": torch.zeros(3, 8, 8), "labels": label} for label in (0, 1, -100, 2, -1)]
    with pytest.raises(ValueError, match=r"Outside: -100, -1. Labels below 0 .*\(2 of 5\).*drop these") as caught:
        trainer(make_config, listed)
    assert "num_labels" not in str(caught.value)
    with pytest.raises(ValueError, match="Outside: 12, 15. Build the model with num_labels=16 or more"):
        trainer(make_config, Subset(listed[:2] + [listed[0] | {"labels": 12}, listed[0] | {"labels": 15}], range(4)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_that_are_not_finite_are_found_in_their_data_set(value, make_config):
    items = [Items([1])[0] for _ in range(40)]
    items[23]["pixel_values"][1, 2, 3] = value
    said = "pixel_values are nan or infinite.*: 1 values in 1 of .* In the data set, .* has index 23"
    with pytest.raises(ValueError, match=f"train_dataset: {said}") as caught:
        trainer(make_config, items, max_steps=2).train()
    assert "Normalised" not in str(caught.value)
    with pytest.raises(ValueError, match=f"eval_dataset: {said}"):
        trainer(make_config, items[:2], items).evaluate()


def stacked(items):
    """A collator of somebody else's, which looks at nothing."""
    pixels = torch.stack([item["pixel_values"] for item in items])
    return {"pixel_values": pixels, "labels": torch.tensor([item["labels"] for item in items])}


class LastIs(Items):
    """Grey images, the last one of which has other pixels."""

    def __init__(self, size, pixels):
        super().__init__([3] * size)
        self.pixels = pixels

    def __getitem__(self, place):
        item = super().__getitem__(place)
        return item | {"pixel_values": self.pixels(item["pixel_values"])} if place == len(self) - 1 else item


WRONG_PIXELS = {
    "normalised": lambda image: (image - 0.9) / 0.25,
    "0..255": lambda image: image * 255,
    "a little too bright": lambda image: image + 0.501,
}


@pytest.mark.parametrize("wrong", WRONG_PIXELS)
def test_pixels_of_any_collator_are_in_the_range_of_attacks(wrong, make_config):
    change, right = WRONG_PIXELS[wrong], Items([3] * 64)
    with pytest.raises(ValueError, match=r"eval_dataset: pixel_values lie in \["):
        trainer(make_config, right, LastIs(2, change), collator=stacked)
    with pytest.raises(ValueError, match=r"train_dataset: pixel_values lie in \["):
        trainer(make_config, LastIs(1, change), collator=stacked)
    with pytest.raises(ValueError, match="pixel_values lie in"):
        trainer(make_config, LastIs(64, change), collator=stacked).train()
    plain = trainer(make_config, right, LastIs(64, change), collator=stacked)
    with pytest.raises(ValueError, match="pixel_values lie in"):
        plain.evaluate()
    with pytest.raises(ValueError, match="pixel_values lie in"):
        plain.predict(LastIs(64, change))


def test_bytes_of_a_collator_are_refused(make_config):
    def as_bytes(items):
        batch = stacked(items)
        return batch | {"pixel_values": batch["pixel_values"].mul(255).byte()}

    with pytest.raises(ValueError, match=r"pixel_values have dtype torch.uint8; a batch needs floats in \[0, 1\]"):
        trainer(make_config, Items([3] * 4), collator=as_bytes)


def test_all_labels_are_looked_at_where_they_can_be(make_config):
    listed = [{"pixel_values": torch.zeros(3, 8, 8), "labels": label} for label in (0, 1, 2, 12)]
    for data in (Subset(listed, [0, 3]), ConcatDataset([listed[:2], listed[2:]])):
        with pytest.raises(ValueError, match="train_dataset: labels run from 0 to 12, but the model has 10 outputs"):
            trainer(make_config, data)
    trainer(make_config, Subset(listed, [0, 1, 2]))


def test_images_of_pil(make_config):
    items = [{"pixel_values": Image.new("RGB", (8, 8), (place, 9, 9)), "labels": place} for place in range(4)]
    assert collate(items)["pixel_values"][3, 0, 0, 0] == 3 / 255
    trainer(make_config, items, max_steps=1).train()
    assert collate([{"pixel_values": Image.new("L", (6, 4)), "labels": 0}])["pixel_values"].shape == (1, 1, 4, 6)
    with pytest.raises(ValueError, match="image of PIL in mode CMYK: convert it"):
        trainer(make_config, [{"pixel_values": Image.new("CMYK", (8, 8)), "labels": 0}] * 2)
    with pytest.raises(ValueError, match="pixel_values is a str"):
        trainer(make_config, [{"pixel_values": "cat.png", "labels": 0}] * 2)


@dataclass
class Mix:
    """As timm's Mixup: of an even number of images, labels that are shares of classes."""

    mixed: object

    def __call__(self, items):
        batch = collate(items)
        assert len(items) % 2 == 0, "Batch size should be even when using this"
        images, labels = self.mixed(batch["pixel_values"], batch["labels"])
        return {"pixel_values": images, "labels": labels}


@pytest.mark.parametrize("mix", [v2.MixUp, v2.CutMix])
def test_collators_that_mix_pairs(mix, make_config):
    mixing = Mix(mix(num_classes=10))
    for options in ({}, {"objective": "pgd-at", "adversary": "pgd"}, {"objective": "trades"}):
        run = trainer(make_config, Items([1, 2] * 16), collator=mixing, max_steps=1, **options)
        run.train()
    for name, value in (("objective", "mart"), ("adversary", "cw-pgd")):
        options = {"objective": "pgd-at", "adversary": "pgd"} | {name: value}
        with pytest.raises(ValueError, match=f"train_dataset: .*soft labels, and {name}='{value}' needs one class id"):
            trainer(make_config, Items([1, 2] * 16), collator=mixing, **options)
    with pytest.raises(ValueError, match="eval_dataset: the collator makes soft labels.*Mix images in training only"):
        trainer(make_config, None, Items([1, 2] * 16), collator=mixing)
    with pytest.raises(ValueError, match=r"soft labels have shape \(2, 7\), the model has 10 outputs"):
        trainer(make_config, Items([1, 2] * 16), collator=Mix(mix(num_classes=7)))


@dataclass
class Inverted:
    """Reads items of its own, and inverts them: no other collator can."""

    def __call__(self, items):
        images = torch.stack([item["photo"] for item in items])
        return {"pixel_values": 1 - images, "labels": torch.tensor([item["animal"] for item in items])}


class ByBrightness(nn.Module):
    """Class 1 for bright images."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(1, 2)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[-1.0], [1.0]]))
            self.head.bias.zero_()

    def forward(self, pixel_values):
        return self.head(pixel_values.mean((1, 2, 3))[:, None])


def test_a_test_measures_what_evaluation_does(make_config):
    items = [{"photo": torch.full((3, 8, 8), 0.1 + 0.8 * (place % 2)), "animal": 1 - place % 2} for place in range(8)]
    options = {"max_steps": 1, "learning_rate": 0.0, "per_device_eval_batch_size": 3}
    run = trainer(make_config, items, items, model=ByBrightness(), collator=Inverted(), **options)
    run.train()
    evaluated, tested = run.evaluate(), run.test(items, ["clean", "fgsm"], full=False)
    assert evaluated["eval_accuracy"] == tested["robustness"]["attacks"][0]["accuracy"] == 1.0
    mixing = Mix(v2.MixUp(num_classes=10))
    run = trainer(make_config, Items([1, 2] * 16), collator=mixing, max_steps=1)
    run.train()
    assert run.test(Items([1, 2] * 4), ["clean"], full=False)["robustness"]["n"] == 8


def test_a_last_batch_that_training_drops_is_evaluated(make_config):
    options = {"max_steps": 1, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8}
    data = Items([1] * 8 + [2] * 7)
    run = trainer(make_config, data, data, dataloader_drop_last=True, **options)
    assert len(run.get_train_dataloader()) == 1 and run.args.dataloader_drop_last
    seen = run.predict(data)
    assert len(seen.predictions) == 15
    right = (seen.predictions.argmax(1) == seen.label_ids).mean()
    assert run.evaluate()["eval_accuracy"] == pytest.approx(right)
    few = trainer(make_config, data, Items([1] * 4), dataloader_drop_last=True, **options)
    assert "eval_accuracy" in few.evaluate()


def test_probabilities_are_refused_before_training(make_config):
    model = nn.Sequential(*network(), nn.Softmax(-1))
    with pytest.raises(ValueError, match="train_dataset: the model returns probabilities.*leave out its softmax"):
        trainer(make_config, Items([1, 2] * 16), model=model)
    with pytest.raises(ValueError, match="eval_dataset: the model returns probabilities"):
        trainer(make_config, None, Items([1, 2] * 16), model=model)


def test_one_image_left_for_a_batch_norm(make_config):
    sizes = {"per_device_train_batch_size": 8, "num_train_epochs": 1, "max_steps": -1}
    with pytest.raises(ValueError, match="17 images in batches of 8 leave one alone.*batch norm 2 .*drop_last"):
        trainer(make_config, Items([1] * 17), model=network(norm=True), **sizes)
    with pytest.raises(ValueError, match="16 images in batches of 1 leave one alone"):
        trainer(make_config, Items([1] * 16), model=network(norm=True), **(sizes | {"per_device_train_batch_size": 1}))
    more = [{"dataloader_drop_last": True}, {"max_steps": 2}, {"objective": "trades"}]
    for options in more:
        trainer(make_config, Items([1] * 17), model=network(norm=True), **(sizes | options)).train()
    trainer(make_config, Items([1] * 17), **sizes).train()


def test_evaluation_images_of_another_size(build, make_config):
    model, _ = build("vit")
    processor = SimpleNamespace(image_mean=[0.5], image_std=[0.25])  # of values only
    with pytest.raises(ValueError, match="eval_dataset: images of 3x12x12 do not go through the model: "):
        TSCNCTrainer(model, make_config(), None, Items([1] * 4), Items([1] * 4, 12), processing_class=processor)
    with pytest.raises(ValueError, match="train_dataset: images of 3x12x12 do not go through the model: "):
        TSCNCTrainer(model, make_config(), None, Items([1] * 4, 12), processing_class=processor)
    trainer(make_config, Items([1] * 4), Items([1] * 4, 12))  # this one takes any


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_images_go_through_a_model_of_any_dtype(dtype, build, make_config):
    model, _ = build("vit")
    processor = SimpleNamespace(image_mean=[0.5], image_std=[0.25])  # of values only
    with pytest.raises(ValueError, match="train_dataset: images of 3x12x12 do not go through the model: "):
        TSCNCTrainer(model.to(dtype), make_config(), None, Items([1] * 4, 12), processing_class=processor)

    class Elsewhere(nn.Module):
        def forward(self, x):
            raise NotImplementedError('"pool" not implemented for this dtype')

    there = nn.Sequential(nn.Flatten(), nn.Linear(192, 10), Elsewhere())
    with pytest.raises(ValueError, match="do not go through the model: .pool. not implemented"):
        trainer(make_config, Items([1] * 4), model=there)
    trainer(make_config, Items([1] * 4), model=there.to(dtype))  # a GPU may have it


def test_a_size_that_was_not_trained_on_is_said(make_config, caplog):
    said = "test_dataset: images are 3x12x12, and the model is trained on 3x8x8"
    for train in (Items([1] * 4), Stream(Items([1] * 4))):
        run = trainer(make_config, train, max_steps=1, epsilon=0.0)
        run.train()
        caplog.clear()
        assert run.test(Items([1, 2]), "clean", full=False)["robustness"]["image_size"] == [3, 8, 8]
        assert "trained on" not in caplog.text
        assert run.test(Items([1, 2], 12), "clean", full=False)["robustness"]["image_size"] == [3, 12, 12]
        assert said in caplog.text
    run.create_model_card()
    said = "The images have 12x12 pixels, and the model's own preprocessing resizes them to 8x8 (bilinear)."
    assert said in (Path(run.args.output_dir) / "README.md").read_text()
    trainer(make_config, Items([1] * 4), Items([1] * 4, 12))
    assert "eval_dataset: images are 3x12x12, and" in caplog.text


def test_checks_leave_random_numbers_and_statistics_alone(make_config):
    model = network(norm=True)
    options = (make_config(objective="natural"), Items([1] * 4), None, collate, PROCESSOR)
    before = torch.random.get_rng_state()
    check_images(model, Preprocessing([0.5], [0.25]), *options)
    assert torch.equal(before, torch.random.get_rng_state()) and model[2].num_batches_tracked == 0 and model.training


@pytest.mark.parametrize(
    "options, said",
    [
        ({"gate_layers": ["fc2"]}, 'gate_layers=.*no effect without tsc_on="gates"'),
        ({"gate_l0": 0.1}, "gate_l0=0.1 has no effect without tsc_on"),
        ({"awp_start": 0.5}, "awp_start=0.5 has no effect without awp_gamma above 0"),
        ({"objective": "pgd-at", "adversary": "pgd", "trades_beta": 3.0}, "trades_beta=3.0 has no effect without obj"),
        (
            {"objective": "pgd-at", "adversary": "fgsm-rs", "attack_steps": 4},
            "attack_steps=4 has no effect",
        ),
        ({"objective": "natural", "adversary": "none", "epsilon_warmup": 0.1}, "epsilon_warmup=0.1 has no effect"),
        ({"pruning_rate_learning_rate": 0.1}, "pruning_rate_learning_rate=0.1 has no effect without pruning_scope"),
        (
            {"pruning_start": 0.5, "pruning_end": 0.5, "pruning_interval": 5, "pruning_schedule": "one-shot"},
            "pruning_interval=5 has no effect without pruning_start before pruning_end",
        ),
        ({"pruning_start": 0.5, "pruning_end": 0.5, "pruning_latent": True}, "pruning_latent=True has no effect"),
    ],
)
def test_options_that_would_be_ignored(options, said, make_config):
    with pytest.raises(ValueError, match=said):
        make_config(**options)


def test_a_changed_config_drops_what_it_no_longer_uses(make_config):
    gated = make_config(tsc_on="gates", gate_layers=["fc2"], gate_l2=0.1, awp_gamma=0.1, awp_start=0.5)
    plain = gated.changed(tsc_on="weights", target_sparsity=0.0)
    assert plain.gate_layers == [] and plain.gate_l2 == 5e-4 and plain.awp_start == 0.5
    assert gated.gate_layers == ["fc2"] and gated.changed(epsilon=0.2).gate_layers == ["fc2"]


# ---- evaluate_robustness on whatever is given ----


class Returns(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.inner, self.wrap = network(), wrap

    def forward(self, pixel_values):
        return self.wrap(self.inner(pixel_values))


WRAPS = {
    "tensor": lambda x: x,
    "dict": lambda x: {"logits": x, "features": x[:, :3]},
    "tuple": lambda x: (x, torch.zeros(len(x), 4, 2, 2)),
    "list": lambda x: [torch.zeros(()), x],
    "output": lambda x: __import__("transformers").modeling_outputs.ImageClassifierOutput(logits=x),
}


@pytest.mark.parametrize("kind", WRAPS)
def test_what_a_model_may_return(kind):
    torch.manual_seed(0)
    items, given = [Items([1] * 4)[0]] * 4, {"processing_class": PROCESSOR, "masking": False, "progress": False}
    report = evaluate_robustness(Returns(WRAPS[kind]), items, ("clean", "pgd-1"), epsilon=0.1, **given)
    assert report.n == 4


@pytest.mark.parametrize(
    "output, said",
    [
        ((torch.zeros(2, 3), torch.zeros(2, 3)), r"a tuple of \(2, 3\), \(2, 3\): logits"),
        ({"scores": torch.zeros(2, 3)}, "a dict with scores: logits"),
        ("cat", "a str: logits"),
        (None, "a NoneType: logits"),
    ],
)
def test_outputs_without_logits(output, said):
    with pytest.raises(ValueError, match=f"the model returns {said}"):
        logits_of(output)


@pytest.mark.parametrize(
    "data, said",
    [
        (DataLoader(Items([1] * 4), collate_fn=collate), "a DataLoader, which has batches: give its images, loader.d"),
        ((Items([1] * 4)[place] for place in range(4)), "a generator, which has no length. Give a data set"),
        ((torch.zeros(4, 3, 8, 8), torch.zeros(4).long()), "a tuple of tensors: give items, such as"),
        ({"pixel_values": torch.zeros(4, 3, 8, 8), "labels": torch.zeros(4).long()}, "a dict: Give a list of such"),
        ({"train": Items([1]), "test": Items([1])}, "a dict: Give one of its parts: 'train', 'test'"),
        (set(range(3)), "a set, whose items have no numbers"),
        ([(torch.zeros(3, 8, 8), 1)], "a batch item is a tuple"),
    ],
    ids=["loader", "generator", "pair", "batch", "splits", "set", "pairs"],
)
def test_data_that_cannot_be_evaluated(data, said):
    with pytest.raises(ValueError, match=said):
        evaluate_robustness(network(), data, "clean", processing_class=PROCESSOR, progress=False)
