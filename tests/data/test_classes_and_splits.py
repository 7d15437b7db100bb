"""Classes by name whatever the split, rows without a label, splits of any kind, grey images."""

import unicodedata

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.test_loading import encoded, picture, private_cache, typed, write_parquet  # noqa: F401
from tscnc_hf.artifact.models.building import vit_from_config
from tscnc_hf.data.class_names import compare_class_names
from tscnc_hf.data.loading import load_image_data, load_test_data
from tscnc_hf.data.splits import choose_splits
from tscnc_hf.evaluation.measures.robustness import evaluate_robustness


NFC, NFD = unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")


def image_folder(root, **splits):
    """`train=["ant", "bee"]`: ten images for each name."""
    for split, names in splits.items():
        for shift, name in enumerate(names):
            (root / split / name).mkdir(parents=True)
            for i in range(10):
                picture(100 * shift + i).save(root / split / name / f"{i}.png")
    return str(root)


@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_class_that_train_lacks_is_named(split, tmp_path):
    splits = {"train": ["ant", "bee"], "test": ["ant", "bee"]}
    folder = image_folder(tmp_path, **(splits | {split: ["ant", "bee", "cicada"]}))
    with pytest.raises(ValueError, match=f"split '{split}' has labels that train lacks: cicada"):
        load_image_data(folder, augmentation="none")


def test_two_unicode_forms_of_a_name_are_one_class(tmp_path):
    data = load_image_data(image_folder(tmp_path, train=["ant", NFC], test=["ant", NFD]), augmentation="none")
    assert data.class_names == ["ant", NFC] and sorted(set(data.test.labels.tolist())) == [0, 1]
    assert "in their Unicode form only" in data.description
    strings = write_parquet(tmp_path / "p", labels=["ant", NFC] * 10)
    write_parquet(tmp_path / "p", "test", labels=["ant", NFD] * 2, n=4, images=[encoded(picture(i)) for i in range(4)])
    assert load_image_data(strings).class_names == ["ant", NFC]
    assert compare_class_names([NFC, "ant"], [NFD, "Ant"]) is None


def test_files_that_number_their_classes_otherwise_are_refused(tmp_path):
    folder = write_parquet(tmp_path / "d", features=typed(("cat", "dog")))
    write_parquet(tmp_path / "d", "test", n=4, features=typed(("dog", "cat")))
    with pytest.raises(
        ValueError, match="classes of column 'label' are .*dog, cat.*the same numbers are other classes"
    ):
        load_image_data(folder)


def rows(labels, feature, column="label"):
    """A picture for each label, which are of this kind."""
    kinds = datasets.Features({"image": datasets.Image(), column: feature})
    images = [{"bytes": encoded(picture(i)), "path": None} for i in range(len(labels))]
    return datasets.Dataset.from_dict({"image": images, column: labels}, features=kinds)


def stored(root, how, **splits):
    """A folder of parquet files, of arrow files, or of `save_to_disk`."""
    if how == "saved":
        datasets.DatasetDict(splits).save_to_disk(str(root))
        return str(root)
    root.mkdir()
    for split, made in splits.items():
        if how == "parquet":
            made.to_parquet(str(root / f"{split}.parquet"))
        else:
            made.save_to_disk(str(root.parent / "arrow" / split))
            (root.parent / "arrow" / split / "data-00000-of-00001.arrow").rename(root / f"{split}.arrow")
    return str(root)


HOWS = ["parquet", "arrow", "saved"]


@pytest.mark.parametrize("how", HOWS)
def test_splits_that_number_their_classes_otherwise_are_refused(how, tmp_path):
    bright, dark = (datasets.ClassLabel(names=names) for names in (["bright", "dark"], ["dark", "bright"]))
    folder = stored(tmp_path / "d", how, train=rows([0, 1] * 10, bright), test=rows([0, 1] * 2, dark))
    for load in (load_image_data, load_test_data):
        with pytest.raises(
            ValueError, match="^the classes of column 'label' are .*the same numbers are other classes"
        ):
            load(folder)


