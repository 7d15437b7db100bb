"""`tscnc bench` and `tscnc export`, on a folder that this library wrote."""

import contextlib
import io
import json
import re

import pytest
import torch

from tests.small_models import vit
from tscnc_hf.artifact.models.building import vit_from_config
from tscnc_hf.cli import deployment
from tscnc_hf.cli.main import main
from tscnc_hf.inference.runtimes import exporting


@pytest.fixture
def folder(tmp_path, tiny_vit):
    folder = tmp_path / "model"
    vit().save_pretrained(folder)
    tiny_vit[1].save_pretrained(folder)
    return folder


def test_bench(folder, capsys):
    options = ["--batch", "1", "3", "--threads", "1", "--runtimes", "eager", "sparse_compile", "--seconds", "1"]
    main(["bench", str(folder), *options, "--json"])
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert out.count("\n") == 1 and found["model"] == "model" and found["size"] == [3, 8, 8]
    assert [(row["batch"], row["runtime"]) for row in found["rows"]] == [
        (batch, name) for batch in (1, 3) for name in ("eager", "sparse_compile")
    ]
    assert "3 images: measuring" in err


def test_what_was_measured_is_inspected(folder, capsys):
    main(["bench", str(folder), "--batch", "2", "--runtimes", "eager", "sparse_compile", "--seconds", "1", "--save"])
    capsys.readouterr()
    main(["inspect", str(folder), "--no-spectrum"])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("sparse_compile"))
    assert line.startswith("sparse_compile, batch 2") and "times as fast as eager, the best of 1 others" in line
    main(["inspect", str(folder), "--no-spectrum", "--json"])
    assert len(json.loads(capsys.readouterr().out)["latency"]["rows"]) == 2


def test_bench_for_people(folder, capsys):
    main(["bench", str(folder), "--batch", "1", "--runtimes", "eager", "sparse_compile", "--seconds", "1"])
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split("  ")[0] == "batch" and [row.split()[1] for row in rows] == ["eager", "sparse_compile"]


@pytest.mark.parametrize(
    "options, code, message",
    [
        (["--batch", "0"], 2, "'0' is no number from 1 on"),
        (["--runtimes", "TVM"], 1, "TVM: no such runtime"),
        (["--image-size", "7", "--runtimes", "eager"], 1, "7"),
    ],
)
def test_wrong_options(folder, capsys, options, code, message):
    with pytest.raises(SystemExit) as end:
        main(["bench", str(folder), *options])
    assert end.value.code == code and message in capsys.readouterr().err


def test_code_beside_an_image_processor_is_never_run(folder, monkeypatch):
    """transformers asks whether to, and runs it if "y" is what stdin has."""
    says = {"image_processor_type": "Own", "auto_map": {"AutoImageProcessor": "own.Own"}}
    (folder / "preprocessor_config.json").write_text(json.dumps(says))
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\n")
    for command in (["bench", "--batch", "1", "--runtimes", "eager", "--seconds", "1"], ["export"]):
        monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
        with contextlib.suppress(SystemExit):  # the config may do without a processor, or not
            main([command[0], str(folder), *command[1:]])
        assert not (folder / "ran").exists()


def test_images_that_are_not_square(tmp_path, capsys, monkeypatch):
    model, processor = vit_from_config(
        ["a", "b"], (8, 16), patch_size=4, hidden_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model.save_pretrained(tmp_path / "wide")
    processor.save_pretrained(tmp_path / "wide")
    shapes = []

    def export(model, example, path, preprocessing):
        shapes.append((*example.shape[1:], preprocessing["height"], preprocessing["width"]))
        with torch.no_grad():
            model(example)
        return {"zeros": 1}

    monkeypatch.setattr(exporting, "export_onnx", export)
    for size in ([], ["--image-size", "8", "16"]):
        main(["export", str(tmp_path / "wide"), *size])
    assert shapes == [(3, 8, 16, 8, 16)] * 2
    main(["bench", str(tmp_path / "wide"), "--batch", "1", "--runtimes", "eager", "--seconds", "1"])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["bench", str(tmp_path / "wide"), "--image-size", "1", "2", "3"])
    assert "--image-size 1 2 3: give a side, or height and width" in capsys.readouterr().err


def test_export(folder, capsys, monkeypatch):
    """What the file is to say; the file itself: tests/inference/runtimes/test_exporting.py."""
    asked = {}

    def export(model, example, path, preprocessing):
        asked.update(shape=tuple(example.shape), path=path, preprocessing=preprocessing)
        return {"zeros": 1}

    monkeypatch.setattr(exporting, "export_onnx", export)
    main(["export", str(folder), "--format", "onnx"])
    assert capsys.readouterr().out == f"{folder / 'model.onnx'}\n"
    assert asked["shape"] == (2, 3, 8, 8) and asked["path"] == folder / "model.onnx"
    assert asked["preprocessing"] == {
        "scale": "pixels in [0, 1]", "mean": [0.5] * 3, "std": [0.25] * 3, "height": 8, "width": 8,
        "resize": {"image_processor": "ViTImageProcessor", "do_resize": True, "resample": 2,
                   "size": {"height": 8, "width": 8}},
    }  # fmt: skip


@pytest.mark.parametrize(
    "output, message",
    [
        ("", "is a folder; name the file, such as .*model.onnx"),
        ("model.safetensors", "has the name of a part of a model; give another"),
        ("model.sparse.safetensors", "has the name of a part of a model"),  # which is not there
        ("preprocessor_config.json", "is there, and would be overwritten, .* give another name, or take it away"),
    ],
)
def test_an_export_overwrites_nothing_but_an_export(output, message, folder, capsys, monkeypatch):
    monkeypatch.setattr(deployment, "_opened", None)  # known before
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(SystemExit) as end:
        main(["export", str(folder), "--output", str(folder / output)])
    assert end.value.code == 1 and re.search(message, capsys.readouterr().err)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_export_takes_the_place_of_an_earlier_one(folder, monkeypatch):
    monkeypatch.setattr(exporting, "export_onnx", lambda model, example, path, said: path.write_text("new") and {})
    (folder / "small.onnx").write_text("old")
    main(["export", str(folder), "--output", str(folder / "small.onnx")])
    assert (folder / "small.onnx").read_text() == "new"


def test_export_of_a_hub_model_needs_a_file(capsys):
    with pytest.raises(SystemExit):
        main(["export", "owner/name"])
    assert "say where the file goes with --output" in capsys.readouterr().err
