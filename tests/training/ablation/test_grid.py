"""An ablation: which cells there are, what they share, rows that survive, and the script as it is started."""

import json
import math
import runpy
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file
from scipy.stats import ttest_1samp, ttest_rel

from tests.processes import PATIENCE, left_behind, run_python, started
from tests.results_page import check_results
from tscnc_hf.artifact.files.identity import commit
from tscnc_hf.artifact.files.state import load_state, save_state
from tscnc_hf.artifact.models.loading import load_sparse
from tscnc_hf.artifact.repository.opening import published_files
from tscnc_hf.training.ablation.comparison import comparison_markdown, paired_difference
from tscnc_hf.training.ablation.figures import arms_figure, kappa
from tscnc_hf.training.ablation.grid import Cell, Grid, grid
from tscnc_hf.training.ablation.rows import Results, differences, read_rows


RECIPES = Path(__file__).parents[3] / "recipes"
CONFIGS = RECIPES / "configs"
CONFIG = CONFIGS / "ablation_cnn.yaml"
ARMS = {"plain": {}, "both": {"cnc_weight": 0.01, "tsc_weight": 1e-6}}
TINY = {
    "dataset": "digits", "augmentation": "none", "train_limit": 64, "test_limit": 20, "validation_fraction": 0.2,
    "test_attacks": "clean pgd-2", "attack": "", "workers": 1, "max_steps": 6, "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 20, "epsilon": "0.1", "pruning_interval": 1, "use_cpu": "true", "seeds": "0",
    "model_args": json.dumps({"channels": [8, 8, 8, 8], "layers": [1, 1, 1, 1]}), "pretraining": '{"max_steps": 4}',
    "sparsities": "0.5 0.9", "arms": json.dumps(ARMS),
}  # fmt: skip


def options(folder: Path, **changed) -> list[str]:
    given = TINY | {"results": folder / "rows.jsonl", "output_dir": folder / "runs"} | changed
    del given["attack"]
    found = ["--config", str(CONFIG)]
    for name, value in given.items():
        found += [f"--{name}", *words(name, value)]
    return [str(text) for text in found]


def words(name: str, value) -> list[str]:
    return str(value).split() if name in ("test_attacks", "seeds", "sparsities", "only") else [str(value)]


@pytest.fixture
def ablation(capsys):
    def run(folder: Path, **changed) -> str:
        runpy.run_path(str(RECIPES / "ablation.py"))["main"](options(folder, **changed))
        return capsys.readouterr().out

    return run


def trained(folder: Path, name: str) -> Path:
    (found,) = (folder / "runs").glob(f"{name}-*/trained.safetensors")
    return found


# ---- the grid ----


def test_every_arm_at_every_sparsity_and_seed_after_the_dense_trainings_they_share():
    arms = {"plain": {}, "cnc": {"cnc_weight": 0.1}, "early": {"cnc_weight": 0.1, "pretraining": {"cnc_weight": 0.1}}}
    cells = grid(arms, [0.9, 0.99], [3, 4], {"learning_rate": 0.1})
    dense, pruned = cells[:4], cells[4:]
    assert [(c.arm, c.seed) for c in dense] == [("dense", 3), ("dense", 4), ("dense-early", 3), ("dense-early", 4)]
    assert all(cell.is_dense for cell in dense) and not any(cell.is_dense for cell in pruned)
    assert {(c.arm, c.sparsity, c.seed) for c in pruned} == {
        (a, s, i) for a in arms for s in (0.9, 0.99) for i in (3, 4)
    }
    assert dense[0].options == {"learning_rate": 0.1} and dense[2].options == {"learning_rate": 0.1, "cnc_weight": 0.1}
    assert len({cell.name for cell in cells}) == len(cells)
    assert not any(cell.is_dense for cell in grid(arms, [0.9], [0], None))


@pytest.mark.parametrize("arms, sparsities", [({}, [0.9]), ({"a": {}}, []), ({"a": {"cnc_wait": 1}}, [0.9])])
def test_grids_that_cannot_be_run_are_refused(arms, sparsities):
    with pytest.raises(ValueError, match="give one of each|no option cnc_wait"):
        grid(arms, sparsities, [0], None)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"arms": {"plain": {"target_sparsity": 0.2}}}, "'plain': `sparsities` says its target_sparsity"),
        ({"arms": {"plain": {"seed": 3}}}, "'plain': seed is the grid's to say"),
        ({"arms": {"plain": {"pretraining": {"output_dir": "x"}}}}, "'plain': output_dir is the grid's to say"),
        ({"arms": {"plain": 3}}, "'plain': 3 is no map of options"),
        ({"arms": ["plain"]}, "give a map, name -> options"),
        ({"arms": {"dense": {}}}, "'dense' is what the dense trainings are called"),
        ({"arms": {"dense-plain": {}}}, "'dense' is what the dense trainings are called"),
        ({"arms": {"a/b": {}}}, "'a/b': its name is part of a folder's"),
        ({"sparsities": [0.9, 0.90]}, r"sparsities=\[0.9, 0.9\]: give each once"),
        ({"seeds": [0, 1, 0]}, r"seeds=\[0, 1, 0\]: give each once"),
        ({"pretraining": {"pretraining": {}}}, "no option pretraining"),
    ],
)
def test_what_a_cell_decides_is_no_option_of_an_arm(given, message):
    usual = {"arms": {"plain": {}}, "sparsities": [0.5], "seeds": [0], "pretraining": {"max_steps": 4}}
    with pytest.raises(ValueError, match=message):
        grid(*(usual | given).values())
    grid(*usual.values())
    grid({"plain": {"pretraining": {"target_sparsity": 0.2}}}, [0.5], [0], {"max_steps": 4})  # used on purpose


