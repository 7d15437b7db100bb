"""Tables of latencies: what they hold, and what they refuse. With the runtimes that are installed."""

import json

import pytest
import torch
from torch import nn

from tscnc_hf.inference.runtimes import benchmark
from tscnc_hf.inference.runtimes.benchmark import measure_latency
from tscnc_hf.inference.runtimes.installed import OURS, RUNTIMES, installed
from tscnc_hf.inference.timing import Timing, interleaved, race


def network():
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 10)]
    net = nn.Sequential(*layers).eval()
    with torch.no_grad():
        net[3].weight[torch.rand_like(net[3].weight) < 0.9] = 0
    return net


def test_latencies():
    names = ("eager", "channels_last", *(name for name in ("onnxruntime", "OpenVINO") if installed(name)), OURS)
    said = []
    before = torch.get_num_threads()
    report = measure_latency(network(), (3, 8, 8), (1, 3), threads=2, names=names, seconds=0.05, say=said.append)
    assert torch.get_num_threads() == before and report.threads == 2
    assert [(row.batch, row.runtime) for row in report.rows] == [(batch, name) for batch in (1, 3) for name in names]
    for row in report.rows:
        assert 0 < row.low_ms <= row.median_ms <= row.high_ms and row.calls >= 5 and row.difference <= 1e-4
        assert row.times_ours == 1 or row.runtime != OURS
    assert 0.8 < report.zeros < 0.9
    assert len(report.to_markdown().splitlines()) == 2 + len(report.rows)
    assert "3 images: preparing channels_last" in said
    json.dumps(report.to_dict(), allow_nan=False)


def test_without_ours_there_is_nothing_to_compare_with():
    report = measure_latency(network(), (3, 8, 8), (1,), names=("eager",), seconds=0.01)
    assert report.to_dict()["rows"][0]["times_ours"] is None


@pytest.mark.parametrize(
    "options, message",
    [
        ({"names": ("eager", "TVM")}, "TVM: no such runtime; there are eager, channels_last"),
        ({"batches": (1, 0)}, "batches=0: give 1 or more"),
        ({"batches": (1.5,)}, "batches=1.5: give a whole number, 1 or more"),
        ({"batches": ()}, r"batches=\(\): there is nothing to measure"),
        ({"names": ()}, r"names=\(\): there is nothing to measure"),
        ({"threads": 0}, "threads=0: give 1 or more"),
        ({"threads": -1}, "threads=-1: give 1 or more"),
        ({"seconds": -1.0}, "seconds=-1.0: give a number, 0 or more"),
        ({"seconds": float("nan")}, "seconds=nan: give a number, 0 or more"),
        ({"size": (3, 8)}, r"size=\(3, 8\): give channels, height and width"),
        ({"size": (3, 8, 0)}, "size=0: give 1 or more"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        measure_latency(network(), **({"size": (3, 8, 8)} | options))


def test_a_runtime_that_computes_something_else_is_refused(monkeypatch):
    right = benchmark.prepared

    def wrong(name, model, *rest):
        run = right(name, model, *rest)
        return (lambda: run() * 1.01) if name == "channels_last" else run

    monkeypatch.setattr(benchmark, "prepared", wrong)
    with pytest.raises(ValueError, match="channels_last: logits differ"):
        measure_latency(network(), (3, 8, 8), (2,), names=("eager", "channels_last"))


@pytest.mark.parametrize("wrong", [{"most": 0}, {"least": 0}, {"seconds": -1}, {"burst": float("inf")}])
@pytest.mark.parametrize("measure", [interleaved, lambda calls, **how: race(calls, dict.fromkeys(calls), **how)])
def test_turns_and_seconds_that_are_none_are_refused(wrong, measure):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}="):
        measure({"a": lambda: pytest.fail("it was called")}, **({"seconds": 0.1} | wrong))


def test_calls_are_made_in_turns():
    made = []
    times = interleaved({"a": lambda: made.append("a"), "b": lambda: made.append("b")}, 0, least=3)
    assert made == ["a", "b"] * 4 and [len(timing.calls) for timing in times.values()] == [3, 3]


def test_median_and_quartiles():
    assert Timing([1.0, 2.0, 3.0, 4.0, 100.0]).median == 3.0
    assert Timing([1.0, 2.0, 3.0, 4.0, 100.0]).spread == (2.0, 4.0)
    assert Timing([5.0]).spread == (5.0, 5.0)
    assert set(RUNTIMES) > {"eager", OURS}
