"""Data sets: where images and labels are found, what is refused, and that augmentation is a pure function."""

import io
import json
import pickle

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from tscnc_hf.data.augmentation import centre_box, draw_crops_and_flips, random_box
from tscnc_hf.data.decoding import ImageDecoder, to_planes
from tscnc_hf.data.loading import ImageStreamDataset, ImageTensorDataset, collate, load_image_data, load_test_data
from tscnc_hf.data.splits import stratified_split


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def picture(number: int, height: int = 8, width: int = 8, mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def write_parquet(folder, split="train", *, n=20, images=None, labels=None, features=None, columns=("image", "label")):
    images = [encoded(picture(i)) for i in range(n)] if images is None else images
    labels = [i % 2 for i in range(len(images))] if labels is None else labels
    folder.mkdir(exist_ok=True)
    rows = {columns[0]: [{"bytes": image, "path": f"{i}.png"} for i, image in enumerate(images)], columns[1]: labels}
    made = datasets.Dataset.from_dict(rows, features=features)
    made.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    return str(folder)


def typed(names=("cat", "dog"), columns=("image", "label")) -> datasets.Features:
    return datasets.Features({columns[0]: datasets.Image(), columns[1]: datasets.ClassLabel(names=list(names))})


def tensor_dataset(augmentation: str = "none", n: int = 12, seed: int = 0, size: int = 16) -> ImageTensorDataset:
    # No zero pixels, so that zeros can only come from padding.
    images = torch.randint(1, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    return ImageTensorDataset(images, torch.arange(n) % 3, ["a", "b", "c"], augmentation, seed)


def stream_dataset(augmentation: str = "none", n: int = 6, size: tuple[int, int] = (10, 14)) -> ImageStreamDataset:
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": encoded(picture(i, 30 + i, 24)), "path": None} for i in range(n)]},
        features=datasets.Features({"image": datasets.Image()}),
    )
    return ImageStreamDataset(rows, torch.arange(n) % 2, ["a", "b"], size, augmentation)


def all_images(data) -> torch.Tensor:
    return torch.cat([data.train.images, data.validation.images, data.test.images])


# Digits


def test_digits_are_split_in_proportion_and_disjointly():
    data = load_image_data("digits", augmentation="crop")
    assert (len(data.train), len(data.validation), len(data.test)) == (1294, 144, 359)
    assert (data.channels, data.image_size, len(data.class_names)) == (3, (8, 8), 10)
    from sklearn.datasets import load_digits

    stored = np.round(load_digits().images * 255 / 16).astype(np.uint8)
    kept = sorted(image[0].numpy().tobytes() for image in all_images(data))
    assert kept == sorted(image.tobytes() for image in stored)
    for part in (data.train, data.validation, data.test):
        share = torch.bincount(part.labels).double() / len(part)
        assert (share - torch.from_numpy(np.bincount(load_digits().target)) / 1797).abs().max() < 0.01
    assert "1,294" in data.description and "20%" in data.description


def test_digits_channels_sizes_and_limits():
    grey = load_image_data("digits", channels="auto", augmentation="none")
    rgb = load_image_data("digits", augmentation="none", train_limit=30, test_limit=10, seed=7)
    assert grey.channels == 1 and (len(rgb.train), len(rgb.validation), len(rgb.test)) == (30, 144, 10)
    assert torch.equal(rgb.train.images, grey.train.images[:30].expand(-1, 3, -1, -1))
    assert torch.equal(rgb.test.images, grey.test.images[:10].expand(-1, 3, -1, -1))
    assert load_image_data("digits", image_size=12).train[0]["pixel_values"].shape == (3, 12, 12)


def test_stratified_split_is_exact_stable_and_spares_single_rows():
    labels = np.array([0] * 50 + [1] * 30 + [2])
    rest, held = stratified_split(labels, 0.1, "testing")
    assert np.bincount(labels[held], minlength=3).tolist() == [5, 3, 0]
    assert np.array_equal(np.sort(np.concatenate([rest, held])), np.arange(81))
    assert np.array_equal(held, stratified_split(labels, 0.1, "testing")[1])
    # Rows held out may never change, or a model made earlier has seen them.
    assert stratified_split(np.arange(20) % 2, 0.2, "testing")[1].tolist() == [1, 8, 18, 19]
    with pytest.raises(ValueError, match="too few"):
        stratified_split(np.array([0, 1]), 0.1, "testing")
    with pytest.raises(ValueError, match="above 0 and below 1"):
        stratified_split(labels, 0.0, "testing")


# Folders


def test_typed_parquet_with_other_names_and_a_test_split(tmp_path):
    columns = ("img", "kind")
    folder = write_parquet(tmp_path / "pets", n=20, features=typed(columns=columns), columns=columns)
    write_parquet(tmp_path / "pets", "test", n=6, features=typed(columns=columns), columns=columns)
    data = load_image_data(folder, augmentation="flip")
    assert (len(data.train), len(data.validation), len(data.test)) == (18, 2, 6)
    assert data.class_names == ["cat", "dog"] and data.name == "pets" and data.train.augmentation == "flip"
    expected = torch.stack([torch.from_numpy(np.array(picture(i))).permute(2, 0, 1) for i in range(6)])
    assert torch.equal(data.test.images, expected)
    assert data.test.labels.tolist() == [0, 1, 0, 1, 0, 1] and data.test.augmentation == "none"


@pytest.mark.parametrize("bare", [False, True])
def test_parquet_without_metadata(tmp_path, bare):
    import pyarrow as pa
    import pyarrow.parquet as pq

    contents = [encoded(picture(i)) for i in range(20)]
    stored = contents if bare else [{"bytes": content, "path": None} for content in contents]
    pq.write_table(pa.table({"img": stored, "fine_label": [i % 4 for i in range(20)]}), tmp_path / "train.parquet")
    data = load_image_data(str(tmp_path / "."), augmentation="none", validation_fraction=0.25)
    assert data.class_names == ["0", "1", "2", "3"]
    assert (len(data.train), len(data.validation), len(data.test)) == (12, 4, 4)
    originals = {np.array(picture(i)).transpose(2, 0, 1).tobytes(): i % 4 for i in range(20)}
    for part in (data.train, data.validation, data.test):
        for image, label in zip(part.images, part.labels, strict=True):
            assert originals.pop(image.numpy().tobytes()) == label
    assert not originals


def test_image_folder_and_limits_on_rows_sorted_by_class(tmp_path):
    for split, count in (("train", 20), ("test", 10)):
        for shift, name in enumerate(("ant", "bee")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                picture(100 * shift + i).save(tmp_path / split / name / f"{i}.png")
    data = load_image_data(str(tmp_path), augmentation="none", train_limit=16, test_limit=8)
    assert data.class_names == ["ant", "bee"]
    assert (len(data.train), len(data.validation), len(data.test)) == (16, 4, 8)
    # The first rows are all ants.
    assert set(data.train.labels.tolist()) == set(data.test.labels.tolist()) == {0, 1}


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "I;16"])
def test_every_mode_becomes_rgb_and_grey(tmp_path, mode):
    grey = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    if mode == "I;16":
        made = [Image.fromarray(plane.astype(np.uint16) * 257) for plane in grey]
    elif mode == "1":
        made = [Image.fromarray(plane > 127) for plane in grey]
    else:
        made = [Image.fromarray(plane).convert(mode) for plane in grey]
    folder = write_parquet(tmp_path / "d", images=[encoded(image) for image in made], features=typed())
    write_parquet(tmp_path / "d", "test", images=[encoded(image) for image in made], features=typed())
    expected = np.where(grey > 127, 255, 0) if mode == "1" else grey
    rgb, only = load_image_data(folder).test.images, load_image_data(folder, channels="grey").test.images
    assert rgb.shape == (20, 3, 8, 8) and only.shape == (20, 1, 8, 8)
    assert np.array_equal(rgb.numpy(), np.stack([expected] * 3, 1)) and np.array_equal(only.numpy()[:, 0], expected)