@pytest.mark.parametrize("name", ["cnn", "vit", "search", "baselines", "recipe", "paper"])
def test_every_arm_of_a_config_has_options_that_go_together(name, make_config):
    """Those of dense trainings, too; no two cells have one identity."""
    data = SimpleNamespace(identity={})
    shared = yaml.safe_load((CONFIGS / f"ablation_{name}.yaml").read_text())
    size = yaml.safe_load(CONFIG.read_text())["per_device_train_batch_size"]
    config = make_config(
        target_sparsity=0.0, tsc_a=1.0, tsc_weight=0.0, cnc_weight=0.0, per_device_train_batch_size=size
    )
    runs = Grid(config, None, data, "a model")
    cells = grid(shared["arms"], [0.99], [0], {"num_train_epochs": 8})
    assert len(cells) > len(shared["arms"])
    sparsities = {cell: cell.options.get("target_sparsity", 0.0 if cell.is_dense else 0.99) for cell in cells}
    assert all(runs.settings(cell).target_sparsity == sparsity for cell, sparsity in sparsities.items())
    assert len({runs.identity(cell).digest() for cell in cells}) == len(cells)


# ---- rows ----


def a_row(arm="plain", sparsity=0.9, seed=0, robust=0.2, **more) -> dict:
    row = {"model": "m", "arm": arm, "sparsity": sparsity, "seed": seed, "split": "test", "settings": "s"}
    row |= {"accuracy": {"clean": 0.5, "pgd-20": robust}, "median_kappa": 3.0, "max_kappa": "inf", "lost_ranks": 1}
    return row | {"empty_matrices": 0} | more


def test_rows_are_kept_and_those_of_other_settings_are_not_mixed_with(tmp_path):
    path, cell = tmp_path / "deep" / "rows.jsonl", Cell("plain", 0.9, 0)
    results = Results(path)
    assert results.find("m", cell, "s") is None
    results.add(a_row())
    results.add(a_row(seed=1))
    assert Results(path).find("m", cell, "s") == a_row() and len(read_rows(path)) == 2
    assert Results(path).find("m", cell, "s", "validation") is None
    with pytest.raises(ValueError, match="plain-0.9-s0 of m with other settings"):
        Results(path).find("m", cell, "t")
    path.write_text(path.read_text() + '{"model": "m"}\n')
    with pytest.raises(ValueError, match="line 3: not a row"):
        read_rows(path)


def test_differences_leave_time_and_place_out():
    assert differences(a_row(seconds=1, commit="a"), a_row(seconds=2, commit="b")) == {}
    assert differences(a_row(), a_row(lost_ranks=2)) == {"lost_ranks": (1, 2)}


def test_paired_interval_is_that_of_scipy():
    a, b = np.random.default_rng(0).normal(size=(2, 5))
    found, truth = paired_difference(list(a), list(b)), ttest_rel(a, b).confidence_interval(0.95)
    assert math.isclose(found.mean, np.mean(a - b)) and found.n == 5
    assert math.isclose(found.low, truth.low) and math.isclose(found.high, truth.high)
    assert paired_difference([1.0], [0.5]).high == math.inf
    with pytest.raises(ValueError, match="pairs need"):
        paired_difference([1.0], [])


def test_table_pairs_by_seed():
    gains = {0: 0.04, 1: 0.05, 2: 0.06}
    rows = [a_row(seed=seed, robust=0.1 * seed + 0.1) for seed in (2, 0, 1)]
    rows += [a_row("CNC", seed=seed, robust=0.1 * seed + 0.1 + gain) for seed, gain in gains.items()]
    table = comparison_markdown(rows, "pgd-20")
    half = 100 * 4.302653 * 0.01 / math.sqrt(3)  # t of two degrees of freedom
    assert f"| 25.0 ± 11.0 |  | +5.0 ({5 - half:+.1f} to {5 + half:+.1f}) |" in table
    assert "| 90 % | plain | 3 | 50.0 ± 0.0 | 20.0 ± 10.0 |  |  |" in table
    both = comparison_markdown(rows, "pgd-20", ["plain", "CNC"])
    assert "pgd-20, minus plain | pgd-20, minus CNC |" in both
    assert f"| 20.0 ± 10.0 |  |  | -5.0 ({-5 - half:+.1f} to {-5 + half:+.1f}) |" in both


