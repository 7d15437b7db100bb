import ast
import json
import re
import shlex

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from tests.artifact.card.test_figures import report_dicts, vit_names
from tscnc_hf.artifact.card.card import write_card
from tscnc_hf.artifact.card.formatting import is_hub_id, without_paths


def attack(name, correct, n=360, **parameters):
    fraction = correct / n
    return {"name": name, "accuracy": fraction, "low": fraction - 0.02, "high": min(1.0, fraction + 0.015),
            "correct": correct, "n": n, "parameters": parameters}  # fmt: skip


def robustness_dict(clean=347, pgd=201):
    options = {"steps": 20, "step_size": 0.0125, "restarts": 1, "random_start": True, "loss": "cross-entropy"}
    return {"threat_model": {"norm": "linf", "epsilon": 0.1, "seed": 0}, "n": 360,
            "attacks": [attack("clean", clean), attack("pgd-20", pgd, **options)],
            "versions": {"torch": "2.14.1"}}  # fmt: skip


CONFIG = {
    "objective": "trades", "adversary": "kl-pgd", "epsilon": 0.1, "attack_steps": 10, "attack_step_size": None,
    "trades_beta": 6.0, "tsc_weight": 1e-4, "tsc_a": 1.0, "cnc_weight": 0.01, "cnc_ridge": 1e-3,
    "target_sparsity": 0.9, "pruning_start": 0.25, "pruning_end": 0.75, "pruning_scope": "global",
    "pruning_criterion": "magnitude", "pruning_exclude": [], "seed": 7, "learning_rate": 1e-3, "num_train_epochs": 10,
    "output_dir": "/home/someone/runs/digits", "hub_token": "hf_secret", "bad": float("nan"),
}  # fmt: skip
NAMES = vit_names(3)


def write(folder, **changes):
    sparsity, spectrum = report_dicts(NAMES, deficient=NAMES[:2], blocks=NAMES[:1])
    given = dict(
        model_name="someone/vit-digits", robustness=robustness_dict(), sparsity=sparsity, spectrum=spectrum,
        config=CONFIG, dataset_name="digits",
    )  # fmt: skip
    return write_card(folder, **(given | changes))


def row(text, label, more=""):
    line = next(line for line in text.splitlines() if re.match(rf"\| {re.escape(label)}{more} \|", line))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def metrics(card):
    return {result.metric_name: result for result in card.data.eval_results}


def test_figures_in_the_card_are_those_given(tmp_path):
    dense = dict(zip(("sparsity", "spectrum"), report_dicts(NAMES, seed=9), strict=True))
    dense["robustness"] = robustness_dict(355, 250)
    text = write(tmp_path, dense=dense).read_text(encoding="utf-8")
    sparsity, spectrum = report_dicts(NAMES, deficient=NAMES[:2], blocks=NAMES[:1])
    assert row(text, "Clean accuracy") == ["98.6 % (96.6 to 100.0 %)", "96.4 % (94.4 to 97.9 %)"]
    assert row(text, "Accuracy under PGD-20") == ["69.4 % (67.4 to 70.9 %)", "55.8 % (53.8 to 57.3 %)"]
    for label, key in (("prunable weights", "sparsity"), ("all parameters", "parameter_sparsity")):
        cells = row(text, f"Sparsity of the {label}" if "prunable" in label else f"Sparsity of {label}")
        assert cells == [f"{100 * report[key]:.1f} %" for report in (dense["sparsity"], sparsity)]
    medians = [s["median_effective_condition_number"] for s in (dense["spectrum"], spectrum)]
    assert [float(cell) for cell in row(text, "Median effective condition number")] == pytest.approx(medians, rel=5e-3)
    assert row(text, "Largest condition number")[1] == "∞"
    assert row(text, "Rank-deficient matrices") == [f"0 of {len(NAMES)}", f"2 of {len(NAMES) + 2}"]
    for weight in sparsity["rows"]:
        cells = row(text.replace("\N{NO-BREAK SPACE}", " "), rf"`{weight['name']}`", r"[^|]*")
        assert cells[:2] == ["64 × 64", f"{weight['zeros']:,} of 4,096"]
    assert "96.4 % of the clean test images" in text and "55.8 % when each image is attacked with PGD-20" in text


