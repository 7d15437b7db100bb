"""The card that a run leaves: held against a pattern, rebuilt from the folder alone, with the command that was run."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import ConcatDataset, Subset

from tests.results_page import check_results
from tscnc_hf.artifact.models.building import timm_model
from tscnc_hf.artifact.models.loading import load_slim
from tscnc_hf.artifact.repository.opening import open_repository
from tscnc_hf.artifact.repository.recard import rebuild_card
from tscnc_hf.cli.recipe import command_line
from tscnc_hf.data.identity import dataset_name, dataset_split
from tscnc_hf.training.publisher import Publisher


PATTERN = Path(__file__).parent / "model_card_pattern.md"
NUMBER = r"(?:-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?|∞)"


@pytest.fixture
def run_folder(build, make_trainer, digits, tmp_path):
    options = {"adversary": "fgsm-rs", "objective": "pgd-at", "max_steps": 8, "logging_steps": 4, "seed": 3}
    trainer = make_trainer(build("vit"), tsc_a=1.0, **options)
    trainer.publisher.keep(dataset_name="digits", command="python train.py --max_steps 8")
    trainer.train()
    results = trainer.test(digits.test.subset(range(24)), attacks=("clean", "pgd-5", "fgsm"))
    # which text is shown must not hang on eight steps of training
    for check in results["robustness"]["masking"]["checks"]:
        check["passed"] = True
    results["collapsed"] = None
    classes = results["robustness"]["per_class"]
    results["robustness"]["confusion"] = {label: {label: row["n"]} for label, row in classes.items()}
    trainer.save_model()
    return tmp_path / "out"


def matches(pattern: str, text: str) -> str:
    """Empty if each line of the text fits the pattern's, where <n> holds a number and <w> a word; else the first."""
    lines, expected = text.splitlines(), pattern.splitlines()
    for line, form in zip(lines, expected, strict=False):
        parts = re.split(r"(<n>|<w>)", form)
        expression = "".join({"<n>": NUMBER, "<w>": r"\S+"}.get(part, re.escape(part)) for part in parts)
        if not re.fullmatch(expression, line):
            return f"{line!r} is not {form!r}"
    return "" if len(lines) == len(expected) else f"{len(lines)} lines, not {len(expected)}"


def test_the_card_fits_its_pattern_and_is_rebuilt_from_the_folder(run_folder):
    text = (run_folder / "README.md").read_text(encoding="utf-8")
    pattern = PATTERN.read_text(encoding="utf-8")
    shown = re.sub(r"```yaml\n.*?```", "```yaml\n```", text, flags=re.DOTALL)  # every option: another test
    assert matches(pattern, shown) == ""
    assert matches(pattern, shown.replace("Not covered", "Covered")) and matches(pattern, shown + "\n")  # it can fail

    results = json.loads((run_folder / "results.json").read_text())
    check_results(results)
    metrics = {result.metric_name: result for result in ModelCard(text).data.eval_results}
    for attack in results["robustness"]["attacks"][1:]:
        label = attack["name"].upper()
        entry = metrics[f"Robust accuracy under {label} (linf, epsilon 0.1)"]
        assert entry.metric_value == attack["accuracy"] and entry.metric_args["correct"] == attack["correct"]
        assert all(entry.metric_args[key] == value for key, value in attack["parameters"].items())
    worst = metrics["Robust accuracy, worst case of the attacks (linf, epsilon 0.1)"]
    assert worst.metric_value == results["robustness"]["worst_case"]["accuracy"]
    for which in ("median", "max"):
        name = {"median": "Median", "max": "Largest"}[which] + " effective condition number"
        value = results["spectrum"][f"{which}_effective_condition_number"]
        assert metrics[name].metric_value == pytest.approx(value, rel=1e-9)

    rebuilt = rebuild_card(open_repository(run_folder))
    assert rebuilt == run_folder / "README.md" and rebuilt.read_text(encoding="utf-8") == text


def test_settings_without_effect_are_not_listed(run_folder):
    text = (run_folder / "README.md").read_text(encoding="utf-8")
    settings = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    assert settings["adversary"] == "fgsm-rs" and settings["pruning_interval"] == 1
    assert not {"attack_steps", "trades_beta", "awp_start", "gate_drop_rate"} & settings.keys()
    assert "1 steps" not in text
    assert json.loads((run_folder / "tscnc_config.json").read_text())["attack_steps"] == 1  # all of them are here


