"""The shelf: every folder of recipes/models can be picked up without a network, and is what its card says."""

import json
import socket
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests.results_page import check_results
from tscnc_hf import evaluate_robustness, load_sparse, sparsity_report
from tscnc_hf.artifact.card.formatting import format_bytes
from tscnc_hf.artifact.files.identity import RunIdentity, weights_digest
from tscnc_hf.artifact.files.network import other_part
from tscnc_hf.artifact.packed.limit import storage_limit
from tscnc_hf.artifact.repository.inspection import inspect_model
from tscnc_hf.artifact.repository.opening import open_repository, published_files, read_tensors
from tscnc_hf.artifact.repository.push import push_folder
from tscnc_hf.data.loading import load_image_data


SHELF = Path(__file__).parents[2] / "recipes" / "models"
MODELS = sorted(path.name for path in SHELF.iterdir())
PACKED = "model.sparse.safetensors"
ALWAYS = {PACKED, "config.json", "results.json", "tscnc_config.json", "README.md", "figures/layers.png"}
MAY = {"preprocessor_config.json", *(f"figures/{name}.png" for name in ("training", "security_curve"))}
MAY |= {"figures/adversarial_examples.png"}
LOT = 6_000_000  # bytes, all of it
ATTACKS = {"clean", "pgd-20", "autoattack"}
NOT_YET = {
    "cnn-wide-cifar10-99": {"autoattack"},
    "vit-wide-cifar10-99": {"autoattack"},
}  # which docs/results.md says, and its card


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    connect = socket.socket.connect

    def connect_here(self, address):
        assert address[0] == "127.0.0.1", f"a connection to {address}"
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_here)


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def results_of(name: str) -> dict:
    return json.loads((SHELF / name / "results.json").read_text(encoding="utf-8"))


def counts(results: dict) -> dict[str, int]:
    return {attack["name"]: attack["correct"] for attack in results["robustness"]["attacks"]}


def test_models_lie_there_and_are_small():
    assert "vit-digits-90" in MODELS
    assert sum(path.stat().st_size for path in SHELF.rglob("*") if path.is_file()) <= LOT


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_is_complete_and_has_no_dense_file_and_no_pickle(name):
    found = files(SHELF / name)
    assert ALWAYS <= found <= ALWAYS | MAY
    assert set(published_files(SHELF / name)) == found


@pytest.mark.parametrize("name", MODELS)
def test_it_loads_as_the_model_that_was_measured(name):
    folder, results = SHELF / name, results_of(name)
    model = load_sparse(folder)
    assert other_part(RunIdentity.from_dict(results["identity"]), model) is None
    zeros, recorded = sparsity_report(model), results["sparsity"]
    assert (zeros.zeros, zeros.prunable) == (recorded["zeros"], recorded["prunable"]) and zeros.zeros > 0
    size = (folder / PACKED).stat().st_size
    tensors = read_tensors(folder)
    rounded = json.loads((folder / "tscnc_config.json").read_text()).get("value_dtype") is not None
    assert size < storage_limit(tensors) * (0.75 if rounded else 1.05) + 20_000  # names and shapes
    shown = inspect_model(open_repository(folder), spectrum=False)
    assert shown["sizes"]["sparse_bytes"] == size and "dense_bytes" not in shown["sizes"]
    assert [metric["value"] for metric in shown["metrics"]][:1] == [results["robustness"]["attacks"][0]["accuracy"]]


@pytest.mark.parametrize("name", MODELS)
def test_its_figures_are_whole(name):
    """All of AutoAttack, on a thousand test images or all that there are; the dense network against the same."""
    results = results_of(name)
    check_results(results)
    assert ATTACKS - counts(results).keys() == NOT_YET.get(name, set())
    n, dense = results["robustness"]["n"], results["dense"]
    assert n >= 1000 or (results["dataset"], n) == ("digits", 359)
    assert counts(dense).keys() == counts(results).keys() and dense["robustness"]["n"] == n
    assert results["collapsed"] is None
    if name in NOT_YET:
        return
    assert results["robustness"]["worst_case"] is not None
    (attack,) = (one for one in results["robustness"]["attacks"] if one["name"] == "autoattack")
    assert attack["correct"] <= counts(results)["clean"] and attack["parameters"]["version"]
    assert results["robustness"]["masking"]["suspicious"] is False


@pytest.mark.parametrize("name", MODELS)
def test_its_card_says_what_the_folder_holds(name):
    folder, results = SHELF / name, results_of(name)
    card = ModelCard.load(folder / "README.md")
    shown = {result.metric_args["attack"]: result for result in card.data.eval_results if result.metric_args}
    for attack in results["robustness"]["attacks"]:
        assert shown[attack["name"]].metric_value == attack["accuracy"]
        assert shown[attack["name"]].metric_args["n"] == attack["n"]
    assert f'load_sparse("{name}")' in card.text and "from_pretrained" in card.text
    assert "AutoModelForImageClassification" not in card.text  # which finds no dense weights here
    assert format_bytes((folder / PACKED).stat().st_size) in card.text
    program, script = json.loads((folder / "tscnc_config.json").read_text())["command"].split()[:2]
    assert program == "python" and (SHELF.parents[1] / script).is_file() and f"python {script}" in card.text
    for figure in files(folder):
        if figure.startswith("figures/"):
            assert f"({figure})" in card.text


@pytest.mark.parametrize("name", MODELS)
def test_it_can_be_pushed_and_loaded_from_there(name, hub):
    push_folder(SHELF / name, f"tester/{name}")
    assert hub.files(f"tester/{name}") == {*files(SHELF / name), ".gitattributes"}
    assert weights_digest(load_sparse(f"tester/{name}")) == weights_digest(load_sparse(SHELF / name))


@pytest.mark.parametrize("name", [name for name in MODELS if results_of(name)["dataset"] == "digits"])
def test_the_published_counts_come_again(name):
    """Within two images: another kind of CPU rounds otherwise."""
    robustness = results_of(name)["robustness"]
    channels = {1: "grey", 3: "rgb"}[robustness["image_size"][0]]
    data = load_image_data("digits", channels=channels, augmentation="none")
    how = {"masking": False, "progress": False, **robustness["threat_model"]}
    again = evaluate_robustness(SHELF / name, data.test, ["clean", "pgd-20"], **how)
    assert again.n == robustness["n"]
    for attack in ("clean", "pgd-20"):
        assert abs(again[attack].correct - counts(results_of(name))[attack]) <= 2