def test_what_is_left_of_the_dense_accuracy():
    """Ratios seed by seed, of the dense network without constraints where there is one, with Student's interval."""
    pruned = [a_row(seed=seed, robust=robust) for seed, robust in enumerate((0.2, 0.3, 0.24))]
    own = [a_row("dense-plain", sparsity=0.0, seed=seed, robust=0.4) for seed in range(3)]
    dense = [a_row("dense", sparsity=0.0, seed=seed, robust=0.3) for seed in range(3)]
    for rows, ratios in ((pruned + own, (0.5, 0.75, 0.6)), (pruned + own + dense, (2 / 3, 1.0, 0.8))):
        found = ttest_1samp(ratios, 0).confidence_interval(0.95)
        shown = f"{100 * np.mean(ratios):.0f} ({100 * found.low:.0f} to {100 * found.high:.0f})"
        assert f"| 24.7 ± 5.0 | {shown} |  |" in comparison_markdown(rows, "pgd-20")
    assert "| 20.0 | 67 |  |" in comparison_markdown([pruned[0], dense[0]], "pgd-20")
    assert "| 30.0 |  |  |" in comparison_markdown([pruned[0], dense[0]], "pgd-20")  # the dense network itself


def test_a_baseline_that_was_never_run_is_refused():
    with pytest.raises(ValueError, match="no row is of the baseline ERK; the arms are plain, CNC"):
        comparison_markdown([a_row(), a_row("CNC")], "pgd-20", ["plain", "ERK"])


def test_an_attack_that_was_not_measured_is_refused():
    match = "1 of 2 rows have no accuracy under 'apgd-ce', such as that of 'CNC', which has clean, pgd-20"
    with pytest.raises(ValueError, match=match):
        comparison_markdown([a_row() | {"accuracy": {"clean": 0.5, "apgd-ce": 0.3}}, a_row("CNC")], "apgd-ce")


def test_two_rows_of_a_cell_are_not_averaged():
    with pytest.raises(ValueError, match=r"two rows of plain of m at 0.9, seed 0 \(split validation\)"):
        comparison_markdown([a_row(), a_row(split="validation")], "pgd-20")


@pytest.mark.parametrize(("name", "value"), [("model_args", "[1]"), ("arms", '"plain"'), ("pretraining", "3")])
def test_options_that_are_no_maps_are_refused(name, value, ablation, tmp_path, capsys):
    with pytest.raises(SystemExit):
        ablation(tmp_path, **{name: value})
    said = capsys.readouterr().err
    assert f"error: {name}=" in said and "give a map" in said


def test_figures_say_what_they_cannot_show():
    rows = [a_row(sparsity=s, seed=i, median_kappa=k) for s in (0.9, 0.99) for i, k in ((0, 3.0), (1, "inf"))]
    (axes,) = arms_figure(rows, kappa, "condition number", log=True).axes
    assert axes.get_xlabel() == "condition number\n(seeds, median; 2 runs without a finite value)"


def test_figures_show_each_seed_of_an_arm_the_mean_and_the_dense_network():
    rows = [a_row("dense", 0.0, seed, robust) for seed, robust in enumerate((0.3, 0.5))]
    rows += [a_row("dense-TSC", 0.0, 0, 0.7)]  # one arm's own, not what all are compared with
    for sparsity, arm, first in ((0.99, "TSC", 0.3), (0.9, "plain", 0.2), (0.99, "plain", 0.1)):
        rows += [a_row(arm, sparsity, seed, first + 0.05 * seed) for seed in range(2)]
    (axes,) = arms_figure(rows, lambda row: row["accuracy"]["pgd-20"], "accuracy", log=False).axes
    written = [label.get_text() for label in axes.get_yticklabels()]
    assert written == ["90 % zeros", "plain", "99 % zeros", "TSC", "plain"]
    shown = [marks.get_offsets() for marks in axes.collections]  # seeds, then mean, of each arm from above
    expected = [[[0.2, 1], [0.25, 1]], [[0.225, 1]], [[0.3, 3], [0.35, 3]], [[0.325, 3]]]
    expected += [[[0.1, 4], [0.15, 4]], [[0.125, 4]]]
    for found, points in zip(shown, expected, strict=True):
        assert np.allclose(found, points)
    assert axes.lines[0].get_xdata()[0] == pytest.approx(0.4)
    assert axes.get_xlabel() == "accuracy\n(seeds, mean; dashed: dense)"