@pytest.mark.parametrize("how", HOWS)
def test_a_split_may_lack_the_names_of_the_last_classes(how, tmp_path):
    three, two = (datasets.ClassLabel(names=names) for names in (["ant", "bee", NFC], ["ant", "bee"]))
    folder = stored(tmp_path / "d", how, train=rows([0, 1, 2] * 8, three), test=rows([0, 1] * 2, two))
    data = load_image_data(folder, augmentation="none")
    assert data.class_names == ["ant", "bee", NFC] and data.test.labels.tolist() == [0, 1] * 2


def test_a_readme_that_numbers_the_classes_of_its_files_otherwise_is_refused(tmp_path):
    folder = write_parquet(tmp_path / "d", features=typed())

    def said(*names):
        (tmp_path / "d" / "README.md").write_text(
            "---\ndataset_info:\n  features:\n  - name: image\n    dtype: image\n  - name: label\n    dtype:\n"
            "      class_label:\n        names:\n"
            + "".join(f"          '{number}': {name}\n" for number, name in enumerate(names))
            + "---\n"
        )
        return load_image_data(folder)

    with pytest.raises(ValueError, match="are cat, dog in train-.*parquet, but dog, cat in dataset_info of README.md"):
        said("dog", "cat")
    assert said("house cat", "dog").class_names == ["house cat", "dog"]  # whoever published it names them anew


TEXT, NUMBER = datasets.Value("string"), datasets.Value("int64")
KINDS = {"names": ([0, 1] * 10, datasets.ClassLabel(names=["y", "x"])), "text": (["y", "x"] * 10, TEXT)}
KINDS["numbers"] = ([0, 1] * 10, NUMBER)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(("train", "test"), [("names", "text"), ("text", "names"), ("names", "numbers")])
def test_splits_with_names_and_without(how, train, test, tmp_path):
    folder = stored(tmp_path / "d", how, train=rows(*KINDS[train]), test=rows(*KINDS[test]))
    if train == "text" and how != "saved":  # `datasets` makes text of the numbers
        with pytest.raises(ValueError, match="numbers of the classes y, x in test.*, but text in other files"):
            load_image_data(folder)
        return
    data = load_image_data(folder, augmentation="none")
    assert data.class_names == ["y", "x"] and data.test.labels.tolist() == [0, 1] * 10
    shown = {
        image.numpy().tobytes(): int(label) for image, label in zip(data.test.images, data.test.labels, strict=True)
    }
    for image, label in zip(data.train.images, data.train.labels, strict=True):
        assert shown[image.numpy().tobytes()] == label


@pytest.mark.parametrize(("train", "test"), [("numbers", "text"), ("text", "numbers")])
def test_splits_with_text_and_numbers_are_refused(train, test, tmp_path):
    folder = stored(tmp_path / "d", "saved", train=rows(*KINDS[train]), test=rows(*KINDS[test]))
    split = {train: "train", test: "test"}
    said = f"column 'label' holds text in '{split['text']}', but numbers without names in '{split['numbers']}'"
    for load in (load_image_data, load_test_data):
        with pytest.raises(ValueError, match=said):
            load(folder)


@pytest.mark.parametrize(
    ("test", "message"),
    [
        (
            rows([0, 1], NUMBER, "labels"),
            "label_column='label' is not among the columns: image .Image., labels .int64",
        ),
        (rows([0.2, 1.7], datasets.Value("float64")), "label_column='label' has type float64, which holds no labels"),
    ],
)
def test_splits_with_other_columns_are_refused(test, message, tmp_path):
    folder = stored(tmp_path / "d", "saved", train=rows([0, 1] * 10, NUMBER), test=test)
    with pytest.raises(ValueError, match=f"split 'test' is not stored as 'train' is: {message}"):
        load_image_data(folder)


def test_text_that_is_none_of_the_names_is_refused(tmp_path):
    folder = stored(tmp_path / "d", "saved", train=rows(*KINDS["names"]), test=rows(["x", "z"], TEXT))
    with pytest.raises(ValueError, match=r"split 'test' has labels that are not among its class names: \['z'\]"):
        load_image_data(folder)