def test_palette_with_transparency_and_cmyk(tmp_path):
    see_through = picture(0).quantize(8)
    see_through.info["transparency"] = bytes([0, 255] * 4)
    images = [encoded(see_through), encoded(picture(1, mode="CMYK"), "JPEG")] * 10
    data = load_image_data(write_parquet(tmp_path / "d", images=images, features=typed()), augmentation="none")
    assert all_images(data).shape == (20, 3, 8, 8)


def test_auto_channels(tmp_path):
    images = [encoded(picture(i, mode="L")) for i in range(20)]
    folder = write_parquet(tmp_path / "a", images=images, features=typed())
    assert load_image_data(folder, channels="auto").channels == 1
    folder = write_parquet(tmp_path / "b", features=typed())
    assert load_image_data(folder, channels="auto").channels == 3
    mixed = write_parquet(tmp_path / "c", images=images[:19] + [encoded(picture(19))], features=typed())
    for options in ({}, {"image_size": 8, "in_memory": False}):
        assert load_image_data(mixed, channels="auto", **options).channels == 3
    seldom = write_parquet(tmp_path / "d", images=images * 4 + [encoded(picture(19))] + images * 4, features=typed())
    with pytest.raises(ValueError, match=r'image 80 of split .train. is in colour.*looked at.*channels="rgb"'):
        load_image_data(seldom, channels="auto")