# ---- the script ----


def test_cells_are_trained_measured_resumed_and_reproduced(ablation, tmp_path):
    printed = ablation(tmp_path, only="dense")
    assert "1 cells, 0 of them finished before" in printed
    printed = ablation(tmp_path)
    assert "5 cells, 1 of them finished before" in printed and "[5/5]" in printed
    rows = {(row["arm"], row["sparsity"]): row for row in read_rows(tmp_path / "rows.jsonl")}
    assert set(rows) == {("dense", 0)} | {(arm, sparsity) for arm in ARMS for sparsity in (0.5, 0.9)}
    for (_, sparsity), row in rows.items():
        assert abs(row["zeros"] - sparsity) < 1e-3 and row["n"] == 20 and set(row["accuracy"]) == {"clean", "pgd-2"}
    weights = load_file(trained(tmp_path, "both-0.9-s0"))
    matrices = [weight for weight in weights.values() if weight.ndim > 1]
    assert abs(sum(int((w == 0).sum()) for w in matrices) / sum(w.numel() for w in matrices) - 0.9) < 1e-3
    plain = load_file(trained(tmp_path, "plain-0.9-s0"))
    assert not torch.equal(plain["timm_model.fc.weight"], weights["timm_model.fc.weight"])

    before = (tmp_path / "rows.jsonl").read_text()
    assert (
        "5 cells, 5 of them finished before" in ablation(tmp_path) and (tmp_path / "rows.jsonl").read_text() == before
    )
    assert "both-0.9-s0 gives the same row again" in ablation(tmp_path, check="both-0.9-s0")
    (tmp_path / "rows.jsonl").write_text(before.replace('"n": 20', '"n": 19'))
    with pytest.raises(SystemExit, match=r"not reproduced: {'n': \(19, 20\)}"):
        ablation(tmp_path, check="both-0.9-s0")
    with pytest.raises(SystemExit, match="other settings"):
        ablation(tmp_path, learning_rate="0.5")
    with pytest.raises(SystemExit, match="no finished cell 'both-0.7-s0'"):
        ablation(tmp_path, check="both-0.7-s0")

    (tmp_path / "rows.jsonl").write_text(before)
    command = [RECIPES / "ablation_report.py", "--rows", tmp_path / "rows.jsonl", "--attack", "pgd-2"]
    run_python([*command, "--output", tmp_path / "report"])
    assert "| 90 % | both | 1 |" in (tmp_path / "report" / "ablation.md").read_text()
    names = ("robustness", "conditioning", "robustness_over_conditioning")
    for name in names:
        with Image.open(tmp_path / "report" / f"ablation_{name}.png") as figure:
            assert figure.width == 1500 and len(figure.convert("RGB").getcolors(2**16)) > 50  # something is drawn


def test_what_a_chosen_cell_starts_from_is_trained_with_it(ablation, tmp_path, capsys):
    """Also where its row is there and its weights are not, as in a clone of the repository: the row stays."""
    arms = json.dumps({"plain": {}, "other": {"cnc_weight": 0.01}, "not plain": {}})
    given = {"arms": arms, "sparsities": "0.5", "max_steps": 2, "results": tmp_path / "rows.jsonl"}
    assert "2 cells, 0 of them finished before" in ablation(tmp_path / "one", **given, only="plain-0.5")
    rows = read_rows(tmp_path / "rows.jsonl")
    assert [(row["arm"], row["sparsity"]) for row in rows] == [("dense", 0), ("plain", 0.5)]
    printed = ablation(tmp_path / "two", **given, only="plain other")
    assert "3 cells, 1 of them finished before" in printed
    assert "dense-0-s0 was trained again; from its row, which stays, differs nothing" in printed
    assert read_rows(tmp_path / "rows.jsonl")[:2] == rows and len(read_rows(tmp_path / "rows.jsonl")) == 3
    assert "2 cells, 2 of them finished before" in ablation(tmp_path / "three", **given, only="plain other")
    with pytest.raises(SystemExit, match="begins with 'lain'; there are dense-0-s0, plain-0.5-s0, other"):
        ablation(tmp_path, **given, only="plain lain")


def test_cells_are_attacked_alike_whatever_they_train_with(ablation, tmp_path):
    arms = json.dumps({"plain": {}, "weaker": {"epsilon": "0.05", "norm": "l2"}})
    ablation(tmp_path, arms=arms, sparsities="0.5", max_steps=2, pretraining="null", save_models="true")
    for arm in ("plain", "weaker"):
        results = json.loads((trained(tmp_path, arm).parent / "results.json").read_text())
        threat = results["robustness"]["threat_model"]
        assert (threat["norm"], threat["epsilon"]) == ("linf", 0.1)
    used = json.loads((trained(tmp_path, "weaker").parent / "tscnc_config.json").read_text())
    assert (used["norm"], used["epsilon"]) == ("l2", 0.05)