@pytest.mark.parametrize(
    "environment, command",
    [
        ({}, "python train.py --model_args '{\"depth\": 2}'"),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, "accelerate launch train.py --model_args '{\"depth\": 2}'"),
        (
            {"ACCELERATE_MIXED_PRECISION": "no", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"},
            "accelerate launch --num_processes 2 train.py --model_args '{\"depth\": 2}'",
        ),
        (
            {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"},
            "torchrun --nproc_per_node 4 train.py --model_args '{\"depth\": 2}'",
        ),
    ],
)
def test_the_command_is_the_one_that_was_run(environment, command, monkeypatch):
    for name in ("ACCELERATE_MIXED_PRECISION", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train.py", "--model_args", '{"depth": 2}'])
    assert command_line() == command


@pytest.mark.parametrize(
    "token", [["--hub_token", "hf_abcdefgh"], ["--hub_token=hf_abcdefgh"], ["--api_token", "two words"]]
)
def test_a_token_that_was_typed_is_not_in_the_command(token, monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py", "--push_to_hub", *token, "--seed", "1"])
    assert command_line() == "python train.py --push_to_hub --seed 1"


# ---- licences that somebody named, and no others ----


def front_matter(path):
    return yaml.safe_load(path.read_text(encoding="utf-8").split("---")[1])


def publisher(make_config):
    return Publisher(make_config(target_sparsity=0.0), [0.5] * 3, [0.25] * 3)


def test_nobody_named_a_licence(build, make_config, tmp_path):
    model, _ = build("vit")
    model.save_pretrained(tmp_path)
    publishing = publisher(make_config)
    publishing.write_extras(tmp_path, model)
    path = publishing.write_card(tmp_path, model, None, [])
    assert "license" not in front_matter(path)
    assert "license" not in front_matter(rebuild_card(open_repository(tmp_path)))
    publishing.keep(license="mit")
    publishing.write_extras(tmp_path, model)
    assert front_matter(publishing.write_card(tmp_path, model, None, []))["license"] == "mit"
    assert front_matter(rebuild_card(open_repository(tmp_path)))["license"] == "mit"


def test_what_was_given_to_a_card_outlives_the_next_one(build, make_config, tmp_path):
    """A push writes the card again; what the run recorded is not what was said later."""
    model, _ = build("vit")
    model.save_pretrained(tmp_path)
    publishing = publisher(make_config)
    publishing.keep(license="mit", notes=["Of the run."])
    publishing.write_extras(tmp_path, model)
    publishing.write_card(tmp_path, model, None, [])
    found = front_matter(rebuild_card(open_repository(tmp_path)))
    assert (found["license"], found["notes"]) == ("mit", ["Of the run."])
    rebuild_card(open_repository(tmp_path), license="apache-2.0", notes=["Of a\n  reader.", " "])
    found = front_matter(rebuild_card(open_repository(tmp_path)))
    assert (found["license"], found["notes"]) == ("apache-2.0", ["Of a reader."])
    rebuild_card(open_repository(tmp_path), notes=[""])
    for _ in range(2):  # that there are none was given, too
        found = front_matter(rebuild_card(open_repository(tmp_path)))
        assert not found.get("notes") and "**Note:**" not in (tmp_path / "README.md").read_text()
    card = (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text(
        card.replace("tags:\n", "notes: By hand.\ntags:\n- mine\n", 1).replace("notes: []\n", "")
    )
    for _ in range(2):
        found = front_matter(rebuild_card(open_repository(tmp_path)))
        assert found["notes"] == ["By hand."] and found["tags"].count("mine") == 1


@pytest.mark.parametrize("form", ["{}", "./{}", "{}/"])
def test_a_base_model_in_a_folder_is_no_model_on_the_hub(form, build, make_config, tmp_path, monkeypatch):
    """Also where the card is written from another directory, in which there is no such folder."""
    base, run = tmp_path / "someone" / "my-dense", tmp_path / "run"
    build("vit")[0].save_pretrained(base)
    monkeypatch.chdir(tmp_path)
    model = load_slim(form.format("someone/my-dense"))
    model.save_pretrained(run)
    publishing = publisher(make_config)
    publishing.write_extras(run, model)
    cards = [publishing.write_card(run, model, None, []).read_text()]
    monkeypatch.chdir(run)
    cards.append(rebuild_card(open_repository(run)).read_text())
    for text in cards:
        assert "Training started from `my-dense`." in text and "someone" not in text
        assert "base_model" not in yaml.safe_load(text.split("---")[1])


def test_a_card_whose_front_matter_cannot_be_read_is_named(run_folder):
    path = run_folder / "README.md"
    path.write_text(path.read_text(encoding="utf-8").replace("---\n", "---\nlicense: mit: apache\n", 1))
    with pytest.raises(ValueError, match="README.md: its front matter can not be read"):
        rebuild_card(open_repository(run_folder))


def of_other_data(folder, path, name):
    path.write_text(json.dumps(json.loads((folder / "results.json").read_text()) | {"dataset": name}))
    return path


def test_figures_are_credited_to_the_data_that_they_are_of(run_folder, tmp_path):
    """And the notes on the images of training are not said of others."""
    settings = json.loads((run_folder / "tscnc_config.json").read_text())
    (run_folder / "tscnc_config.json").write_text(json.dumps(settings | {"notes": ["Eight pixels."]}))
    assert front_matter(rebuild_card(open_repository(run_folder)))["notes"] == ["Eight pixels."]
    other = of_other_data(run_folder, tmp_path / "other.json", "someone/other-digits")
    for given in ({"results_file": other}, {}):  # the second time from what lies there by now
        rebuild_card(open_repository(run_folder), **given)
        text, found = (run_folder / "README.md").read_text(), front_matter(run_folder / "README.md")
        assert {r["dataset"]["name"] for r in found["model-index"][0]["results"]} == {"someone/other-digits"}
        assert "for [someone/other-digits]" in text and "measured, on someone/other-digits" in text
        assert "It was trained on digits; the figures above are of someone/other-digits." in text
        assert "Eight pixels." not in text and "datasets" not in found
    results = of_other_data(run_folder, tmp_path / "again.json", "digits")
    text = rebuild_card(open_repository(run_folder), results_file=results).read_text()
    assert "other-digits" not in text and "It was trained on" not in text and "**Note:** Eight pixels." in text


def test_classes_are_shown_by_number_whatever_their_order_in_the_file(run_folder):
    config = json.loads((run_folder / "config.json").read_text())
    before = rebuild_card(open_repository(run_folder)).read_text()
    names = config["id2label"]
    config["id2label"] = {key: names[key] for key in sorted(names, reverse=True)}
    (run_folder / "config.json").write_text(json.dumps(config))
    assert rebuild_card(open_repository(run_folder)).read_text() == before


def test_a_name_that_is_a_path_is_not_another_name(run_folder):
    settings = json.loads((run_folder / "tscnc_config.json").read_text())
    (run_folder / "tscnc_config.json").write_text(json.dumps(settings | {"dataset_name": "/home/me/digits"}))
    (run_folder / "results.json").unlink()
    texts = [rebuild_card(open_repository(run_folder)).read_text() for _ in range(2)]
    assert texts[0] == texts[1] and "It was trained on" not in texts[0]
    text = rebuild_card(open_repository(run_folder), dataset_name="you/digits").read_text()
    assert "datasets:\n- you/digits" in text and "It was trained on" not in text  # nothing was measured


def test_examples_of_another_evaluation_are_not_shown(run_folder, tmp_path):
    assert "adversarial_examples.png" in rebuild_card(open_repository(run_folder)).read_text()
    other = of_other_data(run_folder, tmp_path / "other.json", "letters")
    for given in ({"results_file": other}, {}):
        text = rebuild_card(open_repository(run_folder), **given).read_text()
        assert "adversarial_examples.png" not in text


def test_a_name_that_was_given_to_data_is_theirs_only(run_folder, tmp_path):
    given = {"dataset_name": "you/digits", "notes": ["Scanned."]}
    for more in (given, {}):  # what was given outlives the next writing
        text = rebuild_card(open_repository(run_folder), **more).read_text()
        found = yaml.safe_load(text.split("---")[1])
        assert found["datasets"] == ["you/digits"] and "for [you/digits]" in text and "It was trained on" not in text
        assert found["notes"] == ["Scanned."]
    other = of_other_data(run_folder, tmp_path / "other.json", "letters")
    text = rebuild_card(open_repository(run_folder), results_file=other).read_text()
    assert "you/digits" not in text and "Scanned." not in text and "measured, on letters" in text


@pytest.mark.parametrize("text", ["[]", "{}"])
def test_a_file_without_results_takes_nothing_away(text, run_folder, tmp_path):
    (tmp_path / "empty.json").write_text(text)
    before = (run_folder / "results.json").read_bytes()
    with pytest.raises(ValueError, match="empty.json holds no results"):
        rebuild_card(open_repository(run_folder), results_file=tmp_path / "empty.json")
    assert (run_folder / "results.json").read_bytes() == before


@pytest.mark.parametrize("licence", ["cc-by-nc-4.0", None])
def test_weights_of_timm_have_their_own_licence(licence, monkeypatch, make_config, tmp_path):
    def downloaded(name, pretrained=False, **options):
        model = original(name, **options)
        model.pretrained_cfg = dict(model.pretrained_cfg, license=licence, hf_hub_id="timm/resnet18.some")
        return model

    original = timm.create_model
    monkeypatch.setattr(timm, "create_model", downloaded)
    small = {"channels": [8, 8, 8, 8], "layers": [1, 1, 1, 1]}
    for pretrained in (True, False):
        model, _ = timm_model("resnet18", ["a", "b"], (8, 8), model_args=small, pretrained=pretrained)
        folder = tmp_path / str(pretrained)
        model.save_pretrained(folder)
        publishing = publisher(make_config)
        publishing.write_extras(folder, model)
        for path in (publishing.write_card(folder, model, None, []), rebuild_card(open_repository(folder))):
            found = front_matter(path)
            assert found.get("license") == (licence if pretrained else None)
            assert found.get("base_model") == ("timm/resnet18.some" if pretrained else None)


# ---- modules that no library builds from a folder ----


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("kind", ["timm", "torch"])
def test_a_card_of_a_plain_module_says_how_it_is_loaded(kind, make_config, tmp_path, monkeypatch):
    model = timm.create_model("test_resnet", num_classes=2) if kind == "timm" else Own()
    folder = tmp_path / "plain"
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    text = publisher(make_config).write_card(folder, model, None, []).read_text(encoding="utf-8")
    for wrong in ("from_pretrained", "load_sparse(", "library_name: transformers", "With transformers alone"):
        assert wrong not in text
    (code,) = re.findall(r"## How to load\n.*?```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    namespace = {"Own": Own}
    exec(code, namespace)
    assert all(torch.equal(a, b) for a, b in zip(namespace["model"].parameters(), model.parameters(), strict=True))


def of_the_hub(repository: str | None, **info) -> datasets.Dataset:
    """As `datasets` gives one: what it knows is in `info`."""
    rows = {"pixel_values": [torch.full((3, 8, 8), 0.5).tolist()] * 4, "labels": [0, 1, 2, 3]}
    made = datasets.Dataset.from_dict(rows).with_format("torch")
    sources = [f"hf://datasets/{repository}@0b27149/data/train-0.parquet"] if repository else []
    for name, value in (info | {"download_checksums": {source: {} for source in sources}}).items():
        setattr(made.info, name, value)
    return made


def of_train():
    made = datasets.Dataset.from_dict({"label": [0] * 8}, split=datasets.Split.TRAIN)
    made.info.splits = datasets.SplitDict({"train": datasets.SplitInfo("train", num_examples=8)})
    return made


CIFAR = {"dataset_name": "cifar10", "builder_name": "parquet"}


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda digits: digits.train.subset(range(8)), "digits"),
        (lambda digits: Subset(digits.train, range(8)), "digits"),
        (lambda digits: of_the_hub("uoft-cs/cifar10", **CIFAR), "uoft-cs/cifar10"),
        (lambda digits: of_the_hub("uoft-cs/cifar10", **CIFAR).shuffle(0).select([0, 1, 2]), "uoft-cs/cifar10"),
        (lambda digits: of_the_hub(None, **CIFAR), "cifar10"),
        (lambda digits: ConcatDataset([of_the_hub(None, **CIFAR), of_the_hub(None, **CIFAR)]), "cifar10"),
        (lambda digits: ConcatDataset([of_the_hub(None, **CIFAR), digits.train]), None),
        (lambda digits: of_the_hub(None, dataset_name="imagefolder", builder_name="imagefolder"), None),
        (lambda digits: of_the_hub(None), None),
        (lambda digits: [{"pixel_values": torch.rand(3, 8, 8), "labels": 0}], None),
    ],
)
def test_a_data_set_says_its_name(make, name, digits):
    assert dataset_name(make(digits)) == name


@pytest.mark.parametrize(
    ("make", "split"),
    [
        (lambda digits: digits.validation.subset(range(8)), "validation"),
        (lambda digits: Subset(digits.test, range(8)), "test"),  # rows of train that were held out for it
        (lambda digits: ConcatDataset([digits.test, digits.validation]), None),
        (lambda digits: datasets.Dataset.from_dict({"label": [0]}, split=datasets.Split.VALIDATION), "validation"),
        (lambda digits: datasets.Dataset.from_dict({"label": [0]}), None),
        (lambda digits: of_train(), "train"),
        (lambda digits: of_train().train_test_split(0.25)["test"], None),  # which says that it is train
        (lambda digits: of_train().to_iterable_dataset(), None),
        (lambda digits: SimpleNamespace(split="letters"), None),  # EMNIST's
        (lambda digits: torch.zeros(3), None),
    ],
)
def test_a_data_set_says_its_split(make, split, digits):
    assert dataset_split(make(digits)) == split


def test_figures_of_held_out_images_are_not_called_those_of_the_test(build, make_trainer, digits, tmp_path):
    trainer = make_trainer(build("vit"), max_steps=1, epsilon=0.0)
    for data, split in ((digits.validation, "validation"), (digits.test, "test")):
        results = trainer.test(data, ("clean",), n=4, full=False)
        trainer.save_model()
        assert results["split"] == split
        for text in (
            (tmp_path / "out" / "README.md").read_text(),
            rebuild_card(open_repository(tmp_path / "out")).read_text(),
        ):
            shown = {found.dataset_split for found in ModelCard(text).data.eval_results}
            assert shown == {split} and f"of the clean {split} images" in text


def test_figures_of_a_stream_say_its_split(build, make_trainer, tmp_path):
    rows = {"pixel_values": [torch.full((3, 8, 8), 0.5).tolist()] * 4, "labels": [0, 1, 2, 3]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "rows.parquet")
    files = {"validation": str(tmp_path / "rows.parquet")}
    held_out = datasets.load_dataset("parquet", data_files=files, split="validation", streaming=True)
    trainer = make_trainer(build("vit"), max_steps=1, epsilon=0.0)
    for stream, split in (
        (held_out.with_format("torch"), "validation"),
        (iter(datasets.Dataset.from_dict(rows).with_format("torch")), None),
    ):
        results = trainer.test(stream, ("clean",), n=3, full=False)
        assert results["split"] == split and results["robustness"]["n"] == 3


def test_the_card_names_data_that_was_given_by_hand(build, make_trainer, digits, tmp_path):
    def card(trainer):
        trainer.save_model()
        return ModelCard.load(tmp_path / "out" / "README.md").data

    trainer = make_trainer(build("vit"), train=of_the_hub("uoft-cs/cifar10", **CIFAR), max_steps=1, epsilon=0.0)
    assert card(trainer).datasets == ["uoft-cs/cifar10"]
    results = trainer.test(digits.test, ("clean",), n=4, full=False)
    assert results["dataset"] == "digits"
    other = card(trainer)  # which of the two?
    assert other.datasets is None and {result.dataset_name for result in other.eval_results} == {"unknown"}
    trainer.test(of_the_hub("uoft-cs/cifar10", **CIFAR), ("clean",), full=False)
    assert {result.dataset_name for result in card(trainer).eval_results} == {"uoft-cs/cifar10"}
    trainer.create_model_card(dataset_name="me/mine")
    assert card(trainer).datasets == ["me/mine"]