def test_sections_come_in_order_and_say_what_the_attacker_may_do(tmp_path):
    text = write(tmp_path, command="tscnc train --epsilon 8/255").read_text(encoding="utf-8")
    marks = ["# someone/vit-digits", "| Clean accuracy", "figures/layers.png", "## Threat model", "## How to load",
             "## How it was made", "tscnc train --epsilon 8/255", "All settings", "All 13 layers",
             "## What this model does not promise", "## Citation"]  # fmt: skip
    places = [text.index(mark) for mark in marks]
    assert places == sorted(places)
    threat = text[text.index("## Threat model") : text.index("## How to load")]
    for words in ("0.1 (25.5/255)", "L-infinity", "white-box", "Not covered", "another norm", "corruptions", "patches",
                  "upper bound", "not a certificate", "steps 20", "201 of 360"):  # fmt: skip
        assert words in threat
    assert "No speed-up by itself" in text and "2503.20454" in text and "1710.01878" in text
    assert "zhang2019theoretically" in text and "beta 6.0" in text


def test_front_matter_round_trips(tmp_path):
    given = {"base_model": "microsoft/resnet-18", "license": "mit", "tags": ["mine", "tscnc"]}
    path = write(tmp_path, dataset_name="uoft-cs/cifar10", **given)
    card = ModelCard.load(path)
    data = yaml.safe_load(card.data.to_yaml())
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "image-classification"
    assert data["license"] == "mit" and data["metrics"] == ["accuracy"] and data["datasets"] == ["uoft-cs/cifar10"]
    assert data["base_model"] == "microsoft/resnet-18" and data["tags"].count("tscnc") == 1 and "mine" in data["tags"]
    name, results = model_index_to_eval_results(data["model-index"])
    assert name == "someone/vit-digits" and results == card.data.eval_results
    assert eval_results_to_model_index(name, results) == data["model-index"]
    json.dumps(data, allow_nan=False)  # the Hub holds it as JSON


def test_notes_stand_under_the_table_and_beside_each_figure(tmp_path):
    notes = ["The images went through JPEG.", "The dense network: see /home/someone/runs/twin"]
    path = write(tmp_path, notes=notes)
    card, text = ModelCard.load(path), path.read_text(encoding="utf-8")
    shown = [notes[0], "The dense network: see twin"]  # no folder of this machine
    assert [line for line in text.splitlines() if line.startswith("**Note:** ")] == [f"**Note:** {n}" for n in shown]
    assert "".join(f"\n\n**Note:** {note}" for note in shown) + "\n\nIn brackets" in text
    assert text.index("| Clean accuracy") < text.index("**Note:**") < text.index("Wilson intervals")
    assert card.data.to_dict()["notes"] == shown
    assert all(result.dataset_args == {"notes": shown} for result in card.data.eval_results)
    assert "**Note:**" not in write(tmp_path).read_text(encoding="utf-8")


def test_model_index_holds_accuracies_with_their_attack_sparsity_and_condition_number(tmp_path):
    found = metrics(ModelCard.load(write(tmp_path)))
    sparsity, spectrum = report_dicts(NAMES, deficient=NAMES[:2], blocks=NAMES[:1])
    assert found["Clean accuracy"].metric_value == pytest.approx(347 / 360)
    pgd = found["Robust accuracy under PGD-20 (linf, epsilon 0.1)"]
    assert pgd.metric_type == "accuracy" and pgd.metric_value == pytest.approx(201 / 360)
    assert pgd.metric_args["steps"] == 20 and pgd.metric_args["epsilon"] == 0.1 and pgd.metric_args["n"] == 360
    assert found["Sparsity of the prunable weights"].metric_value == pytest.approx(sparsity["sparsity"])
    assert found["Sparsity of all parameters"].metric_value == pytest.approx(sparsity["parameter_sparsity"])
    median = spectrum["median_effective_condition_number"]
    assert found["Median effective condition number"].metric_value == pytest.approx(median)
    assert {result.dataset_type for result in found.values()} == {"digits"}


def test_card_in_mid_training_has_no_accuracy(tmp_path):
    path = write(tmp_path, robustness=None)
    card, text = ModelCard.load(path), path.read_text(encoding="utf-8")
    assert {result.metric_type for result in card.data.eval_results} == {"sparsity", "condition_number"}
    assert card.data.metrics is None
    assert row(text, "Clean accuracy") == ["not evaluated yet"]
    assert "Robustness is not evaluated yet" in text and "Wilson" not in text