def test_a_row_says_what_trained_the_weights_that_it_measured(ablation, tmp_path):
    given = {"arms": '{"plain": {}}', "sparsities": "0.5", "max_steps": 2, "seeds": "0"}
    shown = ablation(tmp_path, **given)
    (row,) = (row for row in read_rows(tmp_path / "rows.jsonl") if row["arm"] == "plain")
    assert row["trained_commit"] == row["commit"] and f"trained in {row['seconds']:.0f} s" in shown
    weights = trained(tmp_path, "plain")
    for metadata, says in (({"seconds": "4321.5", "commit": "0123"}, (4321.5, "0123")), ({}, (None, None))):
        save_state(load_state(weights)[0], weights, metadata)
        shown = ablation(tmp_path, **given, results=tmp_path / f"{len(metadata)}.jsonl")
        (again,) = (row for row in read_rows(tmp_path / f"{len(metadata)}.jsonl") if row["arm"] == "plain")
        assert (again["seconds"], again["trained_commit"]) == says and not differences(row, again)
        assert ("trained in 4322 s" in shown) == bool(metadata)


def test_two_processes_train_a_cell_once(ablation, tmp_path, caplog, capsys):
    """The second waits, takes the weights of the first, and adds no second row."""
    given = {"arms": '{"plain": {}}', "sparsities": "0.5", "max_steps": 2, "seeds": "0"}
    ablation(tmp_path, **given)
    weights, rows = trained(tmp_path, "plain"), tmp_path / "rows.jsonl"
    before, kept = weights.stat().st_mtime_ns, rows.read_text()
    late = Results(tmp_path / "late.jsonl")  # begun before there was a row
    rows.rename(tmp_path / "late.jsonl")
    (row,) = (row for row in read_rows(tmp_path / "late.jsonl") if row["arm"] == "plain")
    late.add(row | {"seconds": 0.0})
    assert (tmp_path / "late.jsonl").read_text() == kept
    with pytest.raises(ValueError, match="plain-0.5-s0 of .* with other settings"):
        late.add(row | {"settings": "t"})
    lock = FileLock(weights.parent.with_name(f".{weights.parent.name}.lock"))
    held = Event()

    def another():
        with lock:
            held.set()
            time.sleep(1)

    thread = Thread(target=another)
    thread.start()
    assert held.wait(PATIENCE)
    ablation(tmp_path, **given)
    thread.join()
    assert "plain-0.5-s0: another process is at it" in capsys.readouterr().err + caplog.text
    assert weights.stat().st_mtime_ns == before and len(read_rows(rows)) == 2


def test_a_target_out_of_reach_is_said_before_the_first_training(ablation, tmp_path, capsys):
    with pytest.raises(SystemExit, match="1 of 3 cells failed, the others are kept; plain-0.9999-s0: ValueError"):
        ablation(tmp_path, arms='{"plain": {}}', sparsities="0.5 0.9999", max_steps=2)
    printed = capsys.readouterr().out
    assert printed.index("FAILED plain-0.9999-s0") < printed.index("dense-0-s0 ...")
    assert [row["arm"] for row in read_rows(tmp_path / "rows.jsonl")] == ["dense", "plain"]


def test_a_row_names_the_code_that_runs_and_not_what_is_checked_out_meanwhile(ablation, tmp_path, monkeypatch):
    now, run, really = commit(), Grid.run, subprocess.run

    def git(command, *args, **options):
        done = really(command, *args, **options)
        return subprocess.CompletedProcess(command, 0, "another") if "describe" in command else done

    def checked_out_meanwhile(grid, cell):
        monkeypatch.setattr(subprocess, "run", git)
        assert commit() == "another"
        return run(grid, cell)

    monkeypatch.setattr(Grid, "run", checked_out_meanwhile)
    ablation(tmp_path, only="dense")
    (row,) = read_rows(tmp_path / "rows.jsonl")
    assert row["commit"] == now


def test_a_cell_that_is_measured_again_still_shows_its_training(ablation, tmp_path):
    """With other attacks, or because it was killed after the training."""
    for attacks, rows in (("clean", "first.jsonl"), ("clean pgd-2", "second.jsonl")):
        given = {"save_models": "true", "test_full": "false", "logging_steps": 1, "test_attacks": attacks}
        ablation(tmp_path, **given, only="dense", results=tmp_path / rows)
        folder = trained(tmp_path, "dense-s0").parent
        assert "(figures/training.png)" in (folder / "README.md").read_text()
    assert not any("trainer_state" in name for name in published_files(folder))


