"""Evaluations that are cut off, shared by processes, run out of memory, or are given the wrong thing."""

import json
import os
import socket
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from torch import nn
from torch.utils.data import ConcatDataset, Subset

from tests.processes import run_processes
from tscnc_hf.evaluation.attacks import make_attack
from tscnc_hf.evaluation.measures import robustness
from tscnc_hf.evaluation.measures.examples import adversarial_examples
from tscnc_hf.evaluation.measures.lipschitz import evaluate_lipschitz
from tscnc_hf.evaluation.measures.robustness import evaluate_robustness, refuse_probabilities
from tscnc_hf.evaluation.subset import drawn
from tscnc_hf.method.adversarial.noise import seeded_generator
from tscnc_hf.method.adversarial.pixels import attack_mode


ATTACKS = ("clean", "fgsm", "pgd-5x2", "cw-5", "apgd-dlr")


@pytest.fixture
def evaluate(robust_network, digits, as_they_are):
    def run(model=robust_network, data=digits.test, attacks=ATTACKS, **options):
        defaults = {"epsilon": 0.15, "n": 100, "batch_size": 16, "processing_class": as_they_are, "masking": False}
        return evaluate_robustness(model, data, attacks, progress=False, **(defaults | options))

    return run


class Read:
    """Items that are known when they are read."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, place):
        return self.items[place]


class Pixels:
    image_mean, image_std = [0.0], [1.0]


class Fuse(nn.Module):
    """Raises at the given call, as a power cut would end a process. What it counts decides nothing of its outputs."""

    def __init__(self, model, calls):
        super().__init__()
        self.model, self._calls, self._fuse = model, 0, calls

    def forward(self, x):
        self._calls += 1
        if self._calls == self._fuse:
            raise KeyboardInterrupt
        return self.model(x)


def state_of(model: nn.Module) -> nn.Module:
    return Fuse(model, -1)


# ---- interruption ----


def test_an_interrupted_evaluation_goes_on(evaluate, robust_network, tmp_path):
    whole = evaluate(state_of(robust_network))
    with pytest.raises(KeyboardInterrupt):
        evaluate(Fuse(robust_network, 300), state_folder=tmp_path / "state")
    done = list((tmp_path / "state").glob("batch-*.json"))
    assert 0 < len(done) < 7
    first, second = Fuse(robust_network, -1), Fuse(robust_network, -1)
    again = evaluate(first, state_folder=tmp_path / "state")
    assert json.dumps(again.to_dict()) == json.dumps(whole.to_dict())
    evaluate(second, state_folder=tmp_path / "state")
    assert first._calls > second._calls == 0  # nothing is left to compute


def test_a_state_of_another_evaluation_is_refused(evaluate, robust_network, plain_network, tmp_path):
    evaluate(state_folder=tmp_path, n=20)
    for options, named in (
        ({"epsilon": 0.2}, "epsilon"),
        ({"seed": 1}, "seed"),
        ({"n": 30}, "n"),
        ({"attacks": ("clean",)}, "attacks"),
        ({"model": plain_network}, "model"),
    ):
        with pytest.raises(ValueError, match=f"holds an evaluation with another .*{named}.*give another folder"):
            evaluate(state_folder=tmp_path, **({"n": 20} | options))


def test_a_state_of_the_same_weights_in_another_network_is_refused(evaluate, robust_network, tmp_path):
    """Another activation: nothing of it is in the state dict."""
    evaluate(state_folder=tmp_path, n=20)
    layers = list(robust_network)
    evaluate(model=nn.Sequential(*layers), state_folder=tmp_path, n=20)
    with pytest.raises(ValueError, match="with another network .the same weights, and other settings"):
        evaluate(model=nn.Sequential(layers[0], nn.Tanh(), *layers[2:]), state_folder=tmp_path, n=20)


def test_a_state_from_before_networks_were_told_apart_is_refused(evaluate, tmp_path):
    evaluate(state_folder=tmp_path, n=20)
    path = tmp_path / "evaluation.json"
    identity = json.loads(path.read_text())
    del identity["weights"]["network"]
    path.write_text(json.dumps(identity))
    with pytest.raises(ValueError, match="that an older version of tscnc-hf began.*give another folder, or remove"):
        evaluate(state_folder=tmp_path, n=20)
    with pytest.raises(ValueError, match="with another epsilon, attacks .epsilon: 0.15 there, 0.2 now."):
        evaluate(state_folder=tmp_path, n=20, epsilon=0.2)


@pytest.mark.parametrize("changed", ["pixel_values", "labels"])
def test_a_state_of_other_data_is_refused(changed, evaluate, digits, tmp_path):
    """As long, as wide: finished batches must not answer for images that nobody attacked."""
    data = [digits.test[index] for index in range(20)]
    evaluate(data=data, state_folder=tmp_path, n=20)
    other = {"pixel_values": data[0]["pixel_values"].flip(-1), "labels": (data[0]["labels"] + 1) % 10}
    data[0] = data[0] | {changed: other[changed]}
    with pytest.raises(ValueError, match="holds an evaluation with another data; give another folder"):
        evaluate(data=data, state_folder=tmp_path, n=20)


def test_one_corrected_item_of_many_is_other_data(evaluate, digits, tmp_path, monkeypatch):
    """Also where it is none of those that are looked at first; what is reused is said."""
    data = [digits.test[index] for index in range(300)]
    options = {"n": 8, "attacks": "clean", "state_folder": tmp_path}
    said = []
    monkeypatch.setattr(robustness, "announce", lambda text, progress: said.append(text))
    evaluate(data=data, **options)
    assert said == []
    evaluate(data=[dict(item) for item in data], **options)
    assert said == [f"8 of 8 images were attacked before: what {tmp_path} has is used"]
    for changed in ({"labels": (data[2]["labels"] + 1) % 10}, {"pixel_values": 1 - data[2]["pixel_values"]}):
        with pytest.raises(ValueError, match="holds an evaluation with another data"):
            evaluate(data=[*data[:2], data[2] | changed, *data[3:]], **options)


def test_labels_that_changed_in_an_unfinished_batch(evaluate, digits, robust_network, tmp_path):
    data = Read([digits.test[index] for index in range(100)])
    with pytest.raises(KeyboardInterrupt):
        evaluate(Fuse(robust_network, 20), data=data, state_folder=tmp_path, batch_size=100)
    data[1]["labels"] = (data[1]["labels"] + 1) % 10  # not among the images that are looked at first
    with pytest.raises(ValueError, match="other labels for images 0 to 99: the data set has changed"):
        evaluate(state_of(robust_network), data=data, state_folder=tmp_path, batch_size=100)


def test_a_damaged_file_of_a_batch_is_computed_anew(evaluate, tmp_path):
    whole = evaluate(state_folder=tmp_path)
    first, second, *_ = sorted(tmp_path.glob("batch-*.json"))
    first.write_text("")
    second.write_text(second.read_text()[:20])
    assert evaluate(state_folder=tmp_path).to_dict() == whole.to_dict()


# ---- what the answer does not depend on ----


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_the_batch_size_changes_no_count(batch_size, evaluate):
    counts = [a.correct for a in evaluate().attacks]
    assert [a.correct for a in evaluate(batch_size=batch_size).attacks] == counts
    assert 0 < min(counts) < counts[0]


def test_a_batch_that_does_not_fit_is_halved(evaluate, robust_network, digits, as_they_are):
    sizes = []

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = robust_network

        def forward(self, x):
            sizes.append(len(x))
            if len(x) > 5:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
            return self.model(x)

    assert evaluate(Small()).attacks == evaluate().attacks
    assert sorted(set(sizes), reverse=True)[:3] == [16, 8, 4] and sizes.count(16) == 1
    options = {"epsilon": 0.15, "processing_class": as_they_are}
    checks = evaluate(Small(), attacks=("pgd-2",), masking=True).masking  # on four images
    assert 0 < checks["n"] <= 4 and len(checks["checks"]) > 4
    found, expected = (evaluate_lipschitz(m, digits.test, n=20, **options) for m in (Small(), robust_network))
    assert len(found.local) == 20 and found.summary()["product_log10"] == expected.summary()["product_log10"]
    found, expected = (adversarial_examples(m, digits.test, **options) for m in (Small(), robust_network))
    assert torch.equal(found.clean, expected.clean) and torch.equal(found.labels, expected.labels)
    torch.testing.assert_close(found.adversarial, expected.adversarial)


def test_an_error_that_is_not_memory_is_not_hidden(evaluate, robust_network):
    class Broken(Fuse):
        def forward(self, x):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        evaluate(Broken(robust_network, -1))


def report_of_random_images(folder: str | None = None, distributed: bool = False) -> dict:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 5))
    images = torch.rand(75, 3, 4, 4)
    data = [{"pixel_values": x, "labels": int(y)} for x, y in zip(images, model(images).argmax(-1), strict=True)]
    options = {"epsilon": 0.02, "batch_size": 8, "processing_class": Pixels, "progress": False}
    attacks = ("clean", "pgd-5", "apgd")
    return evaluate_robustness(model, data, attacks, distributed=distributed, state_folder=folder, **options).to_dict()


def on_a_process(rank: int, folder: str, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "1"}
    torch.set_num_threads(1)
    PartialState(cpu=True)
    # the second time both find the same in the folder, and wait for nobody
    found = [report_of_random_images(f"{folder}/state", distributed=True) for _ in range(2)]
    Path(f"{folder}/{rank}.json").write_text(json.dumps(found))


@pytest.mark.launched
def test_two_processes_give_the_same_report(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_processes(on_a_process, str(tmp_path), port)
    alone = json.loads(json.dumps(report_of_random_images()))
    assert 0 < alone["attacks"][2]["correct"] < 75
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)] == [[alone, alone]] * 2
    assert len(list((tmp_path / "state").glob("batch-*"))) == 10
    assert len(list((tmp_path / "state").glob("masking-64-many-*"))) == 2  # each process took part of the images


def test_one_attack_may_be_a_string(evaluate):
    assert evaluate(attacks="pgd-5").attacks == evaluate(attacks=["pgd-5"]).attacks


# ---- the report ----


def test_the_worst_case_and_the_classes_add_up(evaluate, digits):
    report = evaluate()
    worst = report.worst_case
    assert worst.correct <= min(a.correct for a in report.attacks) and worst.n == 100
    assert worst.parameters == {"attacks": list(ATTACKS[1:])} and report["worst case"] is worst
    labels = digits.test.labels[drawn(len(digits.test), 100, report.threat_model["seed"])].tolist()
    assert {label: row["n"] for label, row in report.per_class.items()} == {c: labels.count(c) for c in range(10)}
    for attack in report.attacks:
        assert sum(row[attack.name] for row in report.per_class.values()) == attack.correct
    lines = report.per_class_markdown().splitlines()
    assert len(lines) == 12 and lines[0].count("|") == len(ATTACKS) + 3
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    assert evaluate(attacks=("clean", "pgd-5")).worst_case is None


def test_more_restarts_break_no_less(evaluate):
    report = evaluate(attacks=("clean", "pgd-3", "pgd-3x6"), n=None)
    assert report["pgd-3x6"].correct <= report["pgd-3"].correct + 1


# ---- autoattack, by another library ----


@pytest.mark.launched
def test_autoattack(evaluate):
    pyautoattack = pytest.importorskip("pyautoattack", reason="pyautoattack is not installed (tscnc-hf[eval])")
    random = torch.random.get_rng_state()
    attacks = ("clean", "pgd-20", "apgd", "autoattack", "square")
    report = evaluate(attacks=attacks, epsilon=0.1, n=8)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert report["autoattack"].correct <= min(report["pgd-20"].correct, report["apgd"].correct)
    assert 0 < report["autoattack"].correct <= report["square"].correct <= report["clean"].correct
    assert report["autoattack"].parameters["implementation"] == "pyautoattack"
    assert report["autoattack"].parameters["version"] and pyautoattack
    assert evaluate(attacks=attacks[-1:], epsilon=0.1, n=8)["square"] == report["square"]


@pytest.mark.launched
def test_autoattack_goes_on_within_a_batch(evaluate, robust_network, digits, tmp_path):
    """It is kept part by part, and the parts find what pyautoattack's own run of them all does."""
    pyautoattack = pytest.importorskip("pyautoattack", reason="pyautoattack is not installed (tscnc-hf[eval])")
    options = {"attacks": ("clean", "autoattack"), "n": 6, "batch_size": 6, "norm": "l2", "epsilon": 0.6}
    options |= {"data": digits.test.subset(range(6))}
    with pytest.raises(KeyboardInterrupt):
        evaluate(Fuse(robust_network, 1500), state_folder=tmp_path, **options)
    (file,) = tmp_path.glob("batch-*.json")
    kept = json.loads(file.read_text())["found"]
    assert "autoattack: apgd-ce" in kept and "autoattack: square" not in kept and "autoattack" not in kept
    report = evaluate(Fuse(robust_network, -1), state_folder=tmp_path, **options)
    assert kept.items() <= json.loads(file.read_text())["found"].items()
    batch = digits.test.__getitems__(list(range(6)))
    x, y = batch["pixel_values"], batch["labels"]
    with attack_mode(robust_network):
        survived = robust_network(x).argmax(-1) == y
        seed = seeded_generator("cpu", 0, "autoattack").initial_seed() % 2**31
        theirs = pyautoattack.AutoAttack(robust_network, norm="L2", eps=0.6, seed=seed, version="standard")
        with torch.random.fork_rng():
            x_adv, _ = theirs.run_standard_evaluation(x, y, batch_size=int(survived.sum()))
        survived &= robust_network(x_adv).argmax(-1) == y
    named = torch.tensor(json.loads(file.read_text())["found"]["autoattack"])  # the class of each
    assert torch.equal(named == y, survived)
    assert report["autoattack"].correct == survived.sum() and 0 < survived.sum() < 6