def test_upright_by_exif(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    buffer = io.BytesIO()
    picture(0).save(buffer, "PNG", exif=exif)
    folder = write_parquet(tmp_path / "d", features=typed())
    write_parquet(tmp_path / "d", "test", images=[buffer.getvalue(), encoded(picture(1))], features=typed())
    first = load_image_data(folder).test.images[0].permute(1, 2, 0).numpy()
    assert np.array_equal(first, np.array(picture(0))[::-1, ::-1])


def test_unequal_sizes_need_image_size(tmp_path):
    images = [encoded(picture(i, 8 + 2 * (i == 13), 12)) for i in range(20)]
    folder = write_parquet(tmp_path / "d", images=images, features=typed())
    with pytest.raises(ValueError, match="image 13 .*10x12.*8x12.*image_size"):
        load_image_data(folder)
    data = load_image_data(folder, image_size=(8, 10), augmentation="none")
    assert data.image_size == (8, 10) and data.train.images.shape[2:] == (8, 10)
    write_parquet(tmp_path / "e", images=images[:12], features=typed())
    write_parquet(tmp_path / "e", "test", features=typed())
    with pytest.raises(ValueError, match="differ in size"):
        load_image_data(str(tmp_path / "e"))


def test_photos_get_a_size_and_small_images_of_one_size_keep_theirs(tmp_path):
    """Of training; and for a model's own way to bring images to a size (`fit`) likewise."""
    made = {
        "one": [picture(i, 8, 12) for i in range(20)],
        "several": [picture(i, 8 + i % 3, 12) for i in range(20)],
        "large": [picture(i, 97, 12) for i in range(20)],
    }

    def fit(image):
        return to_planes(image.resize((5, 4)))

    for name, images in made.items():
        folder = write_parquet(tmp_path / name, images=list(map(encoded, images)), features=typed())
        data, test = load_image_data(folder, photos=6, augmentation="none"), load_test_data(folder, fit=fit)
        kept = name == "one"
        assert data.image_size == ((8, 12) if kept else (6, 6))
        assert test.image_size == ((8, 12) if kept else (4, 5)) and test.fitted is not kept
        assert load_image_data(folder, photos=6, image_size=7, augmentation="none").image_size == (7, 7)
    write_parquet(tmp_path / "one", "test", images=[encoded(picture(0, 9, 9))] * 20, features=typed())
    assert load_image_data(str(tmp_path / "one"), photos=6, augmentation="none").image_size == (6, 6)


def test_resize_keeps_the_aspect_ratio(tmp_path):
    wide = np.zeros((8, 24, 3), dtype=np.uint8)
    wide[:, 8:16] = 200  # the middle third is what a centre crop keeps
    folder = write_parquet(tmp_path / "d", images=[encoded(Image.fromarray(wide))] * 20, features=typed())
    assert (all_images(load_image_data(folder, image_size=8)) == 200).all()
    small = load_image_data(folder, image_size=4, augmentation="none").train.images
    assert small.shape[2:] == (4, 4) and (small[..., 1:3] == 200).all()


def test_memory_and_stream_give_the_same_pixels(tmp_path):
    images = [encoded(picture(i, 20 + i, 25)) for i in range(20)]
    folder = write_parquet(tmp_path / "d", images=images, features=typed())
    kept = load_image_data(folder, image_size=9)
    streamed = load_image_data(folder, image_size=9, in_memory=False, augmentation="crop")
    assert isinstance(kept.test, ImageTensorDataset) and isinstance(streamed.test, ImageStreamDataset)
    assert streamed.train.augmentation == "crop" and streamed.test.augmentation == "none"
    for mine, theirs in ((kept.test, streamed.test), (kept.validation, streamed.validation)):
        assert len(mine) == len(theirs) > 1
        for i in range(len(mine)):
            assert torch.equal(mine[i]["pixel_values"], theirs[i]["pixel_values"])
            assert mine[i]["labels"] == theirs[i]["labels"]


def test_large_images_are_streamed_and_need_image_size(tmp_path):
    images = [encoded(picture(i, 100, 100)) for i in range(10)]
    folder = write_parquet(tmp_path / "d", images=images, features=typed())
    with pytest.raises(ValueError, match="100x100.*image_size"):
        load_image_data(folder, validation_fraction=0.25)
    data = load_image_data(folder, validation_fraction=0.25, image_size=98)
    assert isinstance(data.train, ImageStreamDataset) and data.image_size == (98, 98)
    assert isinstance(load_image_data(folder, validation_fraction=0.25, image_size=64).train, ImageTensorDataset)


def test_reading_needs_no_more_decoding_for_more_images(tmp_path, monkeypatch):
    decoded, decode = [], ImageDecoder.open
    monkeypatch.setattr(ImageDecoder, "open", lambda self, *stored: decoded.append(1) or decode(self, *stored))
    for n in (20, 200):
        folder = write_parquet(tmp_path / str(n), n=n, features=typed())
        data = load_image_data(folder, image_size=8, in_memory=False)
        assert len(decoded) < 10 and len(data.train) + len(data.validation) + len(data.test) == n
        assert "decoded as they are read; training images: random resized crops and flips" in data.description
        decoded.clear()
        data.train[0], data.train[5]
        assert len(decoded) == 2
        kept = load_image_data(folder, augmentation="crop")
        assert len(decoded) >= n + 2  # the patch sees what decodes everything
        assert f"decoded in memory ({n * 192 / 1e6:.1f} MB)" in kept.description
        assert "training images: random crops of the padded image" in kept.description
        decoded.clear()
    assert "training images: not augmented" in load_image_data(folder, augmentation="none").description


def test_the_split_to_test_on(tmp_path):
    folder = write_parquet(tmp_path / "d", features=typed())
    write_parquet(tmp_path / "d", "validation", n=6, features=typed())
    write_parquet(tmp_path / "d", "test", n=4, labels=[-1] * 4, features=typed())
    with pytest.raises(ValueError, match="'test' holds negative"):  # as ImageNet's
        load_image_data(folder)
    data = load_image_data(folder, test_split="validation", augmentation="none")
    assert len(data.test) == 6 and "tested on split 'validation'" in data.description
    for wrong in ("train", "dev"):
        with pytest.raises(ValueError, match=f"test_split='{wrong}'.*has (validation, test|test, validation)"):
            load_image_data(folder, test_split=wrong)


def test_string_labels_are_sorted(tmp_path):
    folder = write_parquet(tmp_path / "d", labels=["zebra", "ape"] * 10)
    write_parquet(tmp_path / "d", "test", n=2, labels=["zebra", "ape"])
    data = load_image_data(folder)
    assert data.class_names == ["ape", "zebra"] and data.test.labels.tolist() == [1, 0]
    write_parquet(tmp_path / "d", "test", n=2, labels=["zebra", "yak"])
    with pytest.raises(ValueError, match="yak"):
        load_image_data(folder)


def test_corrupt_images_are_named(tmp_path):
    images = [encoded(picture(i)) for i in range(20)]
    images[17] = images[17][: len(images[17]) // 2]
    folder = write_parquet(tmp_path / "d", images=images, features=typed())
    with pytest.raises(ValueError, match=r"image 17 of split 'train' .*17\.png.*(truncated|broken)"):
        load_image_data(folder)
    data = load_image_data(folder, in_memory=False, image_size=8)
    with pytest.raises(ValueError, match="image 17 of split 'train'"):
        for part in (data.train, data.validation, data.test):
            list(part)
    for name in ("ant", "bee"):
        (tmp_path / "files" / "train" / name).mkdir(parents=True)
        for i in range(10):
            picture(i).save(tmp_path / "files" / "train" / name / f"{i}.png")
    (tmp_path / "files" / "train" / "bee" / "4.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"image 14 of split 'train' .*bee/4\.png.*UnidentifiedImageError"):
        load_image_data(str(tmp_path / "files"))


def test_columns_that_cannot_be_chosen(tmp_path):
    plain = {"image": [{"bytes": encoded(picture(i)), "path": None} for i in range(20)]}
    numbers = [i % 2 for i in range(20)]

    def folder(name, rows, **types):
        made = datasets.Dataset.from_dict(rows)
        for column, feature in types.items():
            made = made.cast_column(column, feature)
        (tmp_path / name).mkdir()
        made.to_parquet(str(tmp_path / name / "train.parquet"))
        return str(tmp_path / name)

    image = datasets.Image()
    with pytest.raises(ValueError, match=r"no label column found; name one with label_column.*thing \(int64\)"):
        load_image_data(folder("a", plain | {"thing": numbers}, image=image))
    assert load_image_data(str(tmp_path / "a"), label_column="thing").class_names == ["0", "1"]
    with pytest.raises(ValueError, match=r"no image column found; name one with image_column.*text \(string\)"):
        load_image_data(folder("b", {"text": ["x"] * 20, "label": numbers}))
    two = folder("c", plain | {"fine_label": numbers, "coarse_label": numbers}, image=image)
    with pytest.raises(ValueError, match=r"several.*fine_label, coarse_label.*label_column"):
        load_image_data(two)
    assert len(load_image_data(two, label_column="coarse_label").train) == 14
    twice = folder("d", plain | {"mask": plain["image"], "label": numbers}, image=image, mask=image)
    with pytest.raises(ValueError, match=r"several.*image, mask.*image_column"):
        load_image_data(twice)
    assert len(load_image_data(twice, image_column="mask").train) == 14
    with pytest.raises(ValueError, match="'nope' is not among the columns: image"):
        load_image_data(twice, image_column="nope")
    with pytest.raises(ValueError, match="image_column='label' has type int64"):
        load_image_data(twice, image_column="label")


@pytest.mark.parametrize(
    "labels, message",
    [
        ([-1, 0] * 10, "negative labels \\(10 of 20\\)"),
        ([0] * 20, "at least 2"),
        ([0, 2] * 10, "lacks \\[1\\]"),
        ([None, 1] * 10, "10 rows .* no label"),
        (["cat", "", None, "dog", ""] * 4, "12 rows .* no label .*first is row 1.*drop_unlabelled"),
    ],
)
def test_labels_that_are_refused(tmp_path, labels, message):
    with pytest.raises(ValueError, match=message):
        load_image_data(write_parquet(tmp_path / "d", labels=labels))


def test_unlabelled_and_strange_test_splits(tmp_path):
    folder = write_parquet(tmp_path / "d", labels=[0, 1] * 10)
    write_parquet(tmp_path / "d", "test", n=4, labels=[-1] * 4)
    with pytest.raises(ValueError, match="'test' holds negative"):
        load_image_data(folder)
    write_parquet(tmp_path / "d", "test", n=4, labels=[0, 1, 5, 0])
    with pytest.raises(ValueError, match="'test' holds label 5.*2 classes"):
        load_image_data(folder)


def test_empty_and_missing(tmp_path):
    folder = write_parquet(tmp_path / "d", features=typed())
    write_parquet(tmp_path / "d", "test", images=[], features=typed())
    with pytest.raises(ValueError, match="test.*no data.*rows in every split"):
        load_image_data(folder)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="cannot be read"):
        load_image_data(str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_image_data(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="no split 'train', only test"):
        load_image_data(write_parquet(tmp_path / "e", "test", features=typed()))


@pytest.mark.parametrize(
    "arguments",
    [
        {"augmentation": "mixup"},
        {"channels": "bgr"},
        {"in_memory": "yes"},
        {"image_size": 0},
        {"image_size": (8, 8, 3)},
        {"image_size": 8.5},
        {"image_size": True},
        {"image_size": "8"},
        {"image_size": (8, "8")},
        {"image_column": "img"},
        {"test_split": "test"},
        {"train_limit": 0},
        {"test_limit": -1},
        {"test_limit": 1.5},
        {"test_limit": True},
        {"train_limit": "5"},
        {"validation_fraction": 1.0},
        {"seed": -1},
    ],
)
def test_arguments_that_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments)).split("_")[0]):
        load_image_data("digits", **arguments)