def test_other_settings_are_trained_anew_in_the_same_folder(ablation, tmp_path):
    """Not read from what lies there: neither the weights nor the evaluation nor the dense training."""
    one = {"arms": '{"plain": {}}', "sparsities": "0.5"}
    ablation(tmp_path, **one)
    changed = one | {"arms": '{"plain": {"learning_rate": 0.05}}', "results": tmp_path / "changed.jsonl"}
    ablation(tmp_path, **changed)
    ablation(tmp_path / "fresh", **(changed | {"results": tmp_path / "fresh.jsonl"}))
    before, after, fresh = (read_rows(tmp_path / f"{name}.jsonl") for name in ("rows", "changed", "fresh"))
    assert [differences(a, b) for a, b in zip(after, fresh, strict=True)] == [{}, {}]
    assert differences(before[0], after[0]) == {} and "mean_cnc" in differences(before[1], after[1])
    ablation(tmp_path, **(one | {"split": "validation", "results": tmp_path / "validation.jsonl"}))
    rows = read_rows(tmp_path / "validation.jsonl")  # the same weights on other images
    assert rows[1]["n"] != before[1]["n"] and rows[1]["mean_cnc"] == before[1]["mean_cnc"]


def test_a_gated_dense_training_is_gone_on_from_as_a_plain_network(ablation, tmp_path):
    """The paper's pipeline: its gates are folded, its scores learned. Measured again, it gives the same row."""
    arms = yaml.safe_load((CONFIGS / "ablation_paper.yaml").read_text())["arms"]
    given = {"arms": json.dumps(arms), "sparsities": "0.9", "max_steps": 12, "only": "dense-paper paper"}
    ablation(tmp_path, **given)
    rows = read_rows(tmp_path / "rows.jsonl")
    assert [row["arm"] for row in rows] == ["dense-paper pipeline", "paper pipeline"]
    assert not any("gate" in name for name in load_file(trained(tmp_path, "dense-s0")))
    (tmp_path / "rows.jsonl").unlink()
    ablation(tmp_path, **given)
    assert [differences(a, b) for a, b in zip(rows, read_rows(tmp_path / "rows.jsonl"), strict=True)] == [{}, {}]


def test_an_arm_with_everything_is_run(ablation, tmp_path):
    """Of ablation_recipe.yaml; the teacher is the dense training that the cell starts from."""
    arm = yaml.safe_load((CONFIGS / "ablation_recipe.yaml").read_text())["arms"]["all"] | {"regrow_interval": 1}
    ablation(tmp_path, arms=json.dumps({"all": arm}), sparsities="0.9", max_steps=12)
    rows = {row["arm"]: row for row in read_rows(tmp_path / "rows.jsonl")}
    assert rows.keys() == {"dense-all", "all"} and abs(rows["all"]["zeros"] - 0.9) < 1e-3


def test_a_cell_that_fails_does_not_stop_the_others(ablation, tmp_path, capsys):
    arms = '{"broken": {"pruning_layer_floor": 0.9}, "plain": {}}'  # floors that leave too few weights to prune
    with pytest.raises(SystemExit, match="1 of 3 cells failed, the others are kept; broken-0.5-s0: ValueError"):
        ablation(tmp_path, arms=arms, sparsities="0.5")
    told = capsys.readouterr()
    assert "FAILED broken-0.5-s0" in told.out
    assert "Robust evaluation: 100%" in told.err  # attacks may take an hour
    assert {row["arm"] for row in read_rows(tmp_path / "rows.jsonl")} == {"dense", "plain"}


@pytest.mark.launched
def test_a_time_limit_ends_it_and_it_goes_on_from_there(ablation, tmp_path):
    """Models are published as well; each row is that of a run which was not interrupted."""
    long = {"sparsities": "0.5", "arms": '{"plain": {}}', "max_steps": 60, "pretraining": '{"max_steps": 60}'}
    long |= {"save_strategy": "steps", "save_steps": 10, "save_total_limit": 1, "cpu_threads": 1, "test_limit": 12}
    command = [RECIPES / "ablation.py", *options(tmp_path, **long), "--time_limit"]
    for limit in (1, 2, 4, 8, 16, 32, 64, 128):  # until one ends within a cell, however slow the machine
        done = run_python([*command, limit], status=None, environment={"CUDA_VISIBLE_DEVICES": ""})
        assert done.returncode in (143, -signal.SIGTERM), done.stderr[-3000:]  # while training, or while measuring
        assert "of 2 cells are finished, the same command goes on" in done.stdout
        kept = read_rows(tmp_path / "rows.jsonl") if (tmp_path / "rows.jsonl").exists() else []
        begun = bool(list((tmp_path / "runs").glob("*/checkpoint-*")) or kept)
        if begun:
            break
    assert begun and len(kept) < 2 and "dense-0-s0 ...\n" in done.stdout
    ablation(tmp_path, **long, save_models="true", data_notes="Eight pixels.")
    ablation(tmp_path / "whole", **long)
    for one, two in zip(*(read_rows(folder / "rows.jsonl") for folder in (tmp_path, tmp_path / "whole")), strict=True):
        assert differences(one, two) == {}
    folder = trained(tmp_path, "plain-0.5-s0").parent
    model = load_sparse(folder)
    zeros = sum(int((p == 0).sum()) for p in model.parameters() if p.ndim > 1)
    results = json.loads((folder / "results.json").read_text())
    check_results(results)
    check_results(json.loads((trained(tmp_path / "whole", "plain-0.5-s0").parent / "results.json").read_text()))
    assert zeros == results["sparsity"]["zeros"] > 0 and results["robustness"]["n"] == 12
    dense = json.loads((trained(tmp_path, "dense-s0").parent / "results.json").read_text())
    assert results["dense"] == dense and "dense" not in dense
    card = (folder / "README.md").read_text()
    assert "50.0 %" in card and "| | dense | this model |" in card and (folder / "figures").is_dir()
    assert "```bash\npython " in card  # what was typed
    assert "**Note:** Eight pixels.\n" in card
    assert json.loads((folder / "tscnc_config.json").read_text())["notes"] == ["Eight pixels."]


