"""The one evaluation: what is on disk when, what goes on, what processes share, and what results.json says."""

import copy
import json
import os
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import TrainerCallback
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from tests.killed_runs import Recipe
from tests.processes import run_processes
from tests.results_page import EXAMPLE, check_results
from tscnc_hf.artifact.files.identity import weights_digest
from tscnc_hf.data.loading import load_image_data
from tscnc_hf.evaluation import run
from tscnc_hf.evaluation.page import comparison_table
from tscnc_hf.evaluation.run import evaluate
from tscnc_hf.evaluation.state import EvaluationState, OtherEvaluation
from tscnc_hf.method.adversarial.pixels import Preprocessing
from tscnc_hf.method.resizing import Resize


OPTIONS = {"attacks": ("clean", "pgd-2"), "epsilon": 0.03, "n": 24, "batch_size": 16, "progress": False}
STATE_LOGGER = logging.get_logger("tscnc_hf.evaluation.state")


class Pixels:
    image_mean, image_std = [0.0], [1.0]


# the first row of pixels is cut off
CUT = Preprocessing([0.0], [1.0], None, lambda height, width: Resize(8, 8, "nearest", (1, 0, 8, 8)))


class Counted(nn.Module):
    """A linear classifier that is right for some digits; counts the images it has seen, and may fail."""

    def __init__(self, data):
        super().__init__()
        batch = data.validation.__getitems__(range(len(data.validation)))  # which are not augmented
        x, y = batch["pixel_values"].flatten(1) - 0.3, batch["labels"]
        means = torch.stack([x[y == label].mean(0) for label in range(10)])
        self.linear = nn.Linear(x.shape[1], 10)
        self.linear.weight.data, self.linear.bias.data = means, -(means**2).sum(1) / 2 - 0.3 * means.sum(1)
        self._images, self._fuse = 0, None

    def forward(self, x):
        self._images += len(x)
        if self._fuse is not None and self._images > self._fuse:
            raise KeyboardInterrupt
        return self.linear(x.flatten(1))


def run_counted(data, folder=None, fuse=None, **options) -> tuple[dict, int]:
    model = Counted(data)
    model._fuse = fuse
    given = {"processing_class": Pixels} | OPTIONS | options
    return evaluate(model, data.test, folder=folder, **given), model._images


def figures(results: dict) -> dict:
    """All but versions and commits."""
    results = copy.deepcopy(results)
    del results["identity"]["code"]
    return results


def read(path: Path) -> dict:
    return json.loads(path.read_text())


# ---- cut off ----


def test_cut_off_anywhere_it_goes_on_and_ends_as_an_uncut_one(digits, tmp_path):
    whole, images = run_counted(digits)
    check_results(whole)
    assert 0 < whole["robustness"]["attacks"][1]["correct"] < whole["robustness"]["attacks"][0]["correct"] < 24
    spent, step = 0, images // 6
    for _ in range(40):
        kept = sum(1 for _ in tmp_path.glob("state/*.json"))
        try:
            results, last = run_counted(digits, tmp_path, fuse=step)
            break
        except KeyboardInterrupt:
            spent += step
            again = sum(1 for _ in tmp_path.glob("state/*.json"))
            step += 0 if again > kept else step // 2  # a piece that takes longer
    assert spent >= 3 * (images // 6) and figures(results) == figures(whole) == figures(
        read(tmp_path / "results.json")
    )
    assert run_counted(digits, tmp_path) == (results, 0)  # nothing is left to compute


@pytest.mark.usefixtures("drawn_figures")
def test_results_are_there_as_soon_as_the_accuracies_are(digits, tmp_path, monkeypatch):
    for name in ("security_curve", "evaluate_lipschitz", "kept_examples", "write_page"):
        with monkeypatch.context() as patch:
            patch.setattr(run, name, None)  # a call is an error
            with pytest.raises(TypeError):
                run_counted(digits, tmp_path / name, page=True)
        results = read(tmp_path / name / "results.json")
        check_results(results)
        assert results["robustness"]["attacks"][1]["n"] == 24 and results["sparsity"]["zeros"] == 0
        assert ("lipschitz" in results) == (name in ("kept_examples", "write_page"))
    results, images = run_counted(digits, tmp_path / "write_page", page=True, class_names=digits.class_names)
    assert images == 0 and results == read(tmp_path / "write_page" / "results.json")
    assert (tmp_path / "write_page" / "figures" / "adversarial_examples.png").stat().st_size > 5000
    (tmp_path / "write_page" / "state" / "examples.safetensors").write_bytes(b"\0" * 40)
    with CaptureLogger(logging.get_logger("tscnc_hf.evaluation.measures.examples")) as said:
        assert run_counted(digits, tmp_path / "write_page", page=True)[1] > 0
    assert "examples.safetensors" in said.out and "Made anew" in said.out