def test_plain_data_set_and_local_folders_stay_out_of_datasets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "flowers").mkdir(parents=True)
    for name, shown in (("digits", "digits"), ("data/flowers", "data/flowers"), ("/srv/big/flowers", "flowers")):
        card = ModelCard.load(write(tmp_path / "card", dataset_name=name, base_model="/srv/models/base"))
        assert card.data.datasets is None and card.data.base_model is None
        assert {result.dataset_name for result in card.data.eval_results} == {shown}


def test_nothing_of_the_machine_and_nothing_empty_is_shown(tmp_path):
    path = write(
        tmp_path / "card",
        command=f"python recipes/vit.py --output_dir={tmp_path}/out --hub_token hf_secret --config ./configs/a.yaml",
        dataset_name=f"{tmp_path}/flowers",
        base_model="/home/someone/base",
        notes=["Trained from /mnt/disk/images."],
        class_names=["a", "b"],
        versions={"torch": "2.14.1", "missing": None},
    )
    text = path.read_text(encoding="utf-8")
    for trace in (str(tmp_path), "/home/", "/mnt/", "hf_secret", "hub_token"):
        assert trace not in text
    assert not re.search(r"\b(None|nan|NaN|null|undefined)\b", text) and "{{" not in text and "{%" not in text
    assert "--output_dir=out --config ./configs/a.yaml" in text
    assert sorted(p.name for p in path.parent.rglob("*") if p.is_file()) == ["README.md", "layers.png"]


def test_paths_are_cut_and_the_rest_is_left():
    assert without_paths("a=/home/me/x y") == "a=x y"
    assert without_paths(r"C:\Users\me\x ~/y file:///srv/z") == "x y z"
    for kept in ("8/255", "https://huggingface.co/a/b", "recipes/configs/a.yaml", "../a/b", "</details>", "a / b"):
        assert without_paths(kept) == kept


def test_hub_ids():
    assert is_hub_id("uoft-cs/cifar10") and is_hub_id("timm/resnet18.a1_in1k")
    for name in ("digits", "./data", "/srv/data", "a/b/c", None, ""):
        assert not is_hub_id(name)