@pytest.mark.launched
def test_sigterm_leaves_no_worker_behind(tmp_path):
    command = [sys.executable, RECIPES / "ablation.py", *options(tmp_path, workers=2, max_steps=100_000)]
    with started(command, stdout=subprocess.PIPE) as parent:
        for line in parent.stdout:  # the dense cell is over, two workers train
            if line.startswith("[1/5]"):
                break
        time.sleep(1)
        parent.terminate()
        parent.terminate()
        assert parent.wait(PATIENCE) == 143 and len(read_rows(tmp_path / "rows.jsonl")) == 1
        assert left_behind() == []


@pytest.mark.launched
def test_workers_give_the_rows_of_one_process(ablation, tmp_path):
    ablation(tmp_path / "one", sparsities="0.9", cpu_threads=1)
    command = [RECIPES / "ablation.py", *options(tmp_path / "two", sparsities="0.9", workers=2)]
    run_python([*command, "--cpu_threads", "1"], environment={"CUDA_VISIBLE_DEVICES": ""})
    one, two = ({(r["arm"], r["seed"]): r for r in read_rows(tmp_path / n / "rows.jsonl")} for n in ("one", "two"))
    assert one.keys() == two.keys() and len(one) == 3
    assert all(differences(one[key], two[key]) == {} for key in one)


@pytest.mark.launched
def test_a_slot_that_is_killed_leaves_what_is_finished_and_is_attacked_without_training_anew(tmp_path):
    """As recipes/slot.md has it, at a tiny size."""
    pytest.importorskip("pyautoattack", reason="pyautoattack is not installed (tscnc-hf[eval])")
    back, smaller = (
        tmp_path / "back",
        {"channels_last": "false", "bf16": "false", "sparsities": "0.9", "cpu_threads": 1},
    )
    given = TINY | smaller | {"results": back / "rows.jsonl", "bundles": back, "output_dir": tmp_path / "runs"}
    given |= {"max_steps": 8, "eval_steps": 0.5, "save_steps": 0.5, "test_limit": 8, "input_size": 32} | NO_WORKERS
    command = ["--config", str(CONFIGS / "slot_resnet18.yaml")]
    for name, value in given.items():
        command += [] if name in ("attack", "arms") else [f"--{name}", *(str(one) for one in words(name, value))]
    working = ["--dataloader_num_workers", "1", "--dataloader_persistent_workers", "true"]
    with started([sys.executable, RECIPES / "ablation.py", *command, *working], stdout=subprocess.PIPE) as process:
        assert any(line.startswith("[1/2]") for line in process.stdout)
        process.kill()
    assert [row["arm"] for row in read_rows(back / "rows.jsonl")] == ["dense-all"]
    assert [path.name for path in back.glob("*.tar*")] == ["dense-all-0-s0.tar"]
    main = runpy.run_path(str(RECIPES / "ablation.py"))["main"]
    main(command)
    weights = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/trained.safetensors")}
    main([*command, "--test_attacks", "clean", "apgd-ce+t", "--results", str(back / "apgd.jsonl")])
    assert len(weights) == 2 and all(path.stat().st_mtime_ns == at for path, at in weights.items())
    assert [list(row["accuracy"]) for row in read_rows(back / "apgd.jsonl")] == [["clean", "apgd-ce+t"]] * 2
    with tarfile.open(back / "all-0.9-s0.tar") as tar:
        assert b"Accuracy under APGD-CE+T" in tar.extractfile("all-0.9-s0/README.md").read()
    assert len([path for path in back.iterdir() if not path.name.startswith(".")]) == 4