def test_damaged_files_are_computed_anew_and_said_in_a_line(digits, tmp_path):
    whole, _ = run_counted(digits, tmp_path)
    (tmp_path / "state" / "evaluation.json").write_text("")
    (tmp_path / "state" / "curve-0.03.json").write_text('{"of": {')
    (tmp_path / "state" / "spectrum.json").write_text("[]")
    with CaptureLogger(STATE_LOGGER) as said:
        results, images = run_counted(digits, tmp_path)
    assert results == whole and 0 < images < 24 * 42  # one radius
    lines = said.out.strip().splitlines()
    assert len(lines) == 2 and all("is damaged" in line and "computed anew" in line for line in lines)
    assert run_counted(digits, tmp_path)[1] == 0
    (tmp_path / "state" / "evaluation.json").write_text('{"options": {}}')  # JSON, but no identity
    assert run_counted(digits, tmp_path) == (whole, 0)


# ---- whose it is ----


def test_results_of_other_weights_are_not_overwritten(digits, tmp_path):
    """Also where only they are left of the evaluation, or nothing says what they are of."""
    few = {"attacks": ("clean",), "full": False}
    mine, _ = run_counted(digits, tmp_path, **few)
    shutil.rmtree(tmp_path / "state")
    kept = (tmp_path / "results.json").read_bytes()
    other = Counted(digits)
    other.linear.bias.data[0] += 1
    for content in (kept, b"{}", b'{"identity": '):
        (tmp_path / "results.json").write_bytes(content)
        with pytest.raises(OtherEvaluation, match="results.json has results that are not of these weights"):
            evaluate(other, digits.test, folder=tmp_path, processing_class=Pixels, **(OPTIONS | few))
        assert (tmp_path / "results.json").read_bytes() == content and not (tmp_path / "state").exists()
    (tmp_path / "results.json").write_bytes(kept)
    assert figures(run_counted(digits, tmp_path, **few)[0]) == figures(mine)
    (tmp_path / "results.json").write_bytes(b"{}")  # beside the state of mine
    with pytest.raises(OtherEvaluation, match="results.json has results that are not of these weights"):
        run_counted(digits, tmp_path, **few)


def test_results_of_the_same_weights_in_another_network_are_not_overwritten(digits, tmp_path):
    few = {"attacks": ("clean",), "full": False}
    run_counted(digits, tmp_path, **few)
    shutil.rmtree(tmp_path / "state")
    kept = (tmp_path / "results.json").read_bytes()
    other = Counted(digits)
    other.temperature = 0.5
    with pytest.raises(OtherEvaluation, match="not of what this network computes with them, and would be overwritten"):
        evaluate(other, digits.test, folder=tmp_path, processing_class=Pixels, **(OPTIONS | few))
    assert (tmp_path / "results.json").read_bytes() == kept
    results = json.loads(kept)
    del results["identity"]["weights"]["network"]  # from before it was kept: whose they are nobody can tell
    (tmp_path / "results.json").write_text(json.dumps(results))
    evaluate(other, digits.test, folder=tmp_path, processing_class=Pixels, **(OPTIONS | few))


def test_another_evaluation_is_refused_by_name_and_other_code_is_a_warning(digits, tmp_path):
    whole, _ = run_counted(digits, tmp_path, full=False)
    for options, named in (
        ({"epsilon": 0.2}, "another epsilon, attacks .epsilon: 0.03 there, 0.2 now."),
        ({"attacks": ("clean", "pgd-3")}, "another attacks .pgd-2 only there, pgd-3 only now.;"),
        ({"n": 12}, "another n .n: 24 there, 12 now.;"),
        ({"seed": 3}, "another seed .seed: 0 there, 3 now.;"),
        ({"processing_class": CUT}, "another geometry"),
    ):
        with pytest.raises(OtherEvaluation, match=named):
            run_counted(digits, tmp_path, **options)
    model = Counted(digits)
    with torch.no_grad():
        model.linear.bias += 0.1
    with pytest.raises(OtherEvaluation, match="another model; give another folder"):
        evaluate(model, digits.test, folder=tmp_path, processing_class=Pixels, **OPTIONS)
    with pytest.raises(OtherEvaluation, match="another data; give another folder"):
        evaluate(Counted(digits), digits.train, folder=tmp_path, processing_class=Pixels, **OPTIONS)
    path = tmp_path / "state" / "evaluation.json"
    path.write_text(path.read_text().replace(f'"torch": "{torch.__version__.split("+")[0]}', '"torch": "1.0'))
    with CaptureLogger(STATE_LOGGER) as said:
        assert run_counted(digits, tmp_path, full=False) == (whole, 0)
    assert "other code, and is kept: torch='1.0'" in said.out and said.out.count("\n") == 1


