"""A card shows figures of the model beside it: of its weights, its config and its image processor."""

import json
import shutil
from pathlib import Path

import pytest

from tscnc_hf.artifact.models.building import vit_from_config
from tscnc_hf.artifact.repository.inspection import inspect_model, summary_rows
from tscnc_hf.artifact.repository.opening import open_repository, published_files
from tscnc_hf.artifact.repository.recard import rebuild_card
from tscnc_hf.cli.main import main
from tscnc_hf.evaluation.run import evaluate


SHELF = Path(__file__).parents[3] / "recipes" / "models"


@pytest.fixture(scope="module")
def measured(digits, tmp_path_factory):
    """A folder with a model that gets images as they are, one whose processor makes them larger; their results."""
    root = tmp_path_factory.mktemp("measured")
    sizes = {"patch_size": 4, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    for name, size in (("plain", None), ("larger", 16)):
        model, processor = vit_from_config(digits.class_names, (8, 8), 3, input_size=size, **sizes)
        model.save_pretrained(root / name)
        processor.save_pretrained(root / name)
        options = {"epsilon": 0.1, "attacks": "clean", "n": 8, "full": False, "progress": False}
        evaluate(model, digits.test, processing_class=processor, folder=root / f"{name}-results", **options)
        shutil.rmtree(root / f"{name}-results" / "state")
        shutil.copyfile(root / f"{name}-results" / "results.json", root / name / "results.json")
    return root


@pytest.fixture
def folders(measured, tmp_path):
    shutil.copytree(measured, tmp_path / "measured")
    return tmp_path / "measured"


def change(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("name", ["plain", "larger"])
def test_results_of_the_model_itself(name, folders):
    change(folders / name / "config.json", transformers_version="9.9", dtype="bfloat16")
    names = {str(number): f"digit {number}" for number in range(10)}
    change(folders / name / "config.json", dtype="float32", id2label=names, label2id={v: k for k, v in names.items()})
    assert rebuild_card(open_repository(folders / name)).is_file()


@pytest.mark.parametrize(
    "file, fields, message",
    [
        ("config.json", {"num_attention_heads": 1}, "the same weights in another network: the config.json"),
        ("config.json", {"hidden_act": "relu"}, "the same weights in another network"),
        ("preprocessor_config.json", {"image_mean": [0.4] * 3}, r"other inputs .*: mean \[0.5.*\] there, \[0.4"),
        ("preprocessor_config.json", {"image_std": [0.5] * 3}, r"other inputs .*: std \[0.25.*\] there, \[0.5"),
        ("preprocessor_config.json", {"do_normalize": False}, r"other inputs .*: mean \[0.5.*\] there, \[0.0\]"),
        (
            "preprocessor_config.json",
            {"size": {"height": 12, "width": 12}},
            "other inputs .*: images of 8x8 are resized by ",
        ),
    ],
)
@pytest.mark.parametrize("name", ["plain", "larger"])
def test_results_of_another_model_with_the_same_weights(name, file, fields, message, folders, capsys):
    """Whether they lie beside the model or are given."""
    change(folders / name / file, **fields)
    with pytest.raises(ValueError, match=f"results.json is of {message}.*Evaluate this model"):
        rebuild_card(open_repository(folders / name))
    with pytest.raises(SystemExit) as end:
        main(["card", str(folders / name), "--results", str(folders / f"{name}-results" / "results.json")])
    assert end.value.code == 1 and "results.json is of " in capsys.readouterr().err
    assert not (folders / name / "README.md").exists()


def test_results_from_before_the_network_was_kept(folders):
    """As those of the shelf are: nothing else can be known of them."""
    path = folders / "plain" / "results.json"
    results = json.loads(path.read_text())
    del results["identity"]["weights"]["network"]
    path.write_text(json.dumps(results))
    assert rebuild_card(open_repository(folders / "plain")).is_file()
    results["identity"]["weights"]["model"] = "0" * 32
    path.write_text(json.dumps(results))
    with pytest.raises(ValueError, match="is of other weights than those in the folder"):
        rebuild_card(open_repository(folders / "plain"))


@pytest.mark.parametrize("name", sorted(path.name for path in SHELF.iterdir()))
def test_the_shelf_keeps_its_figures(name, tmp_path):
    assert rebuild_card(open_repository(SHELF / name), tmp_path).is_file()


def test_photos_that_were_brought_to_the_size_before(folders):
    """Then results say of no resize, and the images have the size that the processor makes."""
    path = folders / "larger" / "results.json"
    results = json.loads(path.read_text())
    results["robustness"] |= {"image_size": [3, 16, 16], "resized": None}
    path.write_text(json.dumps(results))
    assert rebuild_card(open_repository(folders / "larger")).is_file()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_card_is_not_written_over_that_of_another_model(folders):
    """Nor are its results and figures."""
    plain, larger = folders / "plain", folders / "larger"
    rebuild_card(open_repository(larger))
    before = contents(larger)
    for given in ({}, {"results_file": folders / "plain-results" / "results.json"}):
        with pytest.raises(FileExistsError, match="larger holds the config.json of another model; give"):
            rebuild_card(open_repository(plain), larger, **given)
        (folders / "cards").mkdir()
        shutil.copy(larger / "results.json", folders / "cards")
        with pytest.raises(FileExistsError, match=r"cards.results.json is of another model.*give another folder"):
            rebuild_card(open_repository(plain), folders / "cards", **given)
        assert contents(folders / "cards") == {"results.json": before["results.json"]}
        shutil.rmtree(folders / "cards")
    shutil.copy(plain / "config.json", larger)
    with pytest.raises(FileExistsError, match="larger holds other weights"):
        rebuild_card(open_repository(plain), larger)
    shutil.copytree(plain, folders / "same")
    for _ in range(2):
        rebuild_card(open_repository(plain), folders / "same", **given)


def test_results_of_another_model_are_kept_aside(folders):
    """Where others are given in their place."""
    plain, given = folders / "plain", folders / "plain-results" / "results.json"
    shutil.copy(folders / "larger" / "results.json", plain)
    before = (plain / "results.json").read_bytes()
    rebuild_card(open_repository(plain), results_file=given)
    (kept,) = plain.glob("_results-of-*.json")
    assert kept.read_bytes() == before and kept.name not in published_files(plain)
    assert json.loads((plain / "results.json").read_text()) == json.loads(given.read_text())
    rebuild_card(open_repository(plain), results_file=given)  # these are its own
    assert [kept] == list(plain.glob("_results-of-*.json"))


def test_inspect_tells_whose_results_they_are(folders):
    rebuild_card(open_repository(folders / "larger"))
    found = inspect_model(open_repository(folders / "larger"), spectrum=False)
    assert found["metrics_from"] == "results.json" and "left_out" not in found
    shutil.copy(folders / "larger" / "README.md", folders / "plain")
    shutil.copy(folders / "larger" / "results.json", folders / "plain")
    found = inspect_model(open_repository(folders / "plain"), spectrum=False)
    assert "metrics" not in found  # nor those of the card that was made of them
    assert ("left out", "results.json is of other weights than those in the folder") in summary_rows(found)
    change(folders / "larger" / "config.json", num_attention_heads=1)
    found = inspect_model(open_repository(folders / "larger"), spectrum=False)
    assert "metrics" not in found and "in another network" in found["left_out"][0]
    (folders / "plain" / "README.md").write_text(
        "---\nmodel-index:\n- name: a\n  results:\n  - task: {type: image-classification}\n"
        "    dataset: {name: digits, type: digits}\n    metrics:\n    - {type: accuracy, value: 0.5}\n---\n# by hand\n"
    )
    assert inspect_model(open_repository(folders / "plain"), spectrum=False)["metrics_from"] == "README.md"