def test_autoattack_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(ImportError, match=r"needs the package pyautoattack: pip install \"tscnc-hf\[eval\]\""):
        make_attack("autoattack", 0.1)


# ---- what is refused ----


def test_probabilities_are_not_logits(evaluate, robust_network):
    with pytest.raises(ValueError, match="returns probabilities .* attacks need logits"):
        evaluate(nn.Sequential(robust_network, nn.Softmax(-1)))


def test_probabilities_are_told_from_few_images_at_a_time(evaluate, robust_network):
    with pytest.raises(ValueError, match="returns probabilities"):
        evaluate(nn.Sequential(robust_network, nn.Softmax(-1)), batch_size=1)
    with pytest.raises(ValueError, match="returns probabilities"):
        refuse_probabilities(torch.randn(1, 10).softmax(-1))  # all that there is before a training


class ProbabilitiesOfOne(nn.Module):
    """Of an image alone it gives what looks like probabilities, of several logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).softmax(-1) if len(x) == 1 else self.model(x)


def test_logits_that_look_like_probabilities_by_chance(evaluate, robust_network):
    report = evaluate(ProbabilitiesOfOne(robust_network), n=17, attacks=("clean",))  # in batches of 16
    assert report["clean"].correct == evaluate(n=17, attacks=("clean",))["clean"].correct
    constant = nn.Sequential(robust_network, nn.Linear(10, 10))
    with torch.no_grad():
        constant[1].weight.zero_()
        constant[1].bias.copy_(torch.eye(10)[0])
    assert evaluate(constant, attacks=("clean",)).collapsed["class"] == 0
    refuse_probabilities(torch.eye(10)[:1])
    refuse_probabilities(torch.tensor([[0.6, 0.4004]]))


def test_labels_that_the_model_does_not_have(evaluate, robust_network):
    with pytest.raises(ValueError, match="labels lie between . and 9, the model has 7 outputs"):
        evaluate(nn.Sequential(robust_network, nn.Linear(10, 7)))


def test_normalised_images(evaluate):
    data = [{"pixel_values": torch.randn(3, 8, 8), "labels": 1}]
    with pytest.raises(ValueError, match=r"allowed is \[0, 1\]. Normalised inputs are a mistake"):
        evaluate(data=data, n=1)


def test_logits_that_are_not_finite(evaluate, robust_network):
    class Overflow(Fuse):
        def forward(self, x):
            return self.model(x) * torch.inf

    with pytest.raises(ValueError, match="logits that are not finite"):
        evaluate(Overflow(robust_network, -1))


def test_a_model_without_gradients(evaluate, robust_network):
    class Detached(Fuse):
        def forward(self, x):
            return self.model(x).detach()

    with pytest.raises(ValueError, match="no gradient with respect to the pixels"):
        evaluate(Detached(robust_network, -1))
    assert evaluate(Detached(robust_network, -1), attacks=("clean",)).attacks == evaluate(attacks=("clean",)).attacks


def test_a_log_file_gets_few_lines_of_the_progress_bar(evaluate, capsys, monkeypatch):
    class Bar(robustness.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **(kwargs | {"disable": False, "mininterval": 1000}))

    monkeypatch.setattr(robustness, "tqdm", Bar)
    evaluate(attacks=("clean", "fgsm"), batch_size=4)  # 25 batches
    shown = capsys.readouterr().err
    assert shown.count("Robust evaluation") == 2 and "fgsm=" in shown and "100/100" in shown


def test_class_names_are_compared(evaluate, build, digits, caplog):
    model, processor = build("vit")

    def of(**names):
        part = digits.test.subset(range(4))
        part.class_names = [names.get(f"c{number}", str(number)) for number in range(10)]
        return evaluate(model, part, attacks=("clean",), n=4, processing_class=processor)

    model.config.id2label = {number: f"kind {number}" for number in range(10)}
    with pytest.raises(ValueError, match="the data set has them in another order"):
        of(**{f"c{number}": f"kind {9 - number}" for number in range(10)})
    right, wrong = digits.test.subset(range(2)), digits.test.subset(range(2, 4))
    right.class_names, wrong.class_names = ([f"kind {n}" for n in order] for order in (range(10), range(9, -1, -1)))
    for both in (ConcatDataset([right, wrong]), Subset(ConcatDataset([right, wrong]), [0, 3])):
        with pytest.raises(ValueError, match="the data set has them in another order"):
            evaluate(model, both, attacks=("clean",), n=2, processing_class=processor)
    assert not caplog.records
    of(**{f"c{number}": f"kind {number}" for number in range(9)})
    assert "Only the model, of 10 classes, has kind 9" in caplog.text


def test_the_progress_bar_says_how_long(evaluate, capsys):
    shown = []

    class Bar(robustness.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **(kwargs | {"disable": False, "mininterval": 0}))
            shown.append(self)

    original, robustness.tqdm = robustness.tqdm, Bar
    try:
        evaluate()
    finally:
        robustness.tqdm = original
    assert shown[0].n == shown[0].total == 100 and "pgd-5x2" in shown[0].postfix
    assert "Robust evaluation: 100%" in capsys.readouterr().err