def test_load_snippets_are_python_and_need_transformers_alone(tmp_path):
    text = write(tmp_path, model_name='odd "name"').read_text(encoding="utf-8")
    stock, packed, fast = (ast.parse(code) for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    assert len(stock.body) == 3 and stock.body[0].module == "transformers"
    assert len(packed.body) == 2 and packed.body[0].module == "tscnc_hf"
    assert all(statement.value.args[0].value == 'odd "name"' for statement in stock.body[1:] + packed.body[1:])
    assert len(fast.body) == 2 and fast.body[0].names[0].name == "sparse_compile"


def test_a_folder_without_dense_weights_is_loaded_from_its_packed_file(tmp_path):
    text = write(tmp_path, sizes={"sparse_bytes": 160_000, "limit_bytes": 150_000}).read_text(encoding="utf-8")
    packed, fast = (ast.parse(code) for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    names = [alias.name for statement in packed.body[:2] for alias in statement.names]
    assert names == ["AutoImageProcessor", "load_sparse"] and len(fast.body) == 2
    assert "AutoModelForImageClassification" not in text and "tscnc unpack" in text
    assert row(text, "packed, `model.sparse.safetensors`") == ["160 kB"]
    assert "| weights | size |\n| --- | ---: |\n" in text  # no column of shares of what is not there


def test_settings_that_were_not_used_are_not_claimed(tmp_path):
    plain = {"objective": "natural", "adversary": "none", "tsc_weight": 0.0, "cnc_weight": 0.0, "target_sparsity": 0.0}
    card = ModelCard.load(write(tmp_path, config=plain))
    assert "clean images, without an adversary" in card.text and "This run pruned no weight" in card.text
    assert (
        "zhang2019" not in card.text and "1710.01878" not in card.text and "adversarial-training" not in card.data.tags
    )
    unknown = write(tmp_path, config={}).read_text(encoding="utf-8")
    assert "were not recorded" in unknown and "pruned no weight" not in unknown and "All settings" not in unknown


def test_settings_are_all_there_as_yaml(tmp_path):
    text = write(tmp_path).read_text(encoding="utf-8")
    settings = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    kept = {k: v for k, v in CONFIG.items() if k not in ("hub_token", "bad", "attack_step_size")}
    assert settings == kept | {"output_dir": "digits"}


@pytest.mark.usefixtures("drawn_figures")
def test_sizes_classes_and_training_figure_when_given(tmp_path):
    sizes = {"dense_bytes": 800_000, "sparse_bytes": 160_000, "limit_bytes": 150_000}
    log = [{"loss": 1.0 / s, "step": s} for s in range(1, 9)]
    text = write(tmp_path, sizes=sizes, log_history=log, class_names=list("abc")).read_text(encoding="utf-8")
    assert row(text, "dense, `model.safetensors`") == ["800 kB", "100.0 %"]
    assert row(text, "packed, `model.sparse.safetensors`") == ["160 kB", "20.0 %"]
    assert row(text, "zeros' places at their entropy, values stored raw") == ["150 kB", "18.8 %"]
    assert "(3 classes)" in text
    assert "figures/training.png" in text and (tmp_path / "figures" / "training.png").stat().st_size > 10_000


def test_infinite_medians_are_shown_and_kept_out_of_the_metadata(tmp_path):
    sparsity, spectrum = report_dicts(NAMES, deficient=NAMES)
    spectrum |= {"median_condition_number": "inf", "median_effective_condition_number": "inf"}
    path = write(tmp_path, spectrum=spectrum)
    assert row(path.read_text(encoding="utf-8"), "Median effective condition number") == ["∞"]
    assert "Median effective condition number" not in metrics(ModelCard.load(path))


def test_reports_read_back_from_json_give_the_same_card(tmp_path):
    sparsity, spectrum = report_dicts(NAMES, deficient=NAMES[:2], blocks=NAMES[:1])
    first = write(tmp_path / "a").read_bytes()
    reports = json.loads(json.dumps({"sparsity": sparsity, "spectrum": spectrum, "robustness": robustness_dict()}))
    assert write(tmp_path / "b", **reports).read_bytes() == first


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"sparsity": {"rows": []}}, "sparsity lacks prunable"), ({"model_name": " "}, "model_name"),
     ({"robustness": {"n": 3}}, "robustness lacks threat_model, attacks")],
)  # fmt: skip
def test_what_is_missing_is_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path, **changes)
    assert not (tmp_path / "README.md").exists()


def test_a_long_command_is_one_that_a_shell_takes(tmp_path):
    options = [f"--option_{letter} value" for letter in "abcdefghij"]
    text = write(tmp_path, command=" ".join(["python train.py", *options])).read_text(encoding="utf-8")
    shown = re.search(r"```bash\n(.*?)\n```", text, re.DOTALL)[1]
    assert shown.count("\n") == 10 and max(map(len, shown.splitlines())) < 40
    assert shlex.split(shown.replace("\\\n", "")) == ["python", "train.py", *" ".join(options).split()]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "(criterion: magnitude; ranked over the whole network) are set to zero, step by step, with a cubic"),
        ({"pruning_schedule": "one-shot", "pruning_scope": "erk"}, "Erdos-Renyi-kernel) are set to zero, 90.0 % of"),
        (
            {"pruning_schedule": "one-shot"},
            "are set to zero, 90.0 % of them at once, after 25.0 % of training, and chosen anew until 75.0 %.",
        ),
        ({"pruning_end": 0.25}, "are set to zero, 90.0 % of them at once, after 25.0 % of training.\n"),
        ({"pruning_structure": "2:4", "pruning_criterion": "taylor"}, "(criterion: taylor; ranked over the whole"),
    ],
)
def test_how_weights_were_pruned_is_told(tmp_path, changes, words):
    text = write(tmp_path, config=CONFIG | changes).read_text(encoding="utf-8")
    assert words in text and ("pattern 2:4" in text) == ("pruning_structure" in changes)


