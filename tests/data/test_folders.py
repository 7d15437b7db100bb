"""Folders of images: the first level says the split, the next the class, whatever words are in their names."""

from types import SimpleNamespace

import pytest

from tests.data.test_loading import picture, private_cache, typed, write_parquet  # noqa: F401
from tscnc_hf.data.folders import in_no_split
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


def test_a_class_without_an_image_is_named(tmp_path):
    folder = make(tmp_path / "a", "images/train/cat", "images/train/dog", "images/test/cat")
    train = tmp_path / "a" / "images" / "train"
    for name in ("eel/1.heic", "eel/2.npy", "eel/list.txt", "ibis/list.txt"):
        (train / name).parent.mkdir(exist_ok=True)
        (train / name).touch()
    (train / "fox").mkdir()
    said = (
        r"images/train/eel \(3 files, 2 of kinds that are not read, .heic, .npy\), images/train/fox \(empty\), "
        r"images/train/ibis \(1 file, none of an image\). Read are .jpg, .*Convert the files, or remove the folders"
    )
    for load_any in (load, load_test_data):
        with pytest.raises(ValueError, match=said):
            load_any(folder)
    flat = make(tmp_path / "b", "cat", "dog")
    (tmp_path / "b" / "eel").mkdir()
    with pytest.raises(ValueError, match=r"b has .* read: eel \(empty\). Read are"):
        load(flat)


@pytest.mark.parametrize("file", ["cat/1.heic", None])
def test_a_split_without_an_image_is_named(file, tmp_path):
    folder = make(tmp_path, "train/cat", "train/dog")
    (tmp_path / "Test" / "cat").mkdir(parents=True)
    if file:
        (tmp_path / "Test" / file).touch()
    with pytest.raises(ValueError, match=r"read: Test \((empty|1 file, 1 of kinds that are not read, .heic)\). Read"):
        load(folder)


def test_what_lies_beside_images(tmp_path):
    folder = make(tmp_path / "a", "train/cat", "train/dog", "test/cat", "test/dog", "test/hidden")
    root = tmp_path / "a"
    for name in (".git", "__MACOSX", "train/.ipynb_checkpoints", "test/eel", "notes"):
        (root / name).mkdir()
        (root / name / ".DS_Store").touch()
    for name in (
        "train.sh",
        "model.pth",
        "train/cat/Thumbs.db",
        "train/dog/0.JSON",
        "test/cat/LICENSE",
        "notes/a.xml",
    ):
        (root / name).touch()
    (root / "test" / "hidden").rename(root / "test" / ".hidden")
    with pytest.raises(ValueError, match=r"read: test/eel \(empty\). Read"):
        load(folder)
    (root / "test" / "eel").rename(root / "train" / ".eel")
    assert "left out" not in load(folder).description
    (root / "test" / "cat" / "0.HEIC").touch()
    (root / "train" / "cat" / "0001").touch()
    for data in (load(folder), load_test_data(folder)):
        assert "; 2 files of kinds that are not read left out (.heic, no suffix)" in data.description
        assert data.class_names == ["cat", "dog"]
    flat = make(tmp_path / "b", "cat", "dog", n=5)
    (tmp_path / "b" / "labels").mkdir()
    (tmp_path / "b" / "labels" / "0.txt").touch()
    assert "; folder 'labels', without images, left out" in load(flat).description


@pytest.mark.parametrize(("link", "to"), [("train/cat/up", "."), ("train/cat/up", "train/cat"), ("test/dog/up", "..")])
def test_a_link_to_a_folder_around_it_is_not_followed(link, to, tmp_path):
    folder = make(tmp_path / "a" / "b", "train/cat", "train/dog", "test/cat", "test/dog")
    (tmp_path / "a" / "b" / link).symlink_to(tmp_path / "a" / "b" / to, target_is_directory=True)
    assert sizes(load(folder)) == (8, 8)
    parquet = write_parquet(tmp_path / "p", features=typed())
    (tmp_path / "p" / "up").symlink_to(tmp_path / "p", target_is_directory=True)
    assert in_no_split(parquet, {"train": list((tmp_path / "p").glob("*.parquet"))}) == []


