"""`recipes/evaluate.py` and `tscnc evaluate`: folders of ours and of others, dense and packed, cut off and resumed."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessor,
)

from tests.processes import PATIENCE, run_python, started_python
from tests.results_page import check_results
from tscnc_hf import evaluate_robustness
from tscnc_hf.artifact.models.config import input_format
from tscnc_hf.artifact.models.loading import load_model
from tscnc_hf.artifact.models.saving import save_sparse
from tscnc_hf.cli.evaluate import EvaluationArguments, evaluate_model
from tscnc_hf.cli.main import main
from tscnc_hf.evaluation.subset import drawn


ROOT = Path(__file__).parents[2]
CLASS_NAMES = [str(digit) for digit in range(10)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A stranger's ConvNeXt, saved as transformers saves it; the same packed, without dense weights beside it."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    labels = {"id2label": dict(enumerate(CLASS_NAMES)), "label2id": {c: i for i, c in enumerate(CLASS_NAMES)}}
    config = ConvNextConfig(image_size=8, patch_size=2, num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], **labels)
    model = ConvNextForImageClassification(config)
    processor = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.4] * 3, image_std=[0.3] * 3)
    for name in ("dense", "packed"):
        model.save_pretrained(root / name)
        processor.save_pretrained(root / name)
    save_sparse(model, root / "packed")
    (root / "packed" / "model.safetensors").unlink()
    return {"dense": root / "dense", "packed": root / "packed"}


def options(folder: Path, output: Path, **more) -> EvaluationArguments:
    defaults = {"dataset": "digits", "attacks": ["clean", "fgsm", "pgd-3"], "epsilon": "0.02", "n": 60}
    defaults |= {"device": "cpu", "cpu_threads": 1}
    return EvaluationArguments(model=str(folder), output_dir=str(output), **(defaults | more))


def test_dense_and_packed_give_the_figures_of_the_function(folders, tmp_path, digits, capsys):
    dense = evaluate_model(options(folders["dense"], tmp_path / "dense"))
    packed = evaluate_model(options(folders["packed"], tmp_path / "packed"))
    assert dense["robustness"] == packed["robustness"]
    model, processor = load_model(str(folders["dense"]))
    report = evaluate_robustness(
        model, digits.test, ("clean", "fgsm", "pgd-3"), epsilon=0.02, n=60, processing_class=processor, progress=False
    )
    assert dense["robustness"] == report.to_dict()
    saved = json.loads((tmp_path / "dense" / "results.json").read_text())
    check_results(saved)
    assert saved == dense and saved["dataset"] == "digits" and saved["model"] == "dense"
    assert {path.name for path in (tmp_path / "dense").iterdir()} == {
        "figures",
        "results.json",
        "robustness.md",
        "state",
    }
    figures = {path.name for path in (tmp_path / "dense" / "figures").iterdir()}
    assert figures == {"security_curve.png", "adversarial_examples.png"}
    page = (tmp_path / "dense" / "robustness.md").read_text()
    assert "| worst case |" in page and "| 9 |" in page and "Are gradients hidden?" in page
    assert "steps 3, step size" in page and str(tmp_path) not in page
    printed = capsys.readouterr().out
    assert "pgd-3 accuracy" in printed and "60 of 359 test images of digits" in printed


@pytest.mark.launched
def test_the_command_line(folders, tmp_path):
    """As a user starts it, options from a file, then by `accelerate launch` of the module."""
    config = tmp_path / "evaluation.yaml"
    config.write_text("dataset: digits\nattacks: [clean, pgd-2]\nepsilon: 0.02\nn: 40\ncpu_threads: 1\n")
    common = ["--model", str(folders["packed"]), "--config", str(config), "--device", "cpu"]
    launch = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--module", "tscnc_hf.cli", "evaluate"]
    results = []
    for command, name in ((["-m", "tscnc_hf.cli", "evaluate"], "a"), (launch, "b")):
        command = [*command, *common, "--output_dir", str(tmp_path / name)]
        done = run_python(command, cwd=ROOT)
        assert "clean accuracy" in done.stdout and "img/s" in done.stderr
        results.append((tmp_path / name / "results.json").read_bytes())
    assert results[0] == results[1]


@pytest.mark.launched
def test_killed_half_way_and_started_again(folders, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command = ["-m", "tscnc_hf.cli", "evaluate", "--model", str(folders["dense"]), "--dataset"]
    command += ["digits", "--attacks", "clean", "pgd-100", "--epsilon", "0.001", "--batch_size", "10", "--n"]
    command += ["200", "--device", "cpu", "--cpu_threads", "1", "--output_dir"]
    run_python([*command, whole])
    with started_python([*command, cut]):
        deadline = time.monotonic() + PATIENCE
        while not (cut / "state" / "batch-000004.json").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        # which ends it with SIGKILL
    done = len(list((cut / "state").glob("batch-*.json")))
    assert 5 <= done < 20 and not (cut / "results.json").exists()
    files = list((cut / "state").glob("batch-*.json"))
    before = {path: path.stat().st_mtime_ns for path in files if "pgd-100" in json.loads(path.read_text())["found"]}
    assert len(before) >= 4
    run_python([*command, cut])
    assert (cut / "results.json").read_bytes() == (whole / "results.json").read_bytes()
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())  # not computed again


@pytest.mark.parametrize(
    "change, message",
    [
        ({"attacks": ["pgd"]}, "attack 'pgd' does not exist; known are clean"),
        ({"epsilon": "8"}, "epsilon=8 is outside"),
        ({"model": "no/such-model-here"}, "model 'no/such-model-here' cannot be loaded"),
        ({"dataset": "/no/such/folder"}, "there is no folder"),
        ({"device": "foo"}, "--device foo cannot be used here: "),
        ({"device": "meta"}, "--device meta cannot be used here: "),
    ],
)
def test_wrong_options_end_with_one_line(folders, tmp_path, change, message):
    given = {"model": str(folders["dense"])} | change
    with pytest.raises(SystemExit, match=message):
        evaluate_model(options(given.pop("model"), tmp_path, **given))
    assert not list(tmp_path.iterdir())


def test_a_gpu_that_is_not_there(folders, tmp_path):
    with pytest.raises(SystemExit, match="--device cuda:99 cannot be used here: ") as caught:
        evaluate_model(options(folders["dense"], tmp_path, device="cuda:99"))  # nowhere, whether there are GPUs or not
    assert "\n" not in str(caught.value)


def test_the_same_weights_in_another_network_are_another_evaluation(tiny_vit, tmp_path):
    """A finished one is not read back, and no card shows it."""
    model, processor = tiny_vit
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    few = {"attacks": ["clean", "fgsm"], "full": False}
    evaluate_model(options(tmp_path / "model", tmp_path / "out", **few))
    path = tmp_path / "model" / "config.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {"num_attention_heads": 1}))
    with pytest.raises(SystemExit, match="with another network .the same weights, .*The option is --output_dir"):
        evaluate_model(options(tmp_path / "model", tmp_path / "out", **few))
    evaluate_model(options(tmp_path / "model", tmp_path / "other", **few))
    path.write_text(json.dumps(json.loads(before) | {"transformers_version": "9.9"}))
    evaluate_model(options(tmp_path / "model", tmp_path / "out", **few))


@pytest.mark.parametrize("names", [{}, {"id2label": {i: f"kind {i}" for i in range(5)}}], ids=["unnamed", "named"])
def test_labels_that_the_model_does_not_have(names, tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=5, **names)
    ResNetForImageClassification(config).save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "model")
    message = "labels lie between 0 and 9, the model has 5 outputs|not one name is the same"
    with pytest.raises(SystemExit, match=message):
        evaluate_model(options(tmp_path / "model", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("outputs, channels", [(5, 3), (12, 3), (10, 1)])
def test_a_dense_model_that_does_not_fit(outputs, channels, folders, tmp_path):
    sizes = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1]}
    config = ResNetConfig(num_labels=outputs, num_channels=channels, **sizes)
    ResNetForImageClassification(config).save_pretrained(tmp_path / "dense")
    mean = [0.5] * channels
    ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=mean, image_std=mean).save_pretrained(
        tmp_path / "dense"
    )
    with pytest.raises(SystemExit, match="^error: dense_model: "):
        evaluate_model(options(folders["dense"], tmp_path / "out", dense_model=str(tmp_path / "dense")))
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match="^error: dense_model 'no/such-model-here' cannot be loaded"):
        evaluate_model(options(folders["dense"], tmp_path / "out", dense_model="no/such-model-here"))


@pytest.mark.parametrize(
    "wrong, message",
    [
        (
            {"dense_model": "dense", "full": False},
            "dense_model='dense' is for the checks .* and full=False leaves them",
        ),
        (
            {"dense_model": "dense", "attacks": ["clean"]},
            "dense_model='dense' is for the checks .* nothing is attacked",
        ),
        ({"attacks": []}, "attacks=.*: name one or more"),
        ({"image_size": [0]}, "image_size=0: give a side, or height and width"),
        ({"image_size": [8, 8, 8]}, "image_size=.8, 8, 8.: give a side, or height and width"),
        ({"dataset": None}, "dataset=None: give one text"),
        ({"device": ["cpu"]}, "device=.'cpu'.: give one text, or leave it out"),
    ],
)
def test_options_that_are_refused_before_anything_is_loaded(wrong, message):
    with pytest.raises(ValueError, match=message):
        EvaluationArguments("model", **wrong)


@pytest.mark.parametrize("wrong", [{"n": 0}, {"cpu_threads": 0}, {"batch_size": 0}])
def test_numbers_below_one_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}=0: "):
        EvaluationArguments("model", **wrong)


def test_models_of_the_same_last_name_have_folders_of_their_own(folders, tmp_path, monkeypatch):
    def default(model):
        return EvaluationArguments(model=str(model)).output_dir

    assert default("tester/k") == "outputs/tester-k-robustness"
    assert default("resnet") == "outputs/resnet-robustness"
    assert default(folders["dense"]) == default(f"{folders['dense']}/") == "outputs/dense-robustness"
    monkeypatch.chdir(folders["dense"])
    assert default(".") == "outputs/dense-robustness"


@pytest.mark.parametrize("name", ["dense", "packed"])
def test_the_folder_of_a_model_is_no_place_for_figures(folders, name):
    before = {path: path.stat().st_mtime_ns for path in folders[name].rglob("*")}
    with pytest.raises(SystemExit, match="--output_dir .* holds a model; give another folder"):
        evaluate_model(options(folders[name], folders[name]))
    assert {path: path.stat().st_mtime_ns for path in folders[name].rglob("*")} == before


def test_other_classes_are_told(folders, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(folders["dense"], folder)
    config = json.loads((folder / "config.json").read_text())
    names = [f"thing {number}" for number in range(10)]
    config |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    (folder / "config.json").write_text(json.dumps(config))
    evaluate_model(options(folder, tmp_path / "out", attacks=["clean"], n=8))
    said = capsys.readouterr().out
    assert "Warning: " in said and "has thing 0, thing 1" in said and "has 0, 1" in said
    evaluate_model(options(folders["dense"], tmp_path / "same", attacks=["clean"], n=8))
    assert "Warning: " not in capsys.readouterr().out


def test_started_again_it_is_told_from_the_folder(folders, tmp_path, capsys, monkeypatch):
    first = evaluate_model(options(folders["dense"], tmp_path))
    said = capsys.readouterr().err
    for step in ("hidden gradients", "condition numbers", "6 radii", "Lipschitz", "examples", "Drawing"):
        assert step in said
    for name in ("masking.pgd", "curve.evaluate_robustness", "lipschitz.local_lipschitz"):
        monkeypatch.setattr(f"tscnc_hf.evaluation.measures.{name}", None)  # a call would be an error
    assert evaluate_model(options(folders["dense"], tmp_path)) == first
    assert "hidden gradients" not in capsys.readouterr().err
    with pytest.raises(TypeError):  # the checks against a dense model are others
        evaluate_model(options(folders["dense"], tmp_path, dense_model=str(folders["dense"])))
    (tmp_path / "state" / "evaluation.json").unlink()  # figures of settings that nobody knows are not believed
    with pytest.raises(TypeError):
        evaluate_model(options(folders["dense"], tmp_path, seed=1))


def test_hidden_gradients_that_nobody_could_look_for(folders, tmp_path, digits):
    wrong = tmp_path / "model"
    shutil.copytree(folders["dense"], wrong)
    model, _ = load_model(str(wrong))
    with torch.no_grad():
        model.classifier.weight.zero_()
        (place,) = drawn(len(digits.test), 1, 0)
        model.classifier.bias.copy_(5 * torch.eye(10)[(digits.test.labels[place] - 1) % 10])
    model.save_pretrained(wrong)
    evaluate_model(options(wrong, tmp_path / "none", attacks=["clean", "pgd-1"], n=1))
    page = (tmp_path / "none" / "robustness.md").read_text()
    assert "Not run: none of the 1 images that were drawn is classified correctly" in page
    evaluate_model(options(wrong, tmp_path / "few", attacks=["clean", "pgd-1"], n=16))
    assert "images: too few to tell much." in (tmp_path / "few" / "robustness.md").read_text()
    evaluate_model(options(wrong, tmp_path / "clean", attacks=["clean"], n=8))
    assert "Not checked: nothing was attacked." in (tmp_path / "clean" / "robustness.md").read_text()


def test_another_order_of_classes_is_an_error(folders, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(folders["dense"], folder)
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {str(i): name for i, name in enumerate(reversed(CLASS_NAMES))}
    config["label2id"] = {name: i for i, name in enumerate(reversed(CLASS_NAMES))}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="the data set has them in another order"):
        evaluate_model(options(folder, tmp_path / "out"))


def test_other_settings_in_the_same_folder(folders, tmp_path):
    evaluate_model(options(folders["dense"], tmp_path))
    with pytest.raises(SystemExit, match="another epsilon, .*give another folder.*--output_dir"):
        evaluate_model(options(folders["dense"], tmp_path, epsilon="0.03"))
    with pytest.raises(SystemExit, match=r"another attacks \(pgd-3 only there, pgd-4 only now\); .*--output_dir$"):
        evaluate_model(options(folders["dense"], tmp_path, attacks=["clean", "fgsm", "pgd-4"]))


def test_weights_that_are_not_finite_end_with_one_line(folders, tmp_path):
    model, processor = load_model(str(folders["dense"]))
    with torch.no_grad():
        model.classifier.weight[0, 0] = float("nan")
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit, match="^error: classifier.weight: 1 of its 160 values are NaN or infinite"):
        evaluate_model(options(tmp_path / "model", tmp_path / "out", attacks=["clean"], n=8))


def test_classes_that_are_not_numbered_from_0(folders, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(folders["dense"], folder)
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {str(i + 1): name for i, name in enumerate(CLASS_NAMES)}
    config["label2id"] = {name: i + 1 for i, name in enumerate(CLASS_NAMES)}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match=r"numbers its 10 classes 1, 2, 3, ..., without 0: .* from 0 to 9, .*Correct"):
        evaluate_model(options(folder, tmp_path / "out"))


def test_a_folder_is_called_by_its_last_part_however_it_is_given(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(folders["dense"].parents[1])
    monkeypatch.setenv("HOME", str(folders["dense"].parent))
    few = {"attacks": ["clean"], "n": 8, "full": False}
    for number, given in enumerate((folders["dense"].relative_to(Path.cwd()), "~/dense")):
        assert evaluate_model(options(given, tmp_path / str(number), **few))["model"] == "dense"
        said = capsys.readouterr().out  # of what has been written
        assert f"\nresults.json: {tmp_path / str(number)}" in said and "Figures" not in said
        assert {path.name for path in (tmp_path / str(number)).iterdir()} == {"results.json", "state"}


def test_a_tilde_is_the_home_as_a_shell_has_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    given = EvaluationArguments("~/m", dense_model="~/d", output_dir="~/o")
    home = "/home/somebody"
    assert (given.model, given.dense_model, given.output_dir) == (f"{home}/m", f"{home}/d", f"{home}/o")
    assert EvaluationArguments("you/m~1").model == "you/m~1"


def test_a_dtype_in_the_config_changes_no_figure_and_the_card_takes_them(tiny_vit, tmp_path):
    model, processor = tiny_vit
    folder, few = tmp_path / "model", {"attacks": ["clean", "fgsm"], "full": False}
    save_sparse(model, folder)
    for part in (model, processor):
        part.save_pretrained(folder)
    first = evaluate_model(options(folder, tmp_path / "first", **few))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float16"}))
    second = evaluate_model(options(folder, tmp_path / "second", **few))
    assert second["robustness"] == first["robustness"] and second["identity"] == first["identity"]
    main(["card", str(folder), "--results", str(tmp_path / "second" / "results.json")])


def test_the_format_that_a_model_takes(folders, build):
    assert input_format(*load_model(str(folders["dense"]))) == (8, "rgb")
    assert input_format(*build("resnet")) == (8, "rgb")
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=10)  # says nothing of the size
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    assert input_format(ResNetForImageClassification(config), processor) == (32, "rgb")
    assert input_format(ResNetForImageClassification(config)) == (None, "rgb")