def test_sizes_and_limits_may_be_numbers_of_numpy():
    given = {"image_size": np.int64(12), "test_limit": np.int32(5), "train_limit": 30.0}
    data = load_image_data("digits", augmentation="none", **given)
    plain = load_image_data("digits", augmentation="none", image_size=12, test_limit=5, train_limit=30)
    assert data.image_size == (12, 12) and len(data.test) == 5 and len(data.train) == 30
    assert json.loads(json.dumps(data.identity)) == json.loads(json.dumps(plain.identity))
    two = load_image_data("digits", augmentation="none", image_size=np.array([12, 9]))
    assert two.image_size == (12, 9) and json.loads(json.dumps(two.identity))["asked"]["image_size"] == [12, 9]


def test_only_the_arguments_that_were_given_are_named():
    with pytest.raises(ValueError, match="embedded: drop image_column.$"):
        load_image_data("digits", image_column="img")
    with pytest.raises(ValueError, match="embedded: drop revision, in_memory.$"):
        load_image_data("digits", revision="main", in_memory=False)


# Augmentation


@pytest.mark.parametrize("augmentation", ["none", "flip", "crop", "crop-flip"])
def test_an_item_does_not_depend_on_its_batch(augmentation):
    data = tensor_dataset(augmentation)
    data.set_epoch(3)
    singly = [data[i] for i in range(12)]
    order = [7, 2, 11, 0, 2]
    batch = data.__getitems__(order)
    assert batch["pixel_values"].dtype == torch.float32 and batch["pixel_values"].is_contiguous()
    for position, i in enumerate(order):
        assert torch.equal(batch["pixel_values"][position], singly[i]["pixel_values"])
        assert batch["labels"][position] == singly[i]["labels"]
    smaller = data.subset(range(5))
    smaller.set_epoch(3)
    assert torch.equal(smaller[4]["pixel_values"], singly[4]["pixel_values"])