def test_the_metadata_passes_the_checks_of_the_hub(tmp_path, hub):
    for name, changes in (("a", {}), ("b", {"robustness": None, "dataset_name": None})):
        card = ModelCard.load(write(tmp_path / name, **changes))
        card.validate()
        data = yaml.safe_load(card.data.to_yaml())
        name, results = model_index_to_eval_results(data["model-index"])
        assert results == card.data.eval_results and results
        again = ModelCardData(model_name=name, eval_results=results)
        assert yaml.safe_load(again.to_yaml())["model-index"] == data["model-index"]
    assert len(hub.requests("validate-yaml")) == 2


# ---- uneven classes ----


def classes_dict(count: int, collapsed: bool = False) -> dict:
    """Of `count` classes with 10 images each; class i is right for 9 - i % 9 of them, and taken for the next one."""
    per_class = {str(i): {"n": 10, "clean": 10, "pgd-20": 9 - i % 9} for i in range(count)}
    confusion = {str(i): {str(i): 9 - i % 9, str((i + 1) % count): 1 + i % 9} for i in range(count)}
    found = robustness_dict() | {"per_class": per_class, "confusion": confusion, "worst_case": None}
    for place, one in enumerate(found["attacks"]):
        one |= {"balanced_accuracy": 0.5 - place / 4, "worst_class": {"label": 8, "accuracy": 0.1, "n": 10}}
    return found


def test_uneven_classes_are_shown_with_what_they_are_taken_for(tmp_path):
    names = [f"kind|{i}" for i in range(9)]
    text = write(
        tmp_path, robustness=classes_dict(9), class_names=names, config=CONFIG | {"class_weights": "balanced"}
    ).read_text(encoding="utf-8")
    assert row(text, "Balanced accuracy, clean") == ["50.0 %"]
    assert row(text, "Balanced accuracy under attack") == ["25.0 %"]
    assert "| Worst class under attack | 10.0 % (kind\\|8, 10 images) |" in text
    assert "| kind\\|8 | 10 | 100.0 % | 10.0 % | kind\\|0 (9) |" in text
    assert "| kind\\|1 |  | 8 | 2 |  |  |  |  |  |  |" in text and "Each class counted alike" in text


def test_a_line_break_in_the_name_of_a_class_breaks_no_table(tmp_path):
    names = [f"two\n\n lines|{i}" for i in range(9)]
    text = write(tmp_path, robustness=classes_dict(9), class_names=names).read_text(encoding="utf-8")
    assert "| two lines\\|8 | 10 | 100.0 % | 10.0 % | two lines\\|0 (9) |" in text
    assert "(two lines\\|8, 10 images) |" in text and "**Classes.** two lines|0, two lines|1, " in text


def test_of_many_classes_those_that_fare_worst_are_shown(tmp_path):
    text = write(tmp_path, robustness=classes_dict(1000)).read_text(encoding="utf-8")
    assert text.count("| 100.0 % | 10.0 % |") == 20 and "980 more are in `results.json`" in text
    assert "| true class |" not in text and "Each class counted alike" not in text


@pytest.mark.parametrize("found", [{"class": 1, "share": 1.0, "largest_class": 0.71}, {"constant": True}])
def test_a_collapsed_network_is_called_so_in_the_first_line(found, tmp_path):
    text = write(tmp_path, collapsed=found | {"emptied": ["stem.weight"]}).read_text(encoding="utf-8")
    first = text.split("# someone/vit-digits\n")[1].strip().splitlines()[0]
    assert first.startswith("**The network has collapsed: it ") and "zero throughout: stem.weight.**" in first


def test_what_is_said_of_training_is_true_at_the_ends_of_its_options(tmp_path):
    settings = {"objective": "pgd-at", "adversary": "n-fgsm", "epsilon": 0.1, "target_sparsity": 0.5}
    settings |= {"pruning_start": 0.25, "pruning_end": 1.0}
    card = write(tmp_path, config=settings).read_text()
    assert "noise of up to 0.2 (51/255), then a step of 0.1 (25.5/255), not" in card and "`n-fgsm`, within" not in card
    assert "with no fine-tuning after it" in card and "the rest of training" not in card
    card = write(tmp_path, config=settings | {"adversary": "pgd", "epsilon": 0.0, "pruning_end": 0.5}).read_text()
    assert "trained on clean images" in card and "saw adversarial images" not in card
    assert "- adversarial-training" not in card and "the rest of training fine-tunes" in card