def test_a_mixed_folder_keeps_each_evaluation(digits, tmp_path):
    one, _ = run_counted(digits, tmp_path, mixed=True, full=False)
    two, images = run_counted(digits, tmp_path, mixed=True, full=False, attacks=("clean", "pgd-3"))
    assert images > 0 and read(tmp_path / "results.json") == two != one
    assert run_counted(digits, tmp_path, mixed=True, full=False) == (one, 0)
    assert read(tmp_path / "results.json") == one and len(list((tmp_path / "state").iterdir())) == 2


def test_a_model_without_matrices_has_results(digits, tmp_path):
    class Brightness(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(5.0))

        def forward(self, x):
            return self.scale * x.flatten(1).mean(1, keepdim=True) * torch.linspace(-1, 1, 10)

    results = evaluate(Brightness(), digits.test, folder=tmp_path, page=True, processing_class=Pixels, **OPTIONS)
    check_results(results)
    assert results["spectrum"]["median_condition_number"] is None and results["spectrum"]["rows"] == []
    assert results == read(tmp_path / "results.json") and "n/a" in comparison_table({"m": results})


# ---- shared ----


class Normed(nn.Module):
    pretrained_cfg = {"mean": [0.5], "std": [0.5], "input_size": [3, 8, 8]}

    def __init__(self):
        super().__init__()
        self.flatten, self.norm, self.linear = nn.Flatten(), nn.BatchNorm1d(192), nn.Linear(192, 10)

    def forward(self, x):
        return self.linear(self.norm(self.flatten(x)))


def train_with_statistics(data, folder: str) -> dict:
    """Batch norm and weight averaging, each process with images of its own: which weights each has."""
    from tscnc_hf.training.config import TSCNCConfig
    from tscnc_hf.training.trainer import TSCNCTrainer

    torch.manual_seed(0)
    options = {
        "use_cpu": True,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "ema_decay": 0.5,
        "save_strategy": "no",
    }
    options |= {"objective": "natural", "adversary": "none", "report_to": "none", "disable_tqdm": True}
    trainer, digests = TSCNCTrainer(Normed(), TSCNCConfig(folder, **options), train_dataset=data.train), []
    keep = TrainerCallback()
    keep.on_step_end = lambda *args, model=None, **kwargs: digests.append(weights_digest(model))
    trainer.add_callback(keep)
    trainer.train()
    return {"steps": digests, "average": weights_digest(trainer.model), "world": trainer.args.world_size}


def on_a_process(rank: int, folder: str, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "1"}
    torch.set_num_threads(1)
    from accelerate import PartialState

    PartialState(cpu=True)
    data = load_image_data("digits")
    model, counts, write = Counted(data), {}, EvaluationState.write

    def counted(self, name, *args, **kwargs):
        counts[name], model._images = model._images, 0
        write(self, name, *args, **kwargs)

    EvaluationState.write = counted
    options = OPTIONS | {"folder": f"{folder}/two", "distributed": True, "processing_class": Pixels}
    results = evaluate(model, data.test, **options)
    total, model._images = sum(counts.values()) + model._images, 0
    again = evaluate(model, data.test, **options)
    found = {"results": results, "again": again, "pieces": list(counts), "images": total, "left": model._images}
    found["trained"] = train_with_statistics(data, f"{folder}/trained")
    Path(f"{folder}/{rank}.json").write_text(json.dumps(found))


