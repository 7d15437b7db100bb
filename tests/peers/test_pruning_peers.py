"""
The benchmark beside other libraries that prune, on a tiny network: its loop is the Trainer's, every library reaches
its target under it, a row says what is left. Libraries that are absent are skipped; `make test-peers` installs them.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector

from tscnc_hf import save_sparse
from tscnc_hf.artifact.models.saving import disk_state


CONFIG = """
label: tiny
augmentation: none
architecture: resnet18
model_args: {channels: [8, 8, 8, 8], layers: [1, 1, 1, 1], stem_type: deep, stem_width: 4, output_stride: 8}
epsilon: 8/255
pruning_end: 0.5
pruning_interval: 2
per_device_train_batch_size: 16
learning_rate: 2.0e-3
weight_decay: 0.05
warmup_steps: 0.25
"""


@pytest.fixture(scope="module")
def peers():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
        import pruning_peers

        yield pruning_peers


@pytest.fixture
def arguments(tmp_path):
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG)
    tiny = ["--config", str(config), "--dataset", "digits", "--train_limit", "64", "--test_limit", "8", "--steps", "8"]
    return [*tiny, "--attack_steps", "1", "--results", str(tmp_path / "rows.jsonl"), "--threads", "1"]


@pytest.fixture
def benchmark(peers, arguments, tmp_path):
    given = dict(zip((name.removeprefix("--") for name in arguments[::2]), arguments[1::2], strict=True))
    given |= {name: int(given[name]) for name in ("train_limit", "test_limit", "steps", "attack_steps")}
    return peers.Benchmark(argparse.Namespace(**given, tsc_weight=1e-4, tsc_a=10.0, timed_steps=8))


class Recorded(torch.utils.data.Dataset):
    """Keeps the batches that were asked for."""

    def __init__(self, data):
        self.data, self.given = data, []

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.data[index]

    def __getitems__(self, indices):
        self.given.append(self.data.__getitems__(indices))
        return self.given[-1]


def test_the_loop_does_what_the_trainer_does(peers, benchmark, tmp_path):
    benchmark.recipe = replace(benchmark.recipe, epsilon=1e-9)  # each draws noise of its own
    benchmark.data.train = Recorded(benchmark.data.train)
    ours, theirs = benchmark.network(0)[0], benchmark.network(0)[0]
    before = parameters_to_vector(ours.parameters()).detach().clone()
    benchmark.trainer("TSCNCTrainer, plain", ours, 0.0, 8, 0, str(tmp_path)).train()
    assert len(list(peers.train(theirs, benchmark.data.train.given, 8, benchmark.recipe, 0))) == 8
    one, two = (parameters_to_vector(model.parameters()).detach() for model in (ours, theirs))
    assert (one - two).norm() < 1e-4 * (two - before).norm()


@pytest.mark.parametrize("arm", ["torch.nn.utils.prune", "NNCF"])
def test_zeros_rise_to_the_target(arm, peers, benchmark):
    if package := peers.package_of(arm):
        pytest.importorskip(package, reason=f"{package} is not installed: make test-peers")
    library, steps = benchmark.loop(arm, benchmark.dense(0), 0.9, 8, 0)
    asked = torch.rand(2, 3, 8, 8)
    for _ in steps:
        pass
    library.model.eval()
    before = peers.logits(library.model, asked).detach()
    pruned = library.finish()
    torch.testing.assert_close(peers.logits(pruned, asked), before)  # it is the network that was trained
    weights = [module.weight for module in pruned.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    count = sum(weight.numel() for weight in weights)
    assert abs(sum(int((weight == 0).sum()) for weight in weights) - 0.9 * count) <= 1
    assert pruned.state_dict().keys() == benchmark.network(0)[0].state_dict().keys()


def test_torch_pruning_cuts_multiply_adds_off(peers, benchmark):
    pytest.importorskip("torch_pruning", reason="torch-pruning is not installed: make test-peers")
    model = benchmark.dense(0)
    dense = peers.flops_report(model, benchmark.shape).macs
    library, steps = benchmark.loop("Torch-Pruning", model, 0.5, 8, 0)
    for _ in steps:
        pass
    assert 0.35 < peers.flops_report(library.finish(), benchmark.shape).macs / dense <= 0.5


def test_the_cubic_is_that_of_the_trainer(peers, benchmark):
    from tscnc_hf.method.pruning.schedule import sparsity_at

    due = peers.Cubic(0.9, 20, benchmark.recipe)
    assert due.choices == [0, 2, 4, 6, 8, 10]
    assert [due(done) for done in due.choices] == pytest.approx([sparsity_at(s, 0, 10, 0.9) for s in due.choices])
    assert peers.Cubic(0.9, 20, benchmark.recipe, rounds=3).choices == [0, 4, 8, 10]


def test_channels_take_multiply_adds_off(peers, benchmark):
    model, shape = benchmark.network(0)[0], benchmark.shape
    sparsity, records = peers.sparsity_for(model, 0.3, shape), list(peers.weight_matrices(model))
    pruner = peers.Pruner(records, allocation=peers.unit_allocation(model, records, ("channels",), "uniform"))
    pruner.update(sparsity)
    pruner.apply_()
    report = peers.flops_report(model, shape)
    assert 0.5 < report.sparse_macs / report.macs <= 0.7  # a channel of eight is much
    with pytest.raises(ValueError, match="channels=0.99: those inside of blocks cannot"):
        peers.sparsity_for(model, 0.99, shape)


def test_times_are_of_steps_that_choose_no_masks(peers):
    steps = [(1, 9.0, 1.0), (2, 9.0, 1.0), (3, 2.0, 1.0), (4, 7.0, 1.0), (5, 3.0, 1.0), (6, 4.0, 2.0)]
    found = peers.spread(steps, [0, 4])
    assert found == {"steps": 3, "seconds": 3.0, "ratio": [2.0, 2.0, 3.0], "choice": 4.0}


@pytest.mark.launched
def test_rows_go_on_and_name_what_is_missing(peers, arguments, monkeypatch, capsys):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)  # as where nothing else is installed
    monkeypatch.setattr(peers, "stock_libraries", lambda folders: [{"transformers": "loads"} for _ in folders])
    more = ["--seeds", "0", "--sparsities", "0.9", "--timed_steps", "8"]
    arms = ["torch.nn.utils.prune", "TSCNCTrainer, TSC", "TSCNCTrainer, channels"]
    peers.main([*arguments, *more, "--arms", "NNCF", *arms])
    said = capsys.readouterr().out
    assert "NNCF is left out: nncf is not installed (make bench-peers installs it)" in said
    rows = [json.loads(line) for line in Path(arguments[arguments.index("--results") + 1]).read_text().splitlines()]
    assert [row["arm"] for row in rows] == ["a step", *arms]
    times, torchs, ours, channels = rows
    assert set(times["times"]) == {"not pruned", "torch.nn.utils.prune", *peers.OURS}
    assert times["times"]["not pruned"]["ratio"] == [1.0, 1.0, 1.0]
    assert torchs["zeros"] == pytest.approx(0.9, abs=1e-3) and ours["zeros"] == pytest.approx(0.9, abs=1e-3)
    assert list(ours["disk"]) == ["dense", "packed", "packed, zstd"]
    assert {found.get("tscnc_hf") for found in ours["disk"].values()} == {None, "loads"}
    assert ours["disk"]["packed"]["bytes"] < 0.5 * ours["disk"]["dense"]["bytes"]
    assert channels["disk"]["cut"]["tscnc_hf"] == "loads" and 0.3 < channels["macs"] < 0.7
    monkeypatch.setattr(peers.Benchmark, "run", None)  # nothing is computed again
    monkeypatch.setattr(peers.Benchmark, "time_steps", None)
    peers.main([*arguments, *more, "--arms", *arms])
    assert "| torch.nn.utils.prune | 90% | 1 |" in capsys.readouterr().out


def test_what_stock_libraries_say(peers, benchmark, tmp_path):
    import stock_loading
    from safetensors.torch import save_file

    model = benchmark.network(0)[0].eval()
    x = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        given = {"inputs": x, "logits": model(x).logits}
    model.save_pretrained(tmp_path / "dense", state_dict=disk_state(model))
    with torch.no_grad():
        model.timm_model.fc.weight[:, 4:] = 0
    save_sparse(model, tmp_path / "packed")
    for form in ("dense", "packed"):
        save_file(given, tmp_path / form / "expected.safetensors")
    assert stock_loading.attempts(tmp_path / "dense") == {"transformers": "loads", "timm": "loads"}
    said = stock_loading.attempts(tmp_path / "packed")
    assert said["transformers"].startswith("OSError: ") and said["timm"].startswith("RuntimeError: ")
    save_file(given | {"logits": given["logits"] + 1}, tmp_path / "dense" / "expected.safetensors")
    assert stock_loading.attempts(tmp_path / "dense")["timm"] == "loads, logits are 1 apart"