def test_links_to_other_folders_are_followed(tmp_path):
    make(tmp_path / "images", "cat", "dog")
    make(tmp_path / "a", "test/cat", "test/dog")
    for name in ("cat", "dog"):
        (tmp_path / "a" / "train").mkdir(exist_ok=True)
        (tmp_path / "a" / "train" / name).symlink_to(tmp_path / "images" / name, target_is_directory=True)
    found = load_image_data(str(tmp_path / "a"), augmentation="none", validation_fraction=0.25)
    assert found.class_names == ["cat", "dog"] and (len(found.train), len(found.test)) == (6, 8)


def test_metadata_that_names_no_image_of_a_split(tmp_path):
    make(tmp_path, "train/cat", "train/dog", "test/cat", "test/dog", n=8)
    listed = "".join(f"{name}/{i}.png,{name}\n" for name in ("cat", "dog") for i in range(8))
    (tmp_path / "train" / "metadata.csv").write_text(f"file_name,label\n{listed}")
    said = (
        "cannot be read: where there is metadata.csv or metadata.jsonl, only images that it names are read, and "
        "train/metadata.csv names none of split 'test'. Put one .* beside the images of each split, or"
    )
    with pytest.raises(ValueError, match=said):
        load(str(tmp_path))
    (tmp_path / "test" / "metadata.csv").write_text(f"file_name,label\n{listed}")
    assert sizes(load(str(tmp_path))) == (16, 16)
    for split in ("train", "test"):
        (tmp_path / split / "metadata.csv").unlink()
    assert sizes(load(str(tmp_path))) == (16, 16)


def test_a_class_may_have_no_test_image(tmp_path):
    folder = make(tmp_path, "train/cat", "train/dog", "test/cat")
    (tmp_path / "test" / "dog").mkdir()
    assert sizes(load(folder)) == (8, 4)


def test_a_readme_in_another_encoding(tmp_path):
    folder = make(tmp_path / "a", "cat", "dog", n=5)
    (tmp_path / "a" / "README.md").write_bytes("café".encode("latin-1"))
    assert sizes(load(folder)) == (8, 2)
    parquet = write_parquet(tmp_path / "b", features=typed())
    (tmp_path / "b" / "README.md").write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match="such as README.md, is not UTF-8 .*Store it as UTF-8") as caught:
        load(parquet)
    assert type(caught.value) is ValueError


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


def test_images_on_the_hub_are_told_apart_by_words_of_their_paths(monkeypatch):
    """Which `datasets` does; a repository whose README says which file is where is taken at its word."""
    root, said = "hf://datasets/me/test-rigs@0123abc", {}
    found = {"train": ["train/bus/0.png", "test/train/1.png"], "test": ["test/bus/0.png", "test/train/1.png"]}
    files = {split: [f"{root}/{name}" for name in names] for split, names in found.items()}

    class Builder:
        config = SimpleNamespace(data_files=files)

        def download_and_prepare(self):
            raise FileNotFoundError("no network")

    module = SimpleNamespace(builder_configs_parameters=SimpleNamespace(metadata_configs=said))
    monkeypatch.setattr("datasets.load_dataset_builder", lambda source, revision=None: Builder())
    monkeypatch.setattr("datasets.load.dataset_module_factory", lambda source, revision=None: module)
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: Builder().download_and_prepare())
    with pytest.raises(ValueError, match="test/train/1.png of me/test-rigs would be in the splits 'train' and 'test'"):
        load("me/test-rigs")
    said["default"] = {"data_files": "..."}
    with pytest.raises(ValueError, match="no network"):
        load("me/test-rigs")
    said.clear()
    files.update(train=[f"{root}/Test/bus/0.png"], test=[])
    with pytest.raises(ValueError, match="in the split 'train', as 'Test' says a split in lower case only"):
        load("me/test-rigs")