@pytest.mark.parametrize("augmentation", ["crop", "crop-flip"])
def test_crops_against_a_loop_over_images(augmentation):
    data = tensor_dataset(augmentation, n=60)
    rows, columns, flips = draw_crops_and_flips(60, 2, 0, 0)
    assert set(rows.tolist()) == set(columns.tolist()) == set(range(5)) and set(flips.tolist()) == {True, False}
    batch = data.__getitems__(range(60))["pixel_values"]
    for i in range(60):
        padded = np.zeros((3, 20, 20), dtype=np.float32)
        padded[:, 2:18, 2:18] = data.images[i].numpy() / np.float32(255)
        expected = padded[:, rows[i] : rows[i] + 16, columns[i] : columns[i] + 16]
        if flips[i] and augmentation == "crop-flip":
            expected = expected[:, :, ::-1]
        assert np.array_equal(batch[i].numpy(), expected)
    zeros = (batch == 0).all(dim=1).sum(dim=(1, 2))
    assert torch.equal(zeros, 256 - (16 - (rows - 2).abs()) * (16 - (columns - 2).abs()))


def test_crops_of_images_that_are_not_square():
    images = torch.arange(1, 8 * 20 + 1, dtype=torch.uint8).view(1, 1, 8, 20).repeat(9, 1, 1, 1)
    data = ImageTensorDataset(images, torch.zeros(9, dtype=torch.int64), ["a", "b"], "crop")
    rows, columns, _ = draw_crops_and_flips(9, 1, 0, 0)
    for i in range(9):
        padded = torch.nn.functional.pad(images[i], (1, 1, 1, 1))
        expected = padded[:, rows[i] : rows[i] + 8, columns[i] : columns[i] + 20].float() / 255
        assert torch.equal(data[i]["pixel_values"], expected)