def test_two_processes_share_all_of_it(digits, tmp_path):
    alone, images = run_counted(digits)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_processes(on_a_process, str(tmp_path), port)
    ranks = [read(tmp_path / f"{rank}.json") for rank in (0, 1)]
    for found in ranks:
        assert found["results"] == ranks[0]["results"] == found["again"] and found["left"] == 0
        assert 0.3 * images < found["images"] < 0.7 * images
    results = ranks[0]["results"]
    assert results["robustness"] == alone["robustness"] and results["curve"] == alone["curve"]
    for key in ("local_median", "local_mean", "local_max"):
        assert results["lipschitz"][key] == pytest.approx(alone["lipschitz"][key], rel=1e-4)
    pieces = [set(found["pieces"]) for found in ranks]
    for prefix in ("masking-", "lipschitz-", "batch-"):
        one, two = ({name for name in of if name.startswith(prefix)} for of in pieces)
        assert one and two and not one & two
    assert {"sparsity", "spectrum"} <= pieces[0] | pieces[1]
    trained = [found["trained"] for found in ranks]
    assert trained[0] == trained[1] and len(set(trained[0]["steps"])) == 3 and trained[0]["world"] == 2


def test_memory_that_runs_out_in_one_process_is_known_to_all(monkeypatch):
    def gathered(mine):
        return [*mine, ({}, "CUDA out of memory. Tried to allocate 1 GiB.")]

    monkeypatch.setattr("tscnc_hf.evaluation.state.gather_object", gathered)
    with pytest.raises(RuntimeError, match="out of memory"):
        EvaluationState(rank=0, world=2).share({"a": lambda: 1, "b": lambda: 2})


# ---- at the end of a training run ----

RECIPE = {
    "dataset": "digits", "train_limit": 400, "test_limit": 12, "augmentation": "none", "patch_size": 4,
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_steps": 100, "save_strategy": "steps",
    "save_steps": 90, "eval_strategy": "no", "per_device_train_batch_size": 32, "per_device_eval_batch_size": 6,
    "optim": "adamw_torch", "lr_scheduler_type": "constant", "learning_rate": 1e-2, "epsilon": 0.002,
    "attack_steps": 1, "target_sparsity": 0.5, "pruning_interval": 1, "tsc_on": "gates", "tsc_weight": 0.1,
    "ema_decay": 0.5, "use_cpu": "true", "disable_tqdm": "true", "report_to": "none", "cpu_threads": 1,
    "test_attacks": "autoattack", "resume": "true",
}  # fmt: skip


@pytest.mark.launched
def test_autoattack_after_training_killed_twice_ends_as_uncut(tmp_path):
    pytest.importorskip("pyautoattack", reason="pyautoattack is not installed (tscnc-hf[eval])")
    whole, cut = Recipe(tmp_path / "whole" / "run", **RECIPE), Recipe(tmp_path / "cut" / "run", **RECIPE)
    for recipe in (whole, cut):
        recipe.folder.parent.mkdir()
    stamps = {}
    for batch in (0, 1):
        process, deadline = cut.start(), time.monotonic() + 240
        while not has_part(cut.folder, batch, "autoattack: apgd-ce") and time.monotonic() < deadline:
            assert process.is_alive(), cut.log.read_text()[-3000:]
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        assert not has_part(cut.folder, batch, "autoattack: square") and not (cut.folder / "results.json").exists()
        (state,) = (cut.folder / "state").iterdir()  # the weights that training was resumed to are the same
        stamps = {
            path.name: path.stat().st_mtime_ns for path in state.glob("*.json") if "batch-000001" not in path.name
        }
    cut.finish()
    whole.finish()
    results = read(cut.folder / "results.json")
    check_results(results)
    assert cut.last_step() == 100  # though epochs have 13 steps, nothing was trained on
    assert figures(results) == figures(read(whole.folder / "results.json"))
    assert 0 < results["robustness"]["attacks"][0]["correct"] < 12 and "gates" in results
    assert all((state / name).stat().st_mtime_ns == stamp for name, stamp in stamps.items())


def has_part(folder: Path, batch: int, part: str) -> bool:
    return any(part in path.read_text() for path in folder.glob(f"state/*/batch-{batch:06d}.json"))


# ---- the page ----


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda results: results.update(more=1), "more is not in docs"),
        (lambda results: results["robustness"]["attacks"][0].update(more=1), r"attacks\[\].more is not in docs"),
        (lambda results: results["robustness"].pop("n"), "robustness has no n"),
        (lambda results: results["spectrum"]["rows"][0].update(rank="1"), "rank='1' is no"),
        (lambda results: results.pop("identity"), "identity"),
        (lambda results: results.update(dense={}), "identity"),
    ],
)
def test_what_the_page_does_not_say_is_found(change, message):
    check_results(EXAMPLE)
    check_results(EXAMPLE | {"dense": EXAMPLE})
    changed = copy.deepcopy(EXAMPLE)
    change(changed)
    with pytest.raises(AssertionError, match=message):
        check_results(changed)
