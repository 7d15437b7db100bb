"""A model's classes beside those of a data set: what is silent, what is a warning, what is refused."""

from types import SimpleNamespace

import datasets
import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, Subset

from tscnc_hf.artifact.models.building import vit_from_config
from tscnc_hf.data.class_names import SameClasses, compare_class_names, numbers_of_a_part, refuse_another_order
from tscnc_hf.data.image_datasets import ImageTensorDataset
from tscnc_hf.training.trainer import TSCNCTrainer


CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
STL = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
DIGITS = [str(digit) for digit in range(10)]
LABELS = [f"LABEL_{number}" for number in range(12)]
AS_TEXT = sorted(str(number) for number in range(12))  # as folders and strings are: 0, 1, 10, 11, 2


@pytest.mark.parametrize("names", [CIFAR, [name.title() for name in CIFAR], [f"LABEL_{i}" for i in range(10)], DIGITS])
def test_nothing_is_said_of_the_same_names_or_of_none(names):
    assert compare_class_names(names, CIFAR) is None


def test_other_names_are_a_warning_that_shows_some_of_both():
    said = compare_class_names(CIFAR, ["plane", "car", *CIFAR[2:]])
    assert said.startswith("Warning: ") and "\n" not in said and "compared by number" in said
    assert "has airplane, automobile;" in said and said.endswith("has plane, car")
    assert "airplane, automobile, bird, cat, ...; only" in compare_class_names(CIFAR, DIGITS)


def test_names_under_other_numbers_are_refused():
    text = "2 of the 8 names in both have another number: 'bird' is 2 in the model, 'Bird' 1 in the data set"
    with pytest.raises(ValueError, match=text):
        compare_class_names(CIFAR, [name.title() for name in STL])


def test_some_of_a_models_classes_are_found_by_name():
    assert numbers_of_a_part(CIFAR, ["Cat", "ship", "bird"]) == [3, 8, 2]
    assert numbers_of_a_part(CIFAR, CIFAR[:4]) == [0, 1, 2, 3]
    twice = ["tench", "crane", "cat", "dog", "crane"]  # as ImageNet has it
    assert numbers_of_a_part(twice, ["dog", "cat"]) == [3, 2] and numbers_of_a_part(twice, ["dog", "crane"]) is None
    for names in (CIFAR, CIFAR[::-1], STL, ["cat", "monkey"], ["cat", "Cat"]):
        assert numbers_of_a_part(CIFAR, names) is None
    assert numbers_of_a_part(CIFAR, ["3", "1"]) is None  # numbers are no names


def test_another_number_of_classes():
    with pytest.raises(ValueError, match=r"it has 10 \(airplane, .*\.\.\.\), the data set 3 \(rose, lily, fern\)"):
        compare_class_names(CIFAR, ["rose", "lily", "fern"])
    assert "of 10 classes" in compare_class_names(CIFAR, CIFAR[:5])  # a part of them
    assert "LABEL_0, LABEL_1" in compare_class_names(["LABEL_0", "LABEL_1"], ["rose", "lily", "fern"])


def test_the_same_names_in_another_order_or_case():
    with pytest.raises(ValueError, match="in another order"):
        compare_class_names(["Dog", "Cat"], ["cat", "dog"])


# ---- classes that are only numbered ----


@pytest.mark.parametrize(
    "names", [LABELS, [str(number) for number in range(12)], [f"animal {'x' * i}" for i in range(12)]]
)
@pytest.mark.parametrize("first", [0, 1])
def test_numbers_sorted_as_text_are_another_order(names, first):
    given = sorted(str(number) for number in range(first, first + 12))
    at = 2 if first == 0 else 1
    said = f"{names[0]}, {names[1]}, .*; the data set has them in another order: {', '.join(given[:4])}, ... "
    said += rf"\(label {at} is '{names[at]}' in the model, '10' in the data set\).*call them 00, 01, ...,"
    with pytest.raises(ValueError, match=said):
        compare_class_names(names, given)
    with pytest.raises(ValueError, match=f"{said}.*If the model was trained in this order, correct its names"):
        refuse_another_order(names, given)
    padded = [f"{number:02}" for number in range(first, first + 12)]
    refuse_another_order(names, padded)


def test_a_model_whose_own_numbers_were_sorted_as_text():
    assert compare_class_names(AS_TEXT, AS_TEXT) is None
    for others in ([str(number) for number in range(12)], LABELS):
        with pytest.raises(ValueError, match="in another order: (LABEL_)?0, (LABEL_)?1, (LABEL_)?2, "):
            compare_class_names(AS_TEXT, others)
    assert "Only the model, of 12 classes, has 0, 1, 10, 11, ..." in compare_class_names(
        AS_TEXT, [*CIFAR, "hen", "ox"]
    )


@pytest.mark.parametrize("number", ["{}", "{:02}", "LABEL_{}", "class {}", "Class_{:03}"])
def test_a_number_is_the_same_however_it_is_written(number):
    names = [number.format(place) for place in range(12)]
    assert compare_class_names(LABELS, names) is compare_class_names(names, LABELS) is None
    assert numbers_of_a_part(LABELS, [names[11], names[3]]) == [11, 3]


def test_other_numbers_are_a_warning_unless_they_say_another_class():
    said = compare_class_names(LABELS[:3], ["1", "2", "3"])  # counted from 1
    assert said.endswith("Only the model, of 3 classes, has LABEL_0; only the data set, of 3, has 3")
    assert compare_class_names(LABELS[:3], ["100", "20", "50"]).startswith("Warning: ")
    assert "has LABEL_3, LABEL_4, " in compare_class_names(LABELS, ["0", "1", "2"])
    with pytest.raises(ValueError, match="'LABEL_10' is 10 in the model, '10' 2 in the data set"):
        compare_class_names(LABELS, ["0", "1", "10"])