def test_flips_are_those_of_torch():
    data = tensor_dataset("flip", n=40)
    flipped = 0
    for i in range(40):
        image, original = data[i]["pixel_values"], data.images[i].float() / 255
        mirrored = torch.equal(image, torch.flip(original, dims=[-1]))
        assert mirrored or torch.equal(image, original)
        flipped += mirrored
    assert 8 < flipped < 32


def test_epochs_and_seeds_differ_and_come_back():
    data, everything = tensor_dataset("crop-flip"), range(12)
    first = data.__getitems__(everything)["pixel_values"]
    data.set_epoch(1)
    second = data.__getitems__(everything)["pixel_values"]
    data.set_epoch(0)
    assert not torch.equal(first, second) and torch.equal(first, data.__getitems__(everything)["pixel_values"])
    other = tensor_dataset("crop-flip", seed=1).__getitems__(everything)["pixel_values"]
    assert not torch.equal(first, other) and not torch.equal(second, other)
    restored = pickle.loads(pickle.dumps(data))
    assert torch.equal(first, restored.__getitems__(everything)["pixel_values"])
    for wrong in (-1, 0.5):
        with pytest.raises(ValueError, match="epoch"):
            data.set_epoch(wrong)


def test_tensor_dataset_subset_augmentation_and_repr():
    data = tensor_dataset("crop")
    part = data.subset([5, 1])
    assert torch.equal(part.images, data.images[[5, 1]]) and part.labels.tolist() == [2, 1]
    plain = ImageTensorDataset(data.images, data.labels, data.class_names)
    assert torch.equal(plain[-1]["pixel_values"], data.images[11].float() / 255)
    assert plain[0]["labels"].dtype == torch.int64 and plain[0]["labels"].shape == ()
    assert "12 images of 3x16x16" in repr(data) and "'crop'" in repr(data)
    for index in (12, -13):
        with pytest.raises(IndexError):
            data[index]
    with pytest.raises(ValueError, match="h // 8"):
        tensor_dataset("crop", size=7)
    with pytest.raises(ValueError, match="uint8"):
        ImageTensorDataset(data.images.float(), data.labels, data.class_names)
    with pytest.raises(ValueError, match="int64"):
        ImageTensorDataset(data.images, data.labels.float(), data.class_names)


