"""`tscnc evaluate` sees what the model's own image processor makes of a file: of any split, with labels or without."""

import io
import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ConvNextImageProcessor,
    MobileViTImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
)

from tscnc_hf.artifact.models.building import timm_model
from tscnc_hf.cli.evaluate import EvaluationArguments, evaluate_model


NAMES = ["ant", "bee", "cicada"]


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def saved(kind, folder):
    torch.manual_seed(0)
    if kind == "timm":  # half of the image is read, at another size, bicubic
        model, processor = timm_model("resnet18", NAMES, (12, 12), model_args={"channels": [8] * 4, "layers": [1] * 4})
        model.config.pretrained_cfg |= {"crop_pct": 0.5, "interpolation": "bicubic"}
    else:
        labels = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
        config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], **labels)
        model = ResNetForImageClassification(config)
        processor = {
            "convnext": lambda: ConvNextImageProcessor(size={"shortest_edge": 12}, crop_pct=0.5),
            "mobilevit": lambda: MobileViTImageProcessor(
                size={"shortest_edge": 24}, crop_size={"height": 12, "width": 10}
            ),
        }[kind]()
    with torch.no_grad():  # so that all three classes are seen
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
        model.eval()
        logits = [model(**processor(images=one, return_tensors="pt")).logits[0] for one in pictures()]
        head = model.timm_model.fc if kind == "timm" else model.classifier[-1]
        head.bias -= torch.stack(logits).mean(0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def predicted_by_stock(folder, pictures):
    model = AutoModelForImageClassification.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        return [int(model(**processor(images=one, return_tensors="pt")).logits.argmax()) for one in pictures]


def pictures(n=24):
    """Smooth images, brighter and darker, whose edges differ from their centres."""
    generator = np.random.default_rng(0)
    small = generator.integers(0, 256, (n, 5, 6, 3)) * generator.uniform(0.1, 1, (n, 1, 1, 3))
    return [Image.fromarray(one.astype(np.uint8)).resize((36, 30), Image.Resampling.BICUBIC) for one in small]


def write(folder, images, labels, split="test"):
    def encoded(image):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    rows = datasets.Dataset.from_dict({"image": list(map(encoded, images)), "label": labels})
    folder.mkdir(exist_ok=True)
    rows.cast_column("image", datasets.Image()).to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    return str(folder)


def run(model, data, output, **more):
    given = {"attacks": ["clean"], "device": "cpu", "cpu_threads": 1} | more
    return evaluate_model(EvaluationArguments(model, dataset=data, output_dir=str(output), **given))


def clean(results):
    return results["robustness"]["attacks"][0]["accuracy"]


OUTPUT = {"timm": "12x12", "convnext": "12x12", "mobilevit": "12x10"}


@pytest.mark.parametrize("kind", OUTPUT)
def test_the_clean_accuracy_is_that_of_a_stock_pipeline(kind, tmp_path, capsys):
    model, images = saved(kind, tmp_path / "model"), pictures()
    labels = predicted_by_stock(model, images)
    assert len(set(labels)) > 1
    data = write(tmp_path / "data", images, [NAMES[label] for label in labels])  # one split, labels that are names
    results = run(model, data, tmp_path / "own")
    assert clean(results) == 1.0 and results["robustness"]["image_size"] == [3, 30, 36]
    said = capsys.readouterr().out
    assert f"tested on split 'test'; attacked at 30x36, and resized to {OUTPUT[kind]} (bi" in said
    run(model, data, tmp_path / "other", image_size=[16, 18])
    assert f"attacked at 16x18, and resized to {OUTPUT[kind]} (bi" in capsys.readouterr().out


@pytest.mark.parametrize("kind", OUTPUT)
@pytest.mark.parametrize("sizes", [[(36, 30), (37, 30), (38, 30)], [(120, 100)]], ids=["several", "large"])
def test_photos_are_brought_to_the_model_s_size_before(kind, sizes, tmp_path, capsys):
    images = [one.resize(sizes[i % len(sizes)]) for i, one in enumerate(pictures())]
    model = saved(kind, tmp_path / "model")
    labels = predicted_by_stock(model, images)
    results = run(model, write(tmp_path / "data", images, labels), tmp_path / "own")
    height, width = map(int, OUTPUT[kind].split("x"))
    assert clean(results) == 1.0 and results["robustness"]["image_size"] == [3, height, width]
    assert results["robustness"]["resized"] is None
    assert f"attacked at {OUTPUT[kind]}, resized and cropped as by the model's " in capsys.readouterr().out


def test_splits_and_rows_without_a_label(tmp_path, capsys):
    model, images = saved("convnext", tmp_path / "model"), pictures(8)
    data = write(tmp_path / "data", images, [0, 1, -1, 2, -1, 0, 1, 1])
    write(tmp_path / "data", images[:3], [0, 1, 2], split="validation")
    with pytest.raises(SystemExit, match="'test' holds negative labels .2 of 8.*drop_unlabelled"):
        run(model, data, tmp_path / "a")
    assert run(model, data, tmp_path / "b", drop_unlabelled=True)["robustness"]["n"] == 6
    assert "2 rows of 'test' without a label left out" in capsys.readouterr().out
    assert run(model, data, tmp_path / "c", test_split="validation")["robustness"]["n"] == 3
    with pytest.raises(SystemExit, match="test_split='dev': data set 'data' has "):
        run(model, data, tmp_path / "d", test_split="dev")


def test_images_that_the_model_may_have_been_trained_on_are_called_so(tmp_path, capsys):
    model = saved("convnext", tmp_path / "model")
    results = run(model, write(tmp_path / "data", pictures(24), NAMES * 8, split="train"), tmp_path / "own")
    said = capsys.readouterr().out
    assert results["split"] == "train" and json.loads((tmp_path / "own" / "results.json").read_text()) == results
    assert "tested on 5 of 24 rows of split 'train', as there is none for tests: only a model that was" in said
    assert (
        "5 of 5 train images of data" in said and "5 train images" in (tmp_path / "own" / "robustness.md").read_text()
    )


def test_images_of_a_class_that_the_model_does_not_have(tmp_path):
    """In a folder that is sorted by class they come last."""
    model, images = saved("convnext", tmp_path / "model"), pictures(8)
    for number, image in enumerate(images):
        folder = tmp_path / "data" / "test" / [*NAMES, "dragonfly"][number // 2]
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{number}.png")
    with pytest.raises(
        SystemExit, match="labels lie between 0 and 3, the model has 3 outputs.*Label 3 is 'dragonfly'"
    ):
        run(model, str(tmp_path / "data"), tmp_path / "out", attacks=["pgd-2"], batch_size=2)
    assert not (tmp_path / "out").exists()


def test_a_processor_of_another_size_than_the_model_takes(tmp_path, build):
    model, _ = build("vit")
    model.save_pretrained(tmp_path / "model")
    ConvNextImageProcessor(size={"shortest_edge": 12}).save_pretrained(tmp_path / "model")
    said = "images of 8x8 pixels, which its image processor makes 12x12, do not go .*The processor is of another model"
    with pytest.raises(SystemExit, match=said):
        run(str(tmp_path / "model"), "digits", tmp_path / "out", n=4)
