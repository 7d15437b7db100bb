"""Attacks that search in less than float32: what they find is believed by the float32 model alone."""

import json

import pytest
import torch
from torch import nn

from tscnc_hf.artifact.card.formatting import attack_label
from tscnc_hf.cli.recipe import DataArguments, check_test
from tscnc_hf.evaluation.attacks import make_attack
from tscnc_hf.evaluation.duration import passes
from tscnc_hf.evaluation.measures.robustness import evaluate_robustness
from tscnc_hf.evaluation.precision import check_precision, lowered, multiplying
from tscnc_hf.evaluation.state import OtherEvaluation
from tscnc_hf.method.adversarial.pixels import attack_mode
from tscnc_hf.training.config import TSCNCConfig


OPTIONS = {"epsilon": 0.1, "n": 24, "batch_size": 12, "masking": False, "progress": False}


@pytest.fixture
def evaluate(robust_network, digits, as_they_are):
    def run(attacks, data=digits.test, **options):
        options = OPTIONS | {"processing_class": as_they_are} | options
        return evaluate_robustness(robust_network, data, ("clean", *attacks), **options)

    return run


class Doubtful(nn.Module):
    """Always right in float32, whatever the image; in bf16 it answers 1, or what it is told to, after some calls."""

    def __init__(self, honest_calls=0):
        super().__init__()
        self.weight, self.honest_calls = nn.Parameter(torch.ones(1)), honest_calls
        self.low_images, self.images = 0, 0

    def forward(self, x):
        low = torch.is_autocast_enabled("cpu")
        seen = x.flatten(1).sum(1) * 1e-3 * self.weight
        self.low_images, self.images = self.low_images + low * len(x), self.images + (not low) * len(x)
        self.honest_calls -= low
        wrong = low and self.honest_calls < 0
        return torch.stack([1 + seen, 1 - seen if not wrong else 9 + seen, seen, seen], 1)


@pytest.mark.parametrize("name", ["pgd-5", "cw-5", "pgd-3x2", "fgsm", "apgd", "apgd-dlr", "apgd-ce+t"])
@pytest.mark.parametrize("honest_calls", [0, 1])
def test_what_is_broken_in_bf16_alone_meets_the_whole_attack_in_float32(name, honest_calls):
    if name == "apgd-ce+t":
        pytest.importorskip("pyautoattack", reason="pyautoattack is not installed (tscnc-hf[eval])")
    x, y, index = torch.rand(3, 1, 6, 6), torch.zeros(3, dtype=torch.int64), torch.arange(3)
    plain, doubtful = Doubtful(), Doubtful(honest_calls)
    attack, low = make_attack(name, 0.1), make_attack(name, 0.1, precision="bf16")
    *_, part = attack.parts  # the targeted one of two: what withstands one target meets the next
    attack.parts[part](plain, x, y, index, 0)
    low.parts[part](doubtful, x, y, index, 0)
    assert 0 < doubtful.low_images <= plain.images + 3
    assert doubtful.images == plain.images + 3  # all of it, and one look at what bf16 has found
    assert low.parameters == attack.parameters | {"precision": "bf16"}
    assert attack.parameters["precision"] == "float32"


def test_the_accuracy_is_that_of_the_float32_model(evaluate, robust_network, digits):
    """Images that bf16 attacks find are counted by float32; it finds about as many as float32 does."""
    names = ("fgsm", "pgd-10", "apgd-dlr")
    plain, low = evaluate(names), evaluate(names, attack_precision="bf16")
    assert low["clean"] == plain["clean"]
    for name in names:
        assert abs(low[name].correct - plain[name].correct) <= 1 and 0 < low[name].correct < low["clean"].correct
    x = digits.test.__getitems__([0, 1])["pixel_values"]
    with attack_mode(robust_network), torch.no_grad():
        assert not torch.equal(lowered(robust_network, "bf16")(x).float(), robust_network(x))


def test_the_first_two_parts_of_autoattack(evaluate, robust_network, digits, tmp_path):
    """It finds, image by image, what the library's own run of its two parts does."""
    pyautoattack = pytest.importorskip("pyautoattack", reason="pyautoattack is not installed (tscnc-hf[eval])")
    from tscnc_hf.method.adversarial.noise import seeded_generator

    images = digits.test.subset(range(10))
    report = evaluate(["apgd-ce+t"], data=images, n=10, batch_size=10, epsilon=0.15, state_folder=tmp_path)
    kept = json.loads(next(tmp_path.glob("batch-*.json")).read_text())["found"]
    assert kept.keys() == {"labels", "clean", "apgd-ce+t: apgd-ce", "apgd-ce+t: apgd-t", "apgd-ce+t"}
    batch = images.__getitems__(range(10))
    x, y = batch["pixel_values"], batch["labels"]
    seed = seeded_generator("cpu", 0, "autoattack").initial_seed() % 2**31
    with attack_mode(robust_network), torch.random.fork_rng():
        theirs = pyautoattack.AutoAttack(robust_network, norm="Linf", eps=0.15, seed=seed, version="standard")
        theirs.attacks_to_run = ["apgd-ce", "apgd-t"]
        _, named = theirs.run_standard_evaluation(x, y, batch_size=len(x))
    assert report["apgd-ce+t"].correct == int((named == y).sum()) < report["clean"].correct
    assert torch.equal(torch.tensor(kept["apgd-ce+t"]) == y, named == y)
    said = report["apgd-ce+t"].parameters
    assert said["attacks"] == ["apgd-ce", "apgd-t"] and said["implementation"] == "pyautoattack"
    assert "queries" not in said and passes(make_attack("apgd-ce+t", 0.1)) == (1000, 1)
    assert attack_label("apgd-ce+t") == "APGD-CE+T"


def test_the_precision_belongs_to_the_evaluation(evaluate, tmp_path):
    evaluate(["fgsm"], state_folder=tmp_path)
    with pytest.raises(OtherEvaluation, match=r"attacks \(fgsm differs\)"):
        evaluate(["fgsm"], state_folder=tmp_path, attack_precision="bf16")


def test_what_the_device_has_not_is_refused(evaluate, digits, tmp_path):
    with pytest.raises(ValueError, match="'tf32' needs an NVIDIA GPU .* run on cpu.* leave it out, or use .*bf16"):
        check_precision("tf32", torch.device("cpu"))
    with pytest.raises(ValueError, match="attack_precision='fp8' is unknown; use one of float32, tf32, bf16"):
        evaluate(["fgsm"], attack_precision="fp8")
    config = TSCNCConfig(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(SystemExit, match="attack_precision='tf32' needs an NVIDIA GPU"):
        check_test(config, DataArguments(attack_precision="tf32"), digits)


def test_switches_are_as_they_were():
    """torch convolves in TF32 by default, where there is a GPU: a float32 evaluation must not."""
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = matmul.fp32_precision, conv.fp32_precision
    with multiplying("float32"):
        assert (matmul.fp32_precision, conv.fp32_precision) == ("ieee", "ieee")
        with multiplying("tf32"):
            assert (matmul.fp32_precision, conv.fp32_precision) == ("tf32", "tf32")
        assert (matmul.fp32_precision, conv.fp32_precision) == ("ieee", "ieee")
    assert (matmul.fp32_precision, conv.fp32_precision) == before