@pytest.mark.parametrize("augmentation", ["none", "flip", "crop", "crop-flip"])
def test_stream_items(augmentation):
    data, again = stream_dataset(augmentation), stream_dataset(augmentation)
    items = [data[i] for i in range(6)]
    for i in (4, 0, 5):
        assert torch.equal(items[i]["pixel_values"], again[i]["pixel_values"]) and items[i]["labels"] == i % 2
        assert items[i]["pixel_values"].shape == (3, 10, 14) and items[i]["pixel_values"].dtype == torch.float32
    pixels = torch.stack([item["pixel_values"] for item in items])
    assert 0 <= pixels.min() < 0.4 and 0.6 < pixels.max() <= 1
    data.set_epoch(1)
    changed = not torch.equal(pixels, torch.stack([item["pixel_values"] for item in data]))
    assert changed == (augmentation != "none")
    data.set_epoch(0)
    assert torch.equal(pixels, torch.stack([item["pixel_values"] for item in data]))


def test_stream_flips_subset_and_refusals():
    plain, flipped = stream_dataset(), stream_dataset("flip")
    same = [torch.equal(plain[i]["pixel_values"], flipped[i]["pixel_values"]) for i in range(6)]
    mirrored = [torch.equal(plain[i]["pixel_values"].flip(-1), flipped[i]["pixel_values"]) for i in range(6)]
    assert all(a != b for a, b in zip(same, mirrored, strict=True)) and any(same) and any(mirrored)
    part = flipped.subset([3, 1])
    shown = part[0]["pixel_values"]
    assert any(
        torch.equal(shown, plain[3]["pixel_values"].flip(dims)) for dims in ((), (-1,))
    ) and part.labels.tolist() == [1, 1]
    assert "6 images of 3x10x14" in repr(plain)
    with pytest.raises(ValueError, match="the columns are image"):
        ImageStreamDataset(plain.rows, plain.labels, ["a", "b"], (8, 8), image_column="img")
    with pytest.raises(ValueError, match="3 labels for 6 images"):
        ImageStreamDataset(plain.rows, plain.labels[:3], ["a", "b"], (8, 8))