def test_rows_without_a_label_are_left_out_and_counted(tmp_path):
    folder = write_parquet(tmp_path / "d", labels=[0, 1, -1, 1] * 5, features=typed())
    write_parquet(tmp_path / "d", "test", n=4, labels=[0, 1, None, -1], features=typed())
    with pytest.raises(ValueError, match="no label in column|drop_unlabelled"):
        load_image_data(folder)
    data = load_image_data(folder, drop_unlabelled=True, augmentation="none")
    assert len(data.test) == 2 and len(data.train) + len(data.validation) == 15
    assert "5 rows of 'train' without a label left out; 2 rows of 'test' without" in data.description
    expected = torch.stack([torch.from_numpy(np.array(picture(i))).permute(2, 0, 1) for i in range(2)])
    assert torch.equal(data.test.images, expected)
    strings = write_parquet(tmp_path / "s", labels=["b", "a", None, "a", ""] * 4)
    data = load_image_data(strings, drop_unlabelled=True)
    assert data.class_names == ["a", "b"] and "8 rows of 'train' without a label left out" in data.description
    write_parquet(tmp_path / "d", "test", n=4, labels=[-1] * 4, features=typed())
    with pytest.raises(ValueError, match="no row of split 'test' has a label"):
        load_image_data(folder, drop_unlabelled=True)


def test_a_split_for_validation_is_used_beside_one_for_test(tmp_path):
    folder = image_folder(tmp_path, train=["ant", "bee"], val=["ant", "bee"], test=["ant", "bee"])
    data = load_image_data(folder, augmentation="none")
    assert (len(data.train), len(data.validation), len(data.test)) == (20, 20, 20)
    assert "validation on split 'validation'" in data.description
    data = load_image_data(folder, augmentation="none", test_split="validation")
    assert (len(data.train), len(data.validation), len(data.test)) == (18, 2, 20)
    found = [part.data_split for part in (data.train, data.validation, data.test)]
    assert found == ["train", "validation", "validation"]
    assert load_test_data(folder, class_names=["ant", "bee"], test_split="validation").test.data_split == "validation"
    assert load_test_data(folder, class_names=["ant", "bee"]).test.subset(range(3)).data_split == "test"