# ---- the other files of settings ----

NO_WORKERS = {"dataloader_num_workers": 0, "dataloader_persistent_workers": "false"}
TINY_VIT = json.dumps({"patch_size": 4, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2})
# files over each other -> cells to run, of all that they say
FILES = {
    ("ablation_vit.yaml",): ("dense TSC", {"TSC", "TSC + CNC"}),
    ("ablation_cnn.yaml", "ablation_baselines.yaml"): ("dense-0 learned latent", {"learned", "latent", "latent, ERK"}),
    ("ablation_vit.yaml", "ablation_search.yaml"): ("dense-0 plain", {"plain"}),
    ("ablation_cnn_50k.yaml",): ("dense-TSC-0 TSC-0", {"TSC"}),
    ("ablation_cnn_50k.yaml", "ablation_cnn_50k_wide.yaml"): (
        "dense LAMP TSC",
        {"LAMP", "TSC + LAMP", "TSC 7.5e-7 + LAMP", "TSC 7.5e-7 + LAMP, slow", "TSC 7.5e-7 + LAMP, long"},
    ),
    ("ablation_vit_50k.yaml",): ("dense-0 TSC-0", {"TSC"}),
    ("ablation_vit_50k.yaml", "ablation_vit_50k_wide.yaml"): ("dense-0 TSC-0", {"TSC"}),
    ("slot_resnet18.yaml",): ("dense all", {"all"}),
    ("slot_vit_small.yaml",): ("dense all", {"all"}),
}


WHOLE = ("slot", "50k")  # trained longer, in bf16


@pytest.mark.parametrize(
    "files",
    [
        pytest.param(f, marks=pytest.mark.launched if any(word in f[0] for word in WHOLE) else (), id="+".join(f))
        for f in FILES
    ],
)
def test_files_of_settings_run(files, tmp_path, capsys):
    only, arms = FILES[files]
    said = [yaml.safe_load((CONFIGS / name).read_text()) for name in files]
    merged = {name: value for values in said for name, value in values.items()}
    given = TINY | {"results": tmp_path / "rows.jsonl", "output_dir": tmp_path / "runs", "sparsities": "0.9"}
    given |= {"only": only, "channels_last": "false", "logging_steps": 1}
    if merged["architecture"] == "vit":
        given |= {"model_args": TINY_VIT}
    elif merged.get("bf16"):  # see the kind "resnet-stride-8" of tests/trainers.py
        given |= {"model_args": json.dumps(json.loads(TINY["model_args"]) | {"output_stride": 8})}
    if merged.get("bundles"):
        given |= NO_WORKERS | {"bundles": tmp_path / "back", "eval_steps": 0.5, "save_steps": 0.5, "max_steps": 8}
        given |= {"input_size": 32} if "input_size" in merged else {}
    for name in ("attack", "arms"):
        del given[name]
    command = [text for name in files for text in ("--config", str(CONFIGS / name))]
    command += [text for name, value in given.items() for text in (f"--{name}", *words(name, value))]
    runpy.run_path(str(RECIPES / "ablation.py"))["main"](command)
    rows = read_rows(tmp_path / "rows.jsonl")
    assert {row["arm"] for row in rows if row["sparsity"]} == arms
    assert {row["split"] for row in rows} == {merged.get("split", "test")}
    assert {row["model"] for row in rows} == {merged["label"]}
    for arm in arms:  # the options of the arm, and those that all share, were used
        (folder,) = (tmp_path / "runs").glob(f"{arm}-0.9-s0-*")
        if merged.get("save_models"):
            used = json.loads((folder / "tscnc_config.json").read_text())
            assert used["tsc_weight"] == float(merged["arms"][arm].get("tsc_weight", 0))
            assert (used["bf16"], used["ema_decay"]) == (True, float(merged["ema_decay"]))
            card = (folder / "README.md").read_text()
            assert "90.0 %" in card
            assert merged.get("test_full") is False or rows[-1]["local_lipschitz"] >= 0
        if merged.get("bundles"):
            assert "All weights were rounded to fp16 after training" in card
            assert "precision bf16" in card
            with tarfile.open(tmp_path / "back" / f"{arm}-0.9-s0.tar") as tar:
                tar.extractall(tmp_path / "carried", filter="data")
            carried, kept = (
                load_sparse(tmp_path / "carried" / f"{arm}-0.9-s0"),
                load_file(folder / "model.safetensors"),
            )
            values = dict(carried.state_dict())
            assert kept and all(
                torch.equal(value, values[f"timm_model.{name}" if f"timm_model.{name}" in values else name])
                for name, value in kept.items()
                if name in values or f"timm_model.{name}" in values
            )
            assert all(torch.equal(value.half().float(), value) for value in kept.values() if value.ndim)
