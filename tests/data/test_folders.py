"""Folders of images: the first level says the split, the next the class, whatever words are in their names."""

import pytest

from tests.data.test_loading import picture, private_cache, typed, write_parquet  # noqa: F401
from tscnc_hf.data.loading import load_image_data, load_test_data


def make(root, *folders, n=4):
    """`n` images, of one's own each, in every folder."""
    for shift, folder in enumerate(folders):
        (root / folder).mkdir(parents=True)
        for i in range(n):
            picture(100 * shift + i).save(root / folder / f"{i}.png")
    return str(root)


def load(folder):
    return load_image_data(folder, augmentation="none", validation_fraction=0.25)


def sizes(data) -> tuple[int, int]:
    seen = [{image.numpy().tobytes() for image in part.images} for part in (data.train, data.validation, data.test)]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    return len(seen[0]) + len(seen[1]), len(seen[2])


@pytest.mark.parametrize("name", ["train", "test", "crash-test dummy", "dev board", "val", "training_2"])
def test_a_class_may_be_called_like_a_split(name, tmp_path):
    names = ["bus", name]
    split = load(make(tmp_path / "a", *(f"{part}/{one}" for part in ("train", "test") for one in names)))
    assert split.class_names == sorted(names) and sizes(split) == (8, 8)
    flat = load(make(tmp_path / "b", *names, n=5))
    assert flat.class_names == sorted(names) and sizes(flat) == (8, 2)


@pytest.mark.parametrize(("train", "test"), [("Train", "Test"), ("TRAIN", "VAL"), ("Training", "Testing")])
def test_splits_are_known_in_any_case_and_below_a_folder_around_all(train, test, tmp_path):
    folder = make(tmp_path, *(f"images/{part}/{one}" for part in (train, test) for one in ("ant", "bee")))
    (tmp_path / "images" / train / "ant" / "notes.txt").touch()
    assert sizes(load(folder)) == (8, 8)
    assert len(load_test_data(folder).test) == 8


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["train/ant", "train/bee", "train_small/ant"], "beside them train_small, which are none"),
        (["val/ant", "train/ant", "Dev/ant"], "folders Dev, val, which all mean 'validation'"),
        (["fold1/ant", "fold1/bee", "fold2/ant", "fold2/bee"], "whether fold1 is a split or a class"),
        (["ant/train", "ant/test", "bee/train", "bee/test"], "whether ant is a split or a class"),
        (["train/ant/2020", "train/ant/2021", "train/bee/2020"], "3 folders deep, at .*is its class ant or 2020"),
        (["train/ant/images", "train/bee/images"], "3 folders deep"),
        (["ant", "bee/2020"], "2 folders deep, at bee/2020/0.png"),
        (["train", "train/ant", "train/bee"], "1 folder deep, at train/0.png, in no class folder"),
        (["train", "test"], "in no class folder"),
        (["train", "test", "ant"], "Rename a class that is called like a split"),
    ],
)
def test_layouts_that_leave_split_or_class_open_are_refused(folders, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load(make(tmp_path, *folders, n=1))


def test_parquet_files_in_two_splits_or_of_a_split_that_is_not_seen_are_refused(tmp_path):
    twice = tmp_path / "a" / "test" / "train"
    twice.mkdir(parents=True)
    write_parquet(twice, features=typed())
    with pytest.raises(ValueError, match="in the splits 'train' and 'test' both"):
        load(str(tmp_path / "a"))
    folder = write_parquet(tmp_path / "b", "Data", features=typed())
    write_parquet(tmp_path / "b", "Test", features=typed())
    with pytest.raises(ValueError, match="in the split 'train', as 'Test' says a split in lower case only"):
        load(folder)