def two_splits(root, other, how, n=12):
    """40 rows for training, and others under a name of their own."""
    if how == "saved":
        rows = {
            split: datasets.Dataset.from_dict(
                {"image": [picture(i) for i in places], "label": [i % 2 for i in places]}, features=typed()
            )
            for split, places in {"train": range(40), other: range(40, 40 + n)}.items()
        }
        datasets.DatasetDict(rows).save_to_disk(str(root))
        return str(root)
    write_parquet(root, n=40, features=typed())
    write_parquet(root, other, images=[encoded(picture(i)) for i in range(40, 40 + n)], features=typed())
    if how == "said":
        files = "".join(f"  - split: {split}\n    path: {split}-*\n" for split in ("train", other))
        (root / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n")
    return str(root)


@pytest.mark.parametrize("how", ["said", "saved"])
@pytest.mark.parametrize(
    ("other", "meant"), [("valid", "validation"), ("Val", "validation"), ("Test", "test"), ("evaluation", "test")]
)
def test_splits_under_their_other_usual_names(how, other, meant, tmp_path):
    folder = two_splits(tmp_path / "d", other, how)
    data, alone = load_image_data(folder, augmentation="none"), load_test_data(folder)
    expected = torch.stack([torch.from_numpy(np.array(picture(i))).permute(2, 0, 1) for i in range(40, 52)])
    assert torch.equal(data.test.images, expected) and torch.equal(alone.test.images, expected)
    assert data.test.data_split == alone.test.data_split == meant and len(data.train) == 36
    assert f"tested on split '{meant}'" in data.description and "not used" not in data.description
    for name in (other, meant):
        assert len(load_image_data(folder, test_split=name).test) == 12


@pytest.mark.parametrize("how", ["said", "saved"])
def test_a_split_that_may_be_for_tests_is_not_passed_over(how, tmp_path):
    folder = two_splits(tmp_path / "d", "holdout", how)
    said = (
        "has train, holdout. None is to test on by its name .test, .*valid.*Name the one .* test_split, such as 'hold"
    )
    for load in (load_image_data, load_test_data):
        with pytest.raises(ValueError, match=said):
            load(folder)
        assert len(load(folder, test_split="holdout").test) == 12
    assert load_test_data(folder, test_split="holdout").test.data_split == "holdout"


@pytest.mark.parametrize("other", ["holdout", "Test"])
def test_files_that_datasets_overlooks(other, tmp_path):
    folder = two_splits(tmp_path / "d", other, "words")
    said = (
        rf"has train, files in no split \({other}-00000-of-00001.parquet\). .*of files in lower case.*Rename what is"
    )
    for options in ({}, {"test_split": other}):
        with pytest.raises(ValueError, match=said if not options else f"{other}': .* has files in no split"):
            load_test_data(folder, **options)
    write_parquet(tmp_path / "d", "dev", n=8, features=typed())
    assert f"not used: files in no split ({other}-0" in load_image_data(folder).description
    assert f"not used: files in no split ({other}-0" in load_test_data(folder).description


def test_splits_that_are_not_used_are_named(tmp_path):
    (tmp_path / "d").mkdir()
    folder = two_splits(tmp_path / "d" / "data", "test", "words").rpartition("/")[0]
    for split in ("unlabelled", "extra"):
        write_parquet(tmp_path / "d" / "data", split, labels=[-1] * 20, features=typed())
    assert "; not used: 'extra', 'unlabelled'" in load_image_data(folder).description
    assert len(load_test_data(folder).test) == 12


def chosen(*stored, **options):
    return choose_splits(stored, options.pop("test_split", None), "d", **options)


def test_of_several_splits_for_the_same_one_is_taken():
    assert chosen("training", "test", "evaluation", "dev", "val") == {
        "train": "training", "validation": "val", "test": "test"
    }  # fmt: skip
    assert chosen("train", "training", "dev", "validation", "TEST")["validation"] == "validation"
    both = chosen("train", "val", "dev", test_split="dev")
    assert both == {"train": "train", "validation": "val", "dev": "dev"} and list(both)[-1] == "dev"
    assert chosen("train", "validation", test_split="validation") == {"train": "train", "validation": "validation"}
    assert chosen("train", "training", test_split="training") == {"train": "train", "training": "training"}
    assert chosen("train") == {"train": "train"} and chosen("fold", test_only=True) == {"fold": "fold"}
    for wrong in ({"test_split": "train"}, {"test_split": "dev"}):
        with pytest.raises(ValueError, match="has test.$"):
            chosen("train", "test", **wrong)


def test_numbered_folders_are_tested_under_the_models_numbers(tmp_path):
    labels = [f"LABEL_{number}" for number in range(12)]
    folder = image_folder(tmp_path / "part", test=["3", "10", "011"])
    data = load_test_data(folder, class_names=labels)
    assert data.class_names == labels and "3 of the model's 12 classes, found by their numbers" in data.description
    assert data.test.labels.tolist() == [11] * 10 + [10] * 10 + [3] * 10
    data = load_test_data(
        image_folder(tmp_path / "all", test=[str(number) for number in range(12)]), class_names=labels
    )
    with pytest.raises(ValueError, match="has them in another order: 0, 1, 10, 11"):
        compare_class_names(labels, data.class_names)


def test_some_of_the_models_classes_are_tested_under_its_numbers(tmp_path):
    folder = image_folder(tmp_path, train=["bee", "wasp"], test=["bee", "wasp"])
    alone = load_test_data(folder, class_names=["bee", "wasp"])
    data = load_test_data(folder, class_names=["wasp", "ant", "Bee"])
    assert data.class_names == ["wasp", "ant", "Bee"] and "2 of the model's 3 classes" in data.description
    assert torch.equal(data.test.labels, torch.tensor([2, 0])[alone.test.labels])
    assert torch.equal(data.test.images, alone.test.images) and data.test.class_names == data.class_names
    model, processor = vit_from_config(
        data.class_names, data.image_size, 3, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([2.0, 0.0, 0.0]))  # everything is a wasp
    report = evaluate_robustness(model, data.test, "clean", processing_class=processor, progress=False)
    (clean,) = report.attacks
    assert clean.accuracy == clean.balanced_accuracy == 0.5


def test_a_data_set_with_nothing_but_a_test_split(tmp_path):
    folder = write_parquet(tmp_path / "d", "test", n=6, features=typed())
    data = load_test_data(folder, class_names=["cat", "dog"])
    assert len(data.test) == 6 and data.class_names == ["cat", "dog"] and data.channels == 3
    assert data.test.labels.tolist() == [0, 1] * 3 and data.description == "tested on split 'test'"
    strings = write_parquet(tmp_path / "s", "test", n=4, labels=["dog", "cat"] * 2)
    assert load_test_data(strings, class_names=["cat", "dog"]).test.labels.tolist() == [1, 0, 1, 0]
    with pytest.raises(ValueError, match=r"labels that the model has no class for: \['cat'\]"):
        load_test_data(strings, class_names=["wolf", "dog"])
    numbers = write_parquet(tmp_path / "n", "test", n=4, labels=[0, 2] * 2)
    assert load_test_data(numbers, class_names=["a", "b", "c"]).class_names == ["a", "b", "c"]
    with pytest.raises(ValueError, match="holds label 2, but the model knows 2 classes"):
        load_test_data(numbers, class_names=["a", "b"])


def test_the_test_part_is_that_of_training(tmp_path):
    folder = write_parquet(tmp_path / "d", features=typed())
    alone = load_test_data(folder)
    ours, theirs = load_image_data(folder, augmentation="none").test, alone.test
    assert torch.equal(ours.images, theirs.images) and torch.equal(ours.labels, theirs.labels)
    assert ours.data_split == "test" and theirs.data_split == "train"  # of a model of whom nobody knows the training
    assert "tested on 4 of 20 rows of split 'train'" in alone.description and "has not seen" in alone.description
    with pytest.raises(ValueError, match="embedded: drop test_split"):
        load_test_data("digits", test_split="test")


def test_grey_is_chosen_by_the_data_and_said(tmp_path):
    grey = [encoded(picture(i, mode="L").convert("RGB")) for i in range(20)]  # three equal channels
    folder = write_parquet(tmp_path / "a", images=grey, features=typed())
    assert load_image_data(folder, channels="auto").channels == 1
    data = load_image_data(folder)
    assert data.channels == 3 and 'channels="grey" keeps one' in data.description
    mixed = write_parquet(
        tmp_path / "b", images=[grey[0], *(encoded(picture(i)) for i in range(19))], features=typed()
    )
    assert load_image_data(mixed, channels="auto").channels == 3
    assert "grey" not in load_image_data(mixed).description


@pytest.mark.parametrize("colour", [range(1, 40, 2), range(31, 32)], ids=["half", "one"])
def test_grey_mixed_with_colour_is_not_called_grey(colour, tmp_path):
    images = [encoded(picture(i, mode="RGB" if i in colour else "L")) for i in range(40)]
    folder = write_parquet(tmp_path / "d", images=images, features=typed())
    description = load_image_data(folder).description
    assert "grey" not in description and "in 2 classes (cat, dog)" in description
    grey = write_parquet(tmp_path / "g", images=images[:1] * 20, features=typed())
    streamed = load_image_data(grey, image_size=8, in_memory=False).description
    assert "grey images in three equal channels (up to 16 of each part were looked at)" in streamed


@pytest.mark.parametrize("mode", ["P", "RGBA", "CMYK", "I;16", "LA"])
def test_grey_in_every_mode(mode, tmp_path):
    made = [picture(i, mode="L") for i in range(20)]
    if mode == "I;16":
        made = [Image.fromarray(np.asarray(image).astype(np.uint16) * 257) for image in made]
    elif mode == "CMYK":
        made = [Image.merge("CMYK", [Image.new("L", image.size)] * 3 + [image]) for image in made]
    else:
        made = [image.convert(mode) for image in made]
    kind = "TIFF" if mode == "CMYK" else "PNG"
    folder = write_parquet(tmp_path / "d", images=[encoded(image, kind) for image in made], features=typed())
    data = load_image_data(folder, channels="auto")
    assert data.channels == 1
    expected = np.asarray(picture(0, mode="L"))
    shown = {
        tuple(image.flatten().tolist()) for part in (data.train, data.validation, data.test) for image in part.images
    }
    assert tuple((255 - expected if mode == "CMYK" else expected).flatten().tolist()) in shown