def test_random_boxes_fit_and_vary():
    areas = []
    for number in range(200):
        left, upper, right, lower = random_box(50, 40, (8, 8), np.random.default_rng(number))
        assert 0 <= left < right <= 50 and 0 <= upper < lower <= 40
        assert 0.6 < (right - left) / (lower - upper) < 1.6
        areas.append((right - left) * (lower - upper) / 2000)
    assert 0.05 < min(areas) < 0.15 and 0.8 < max(areas) <= 1
    assert random_box(100, 2, (8, 8), np.random.default_rng(0), area=(1, 1)) == (49.0, 0.0, 51.0, 2.0)
    assert centre_box(12, 8, (8, 8)) == (2.0, 0.0, 10.0, 8.0)


# Batches


def test_collate_takes_items_and_ready_batches():
    data = tensor_dataset("crop-flip")
    ready = data.__getitems__([1, 4])
    listed = collate([data[1], {"pixel_values": data[4]["pixel_values"], "label": int(data.labels[4]), "id": 3}])
    for made in (collate(ready), listed):
        assert set(made) == {"pixel_values", "labels"} and made["labels"].dtype == torch.int64
        assert torch.equal(made["pixel_values"], ready["pixel_values"]) and made["labels"].tolist() == [1, 1]
    bytes_ = collate([{"pixel_values": data.images[0], "labels": 0}])
    assert torch.equal(bytes_["pixel_values"], data.images[:1].float() / 255)
    assert collate([{"pixel_values": np.ones((3, 2, 2)), "labels": 0}])["pixel_values"].dtype == torch.float32


IMAGE = torch.zeros(3, 2, 2)


@pytest.mark.parametrize(
    "items, message",
    [
        ([], "empty list"),
        ([{"labels": 0}], "no 'pixel_values'"),
        ([{"pixel_values": IMAGE}], "neither 'labels' nor 'label'"),
        ([{"pixel_values": IMAGE - 0.01, "labels": 0}], "Normalised inputs are a mistake"),
        ([{"pixel_values": IMAGE + 1.01, "labels": 0}], "Normalised inputs are a mistake"),
        ([{"pixel_values": IMAGE * float("nan"), "labels": 0}], "nan"),
        ({"pixel_values": IMAGE[None] + 2, "labels": torch.tensor([0])}, "Normalised inputs are a mistake"),
        ({"pixel_values": IMAGE[None], "labels": torch.tensor([0, 1])}, "labels \\(b,\\)"),
        ({"pixel_values": IMAGE, "labels": torch.tensor([0])}, "pixel_values \\(b, c, h, w\\)"),
        ([{"pixel_values": IMAGE, "labels": 0}, {"pixel_values": IMAGE[:1], "labels": 0}], "differ: shapes"),
        ([{"pixel_values": IMAGE.long(), "labels": 0}], "dtype torch.int64"),
        ([{"pixel_values": IMAGE, "labels": 0.5}], "integer class ids"),
        ([{"pixel_values": IMAGE, "label": "cat"}], "'label' is the text 'cat'; give integer class ids"),
        ([(IMAGE, 0)], "a batch item is a tuple; give a dict"),
    ],
)
def test_collate_refuses(items, message):
    with pytest.raises(ValueError, match=message):
        collate(items)


def test_collate_tolerates_rounding_only():
    assert len(collate([{"pixel_values": IMAGE.double() + 1 + 9e-7, "labels": 0}])["labels"]) == 1
    with pytest.raises(ValueError, match="allowed is"):
        collate([{"pixel_values": IMAGE.double() + 1 + 2e-6, "labels": 0}])


@pytest.mark.parametrize("make", [tensor_dataset, stream_dataset])
@pytest.mark.parametrize("workers", [0, 2])
def test_loader(make, workers):
    data = make("crop-flip", n=6)
    loader = DataLoader(data, 4, collate_fn=collate, num_workers=workers, persistent_workers=workers > 0)
    for epoch in (0, 1):
        data.set_epoch(epoch)  # has to reach the workers that live on
        batches = list(loader)
        assert [len(batch["labels"]) for batch in batches] == [4, 2]
        seen = torch.cat([batch["pixel_values"] for batch in batches])
        assert torch.equal(seen, torch.stack([data[i]["pixel_values"] for i in range(6)]))