# ---- the model's and those of each data set of a trainer ----

ANIMALS = ["cat", "dog", "hen"]


def ours(names, count=3):
    images = torch.zeros(count, 3, 8, 8, dtype=torch.uint8)
    return ImageTensorDataset(images, torch.arange(count) % 3, names)


def column(names, kind="labels"):
    features = datasets.Features({kind: datasets.ClassLabel(names=names), "pixel_values": datasets.Value("int32")})
    return datasets.Dataset.from_dict({kind: [0, 1, 2], "pixel_values": [0, 0, 0]}, features=features)


class WithClasses(list):
    def __init__(self, names):
        item = {"pixel_values": torch.full((3, 8, 8), 0.5)}
        super().__init__(item | {"labels": label} for label in range(3))
        self.classes = names


def named(names):
    return SimpleNamespace(config=SimpleNamespace(id2label=dict(enumerate(names))))


SAYS = [
    ours, column, lambda names: column(names, "label"), WithClasses, lambda names: Subset(ours(names), [0, 1]),
    lambda names: ConcatDataset([WithClasses(ANIMALS), Subset(WithClasses(names), [2])]),
    lambda names: Subset(ConcatDataset([WithClasses(ANIMALS), column(names)]), [4, 0]),
    lambda names: {"one": ours(ANIMALS), "other": column(names)}, lambda names: column(names).to_iterable_dataset(),
]  # fmt: skip


@pytest.mark.parametrize("says", SAYS)
def test_a_data_set_under_other_names_than_the_models(says):
    for fit in (["Cat", "DOG", "hen"], ["0", "1", "2"], ["cat", "dog"]):
        SameClasses(named(ANIMALS)).check(says(fit) if len(fit) == 3 or says in (ours, WithClasses) else None, "x")
    cases = {("hen", "dog", "cat"): "hen, dog, cat. Reorder", ("cat", "dog", "cow"): "Label 2 is 'cow' in test_data"}
    cases |= {("cat", "dog", "hen", "cow"): "Label 3 is 'cow' in test_dataset, and none, with 3 classes in the model"}
    for names, said in cases.items():
        with pytest.raises(ValueError, match=said):
            SameClasses(named(ANIMALS)).check(says(list(names)), "test_dataset")


@pytest.mark.parametrize("model", [named([f"LABEL_{place}" for place in range(3)]), nn.Linear(1, 3)])
def test_data_sets_of_a_model_without_names_are_compared(model):
    classes = SameClasses(model)
    classes.check(column(ANIMALS), "train_dataset")
    classes.check(ours(ANIMALS), "eval_dataset")
    with pytest.raises(ValueError, match="test_dataset: .* Label 0 is 'hen' in test_dataset, and 'cat' in train_data"):
        classes.check(column(ANIMALS[::-1]), "test_dataset")


def test_numbers_of_data_sets_are_compared():
    text = column(AS_TEXT)
    for model in (named(LABELS), named([*CIFAR, "hen", "ox"])):
        with pytest.raises(ValueError, match="train_dataset: .*has them in another order: 0, 1, 10.*id2label"):
            SameClasses(model).check(text, "train_dataset")
        with pytest.raises(ValueError, match="Label 2 is '10' in eval_dataset, and '(LABEL_2|bird)' in the model"):
            SameClasses(model).check(column(AS_TEXT[:3]), "eval_dataset")
    for model in (nn.Linear(1, 12), named(AS_TEXT)):
        classes = SameClasses(model)
        classes.check(text, "train_dataset")
        classes.check(column(AS_TEXT[:3]), "eval_dataset")
        with pytest.raises(ValueError, match="test_dataset: .*(in train_dataset:|in another order)"):
            classes.check(column(LABELS), "test_dataset")
    classes = SameClasses(nn.Linear(1, 12))
    classes.check(column([*CIFAR, "hen", "ox"]), "train_dataset")
    with pytest.raises(ValueError, match="Label 2 is '10' in test_dataset, and 'bird' in train_dataset"):
        classes.check(text, "test_dataset")
    classes = SameClasses(named(LABELS[:3]))
    classes.check(column(["1", "2", "3"]), "train_dataset")
    classes.check(ours(["1", "2"], 2), "eval_dataset")
    with pytest.raises(ValueError, match="Label 0 is '0' in test_dataset, and '1' in train_dataset"):
        classes.check(column(["0", "1", "2"]), "test_dataset")


def test_classes_that_are_no_names():
    for other in ([("tench", "Tinca tinca"), ("shark",)], 3, [0, 2, 1], []):
        SameClasses(named(ANIMALS)).check(WithClasses(other), "train_dataset")


def test_a_trainer_refuses_the_classes_of_others(make_config):
    def network():
        sizes = {"patch_size": 4, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        model, processor = vit_from_config(["hen", "dog", "cat"], (8, 8), 3, **sizes)
        return {"model": model, "processing_class": processor}

    args, right, wrong = make_config(target_sparsity=0.0), ours(["hen", "dog", "cat"]), WithClasses(ANIMALS)
    for given in ({"train_dataset": wrong}, {"eval_dataset": wrong}, {"eval_dataset": {"a": right, "b": wrong}}):
        with pytest.raises(ValueError, match=f"{next(iter(given))}: .*in another order"):
            TSCNCTrainer(args=args, **network(), **given)
    trainer = TSCNCTrainer(args=args, train_dataset=right, **network())
    for use in (trainer.test, trainer.evaluate, trainer.predict):
        with pytest.raises(ValueError, match="in another order"):
            use(wrong)
